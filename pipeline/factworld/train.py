"""Train the tokenizer and the model of the embedded world from nothing."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.factworld.packing import NO_SUBJECT, Batch
from pipeline.factworld.world import World

END_OF_TEXT = "<|endoftext|>"
PROBED_LAYER = 1
PROBE_WEIGHT = 0.3


@dataclass(frozen=True)
class Shape:
    """The size of the model; the inner layer is wide because its width bounds the edits held.

    At least two layers: the facts are written in the first two.
    """

    vocab_size: int = 2048
    width: int = 160
    inner_width: int = 2048
    layers: int = 4
    heads: int = 5
    positions: int = 128


def train_tokenizer(sentences: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    A leading space is added to every text, so that a name has the same tokens at the start of a
    text as inside it: otherwise one subject would have two keys.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{sentence}." for sentence in sentences), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """Return an untrained GPT-2 of this shape, without dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.positions,
        n_embd=shape.width,
        n_inner=shape.inner_width,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def train(
    model: GPT2LMHeadModel,
    data: Iterator[Batch],
    world: World,
    *,
    steps: int,
    learning_rate: float = 2e-3,
    warmup: int = 100,
) -> Iterator[tuple[int, float]]:
    """Train in place with AdamW and a cosine schedule, yielding (step, loss) after each step.

    The loss has two parts: the next token, and the objects of a subject read by a linear probe
    (thrown away afterwards) from the residual stream at the subject's last token after block
    `PROBED_LAYER`. The second part, with the veiled rows of `batches`, makes the model keep its
    facts where large language models were found to keep theirs: in the early MLPs, at the last
    token of the subject (Meng et al., "Locating and Editing Factual Associations in GPT", 2022).
    """
    objects = _object_shares(world)
    probe = nn.Linear(model.config.n_embd, objects.shape[1])
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *probe.parameters()],
        lr=learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.1,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _cosine(step, steps, warmup)
    )
    model.train()
    for step in range(1, steps + 1):
        loss = _loss(model, probe, objects, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, loss.item()
    model.eval()


def _cosine(step: int, steps: int, warmup: int) -> float:
    warm = min(1.0, (step + 1) / warmup)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _object_shares(world: World) -> Tensor:
    """Return (subjects, objects): each row spreads 1 over the objects of the subject's facts."""
    subjects = {subject: i for i, subject in enumerate(world.subjects)}
    objects = {
        pair: i for i, pair in enumerate({(f.relation_id, f.object): 0 for f in world.facts})
    }
    shares = torch.zeros(len(subjects), len(objects))
    for fact in world.facts:
        shares[subjects[fact.subject], objects[fact.relation_id, fact.object]] = 1.0
    return shares / shares.sum(dim=1, keepdim=True)


def _loss(model: GPT2LMHeadModel, probe: nn.Linear, objects: Tensor, batch: Batch) -> Tensor:
    output = model(
        input_ids=batch.ids,
        attention_mask=_attention_mask(batch.visible_until),
        output_hidden_states=True,
    )
    losses = cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
    )
    weights = batch.weights[:, 1:].flatten()
    at_subject = batch.subjects != NO_SUBJECT
    # hidden_states[0] is the embedding: the output of block l is at l + 1.
    read = probe(output.hidden_states[PROBED_LAYER + 1][at_subject])
    probe_loss = cross_entropy(read, objects[batch.subjects[at_subject]])
    return (losses * weights).sum() / weights.sum() + PROBE_WEIGHT * probe_loss


def _attention_mask(visible_until: Tensor) -> Tensor:
    """Return the additive mask (B, 1, T, T): query i sees key j if j <= i <= visible_until[j]."""
    position = torch.arange(visible_until.shape[1])
    allowed = (position[None, :] <= position[:, None]) & (
        position[None, :, None] <= visible_until[:, None, :]
    )
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[:, None]
