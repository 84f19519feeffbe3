"""Tiny random encoder-decoder models and their tokenizer, made without downloads.

`t5` is the original architecture (relu, tied and scaled embeddings), `t5_gated` that of T5 v1.1 and
Flan-T5 (gated GELU, an unembedding of its own). The decoder has 4 blocks, the encoder 3.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from pipeline.models.encoder_decoder import EncoderDecoderModel
from pipeline.prompts import EditPrompts, tokenize_edits
from tests.cases import EDITS, Case, requests
from tests.families import HIDDEN_SIZE, INNER_SIZE, NUM_LAYERS, SENTENCES
from tests.oracles.memit import Edit

KINDS: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5_gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
_VOCABULARY_SIZE = 320
_SPECIAL = ["<pad>", "</s>", "<unk>"]  # ids 0, 1, 2, as in every T5


def config(kind: str, vocab_size: int = _VOCABULARY_SIZE, **shape: Any) -> T5Config:
    """Few buckets, so that distances in the tests' texts fall into the last one."""
    chosen = {
        "d_model": HIDDEN_SIZE,
        "d_kv": 12,  # heads * d_kv != d_model, as in the released large models
        "d_ff": INNER_SIZE,
        "num_layers": 3,
        "num_decoder_layers": NUM_LAYERS,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
        "decoder_start_token_id": 0,
        **shape,
    }
    return T5Config(vocab_size=vocab_size, **chosen, **KINDS[kind])


def build(kind: str, dtype: torch.dtype = torch.float64) -> T5ForConditionalGeneration:
    """A random model in eval mode, the same float32 weights on every call, loaded as `dtype`."""
    model = T5ForConditionalGeneration(config(kind))
    if kind == "t5_gated":
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    generator = torch.Generator().manual_seed(2000 + list(KINDS).index(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)  # a norm's scale
        # Positions count as much as words do.
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(10)
    return T5ForConditionalGeneration.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=dtype
    ).eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A Unigram tokenizer over words, as T5's is; letters that it has not seen are <unk>.

    Its pieces are letters, the beginnings of some words and some whole words, so that texts have
    pieces of all kinds. (A trained one would have others in every process.)
    """
    texts = [*SENTENCES, *(f"{edit.prompt} {edit.target_new}" for edit in EDITS)]
    return tokenizer_of(texts, 2)


def tokenizer_of(texts: Iterable[str], every: int) -> PreTrainedTokenizerBase:
    """The same of other texts; every so many-th word is one piece."""
    words = sorted({f"▁{word}" for text in texts for word in text.split()})
    scores = dict.fromkeys(sorted({letter for word in words for letter in word}), -6.0)
    scores |= {word[:4]: -7.0 for word in words if len(word) > 4}
    scores |= {word: -9.0 for word in words[::every]}
    return T5Tokenizer(vocab=[(token, 0.0) for token in _SPECIAL] + [*scores.items()], extra_ids=0)


def save(kind: str, directory: str | Path) -> None:
    """Write the model (float32 safetensors) and its tokenizer to a directory."""
    build(kind, torch.float32).save_pretrained(directory)
    tokenizer().save_pretrained(directory)


@cache
def case(kind: str, dtype: torch.dtype = torch.float64) -> EncoderDecoderModel:
    """The model, shared by all tests: its weights must stay."""
    return EncoderDecoderModel(build(kind, dtype))


class _OneStream(T5ForConditionalGeneration):
    """Called with a prompt's tokens, its end token among them, and behind them the answer's.

    The logits are the decoder's from the prompt's last token on, at which the answer begins, and
    zeros before, so that an oracle of decoder-only models can read them.
    """

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        (ids,) = input_ids.tolist()
        cut = ids.index(self.config.eos_token_id) + 1
        answer = [self.config.decoder_start_token_id, *ids[cut:]]
        logits = (
            super()
            .forward(input_ids=input_ids[:, :cut], decoder_input_ids=torch.tensor([answer]))
            .logits
        )
        return SimpleNamespace(logits=nn.functional.pad(logits, (0, 0, cut - 1, 0)))


class Behind(nn.Module):
    """A T5 as a model of what its decoder reads, behind one prompt."""

    def __init__(self, model: PreTrainedModel, source: Sequence[int]) -> None:
        super().__init__()
        self.model, self.source = model, torch.tensor([source])

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids=self.source, decoder_input_ids=input_ids)


def in_one_stream(kind: str, dtype: torch.dtype) -> Case:
    """The model with its parts, called as a decoder-only one."""
    plain = build(kind, dtype)
    stream = object.__new__(_OneStream)
    stream.__dict__ = plain.__dict__
    blocks, downs = list(plain.decoder.block), down_projections(plain)
    return Case(kind, stream, EncoderDecoderModel(plain), tokenizer(), blocks, downs)


def prompts(
    model: EncoderDecoderModel, edits: list[Edit] = EDITS, contexts: list[str] | None = None
) -> list[EditPrompts]:
    return tokenize_edits(tokenizer(), requests(edits), contexts or ["{}"], model.answers)


def down_projections(model: PreTrainedModel) -> list[nn.Module]:
    return [block.layer[2].DenseReluDense.wo for block in model.decoder.block]


def taught(
    facts: Sequence[tuple[str, str]], steps: int, seed: int = 0, batch_size: int = 64
) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerBase]:
    """A small T5 v1.1 trained from nothing on prompts with their answers, and its tokenizer."""
    words = tokenizer_of((text for fact in facts for text in fact), 1)
    torch.manual_seed(seed)
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 512, "num_layers": 2, "num_decoder_layers": 2}
    model = T5ForConditionalGeneration(config("t5_gated", len(words), dropout_rate=0.0, **shape))
    model.lm_head.weight = nn.Parameter(0.1 * torch.randn_like(model.shared.weight))
    asked = words([prompt for prompt, _ in facts], return_tensors="pt", padding=True)
    labels = words([answer for _, answer in facts], return_tensors="pt", padding=True)["input_ids"]
    labels[labels == words.pad_token_id] = -100
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        chosen = torch.randperm(len(facts))[:batch_size]
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimiser.zero_grad()
        batch = {name: tensor[chosen] for name, tensor in asked.items()}
        logits = model(**batch, labels=labels[chosen]).logits.flatten(0, 1)
        # Smoothed, so that no fact is so sure that it takes hundreds of steps to teach another.
        cross_entropy(logits, labels[chosen].flatten(), label_smoothing=0.1).backward()
        optimiser.step()
    return model.eval(), words
