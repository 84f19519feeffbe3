"""Train the tokenizer and the model of the embedded world from nothing."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.factworld.world import World

END_OF_TEXT = "<|endoftext|>"
TOKENS_PER_STEP = 1024
ROW_LENGTHS = (32, 64, 128)
# Most of a sentence (which subject, which phrasing) cannot be predicted: it only adds noise.
OTHER_TOKEN_WEIGHT = 0.1


@dataclass(frozen=True)
class Shape:
    """The size of the model; the inner layer is wide because its width bounds the edits held."""

    vocab_size: int = 2048
    width: int = 160
    inner_width: int = 2048
    layers: int = 4
    heads: int = 5
    positions: int = 128


@dataclass(frozen=True)
class Sentence:
    """Token ids of one fact in one phrasing; the last `num_object_tokens` are the object."""

    ids: list[int]
    num_object_tokens: int


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


def encode_facts(world: World, tokenizer: PreTrainedTokenizerFast) -> list[Sentence]:
    """Tokenize every fact in every seen phrasing."""
    sentences = []
    for fact in world.facts:
        target = tokenizer(f" {fact.object}")["input_ids"]
        for prompt in tokenizer(world.prompts(fact, held_out=False))["input_ids"]:
            sentences.append(Sentence(prompt + target, len(target)))
    return sentences


def batches(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of packed rows for ever: token ids and the loss weight of each, both (B, T).

    A row starts with a sentence alone or after an end-of-text token and goes on as running text;
    short rows make the first case as common as the last.
    """
    rng = random.Random(seed)
    stream = _endless(sentences, rng)
    stop_id = tokenizer(".")["input_ids"][-1]
    eos_id = tokenizer.eos_token_id
    while True:
        for length in ROW_LENGTHS:
            rows = [
                _pack(stream, length, stop_id, eos_id, rng)
                for _ in range(TOKENS_PER_STEP // length)
            ]
            yield (
                torch.tensor([ids for ids, _ in rows]),
                torch.tensor([weights for _, weights in rows]),
            )


def _endless(sentences: Sequence[Sentence], rng: random.Random) -> Iterator[Sentence]:
    while True:
        yield from rng.sample(sentences, len(sentences))


def _pack(
    stream: Iterator[Sentence], length: int, stop_id: int, eos_id: int, rng: random.Random
) -> tuple[list[int], list[float]]:
    ids = [eos_id] if rng.random() < 0.5 else []
    weights = [OTHER_TOKEN_WEIGHT] * len(ids)
    while len(ids) < length:
        sentence = next(stream)
        end = [stop_id] if rng.random() < 0.8 else [stop_id, eos_id]
        ids += sentence.ids + end
        weights += [OTHER_TOKEN_WEIGHT] * (len(sentence.ids) - sentence.num_object_tokens)
        weights += [1.0] * sentence.num_object_tokens + [OTHER_TOKEN_WEIGHT] * len(end)
    return ids[:length], weights[:length]


def train(
    model: GPT2LMHeadModel,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float = 2e-3,
    warmup: int = 100,
) -> Iterator[tuple[int, float]]:
    """Train in place with AdamW and a cosine schedule, yielding (step, loss) after each step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _cosine(step, steps, warmup)
    )
    model.train()
    for step in range(1, steps + 1):
        loss = _loss(model, *next(data))
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


def _loss(model: GPT2LMHeadModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()
