"""Random-weight models of published shapes, and edits of CounterFact's lengths made of random ids.

Needs torch and transformers only.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig, PreTrainedConfig

from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts, Row

CONTEXTS = 6
CONTEXT_TOKENS = 10
ESSENCE_TOKENS = 2  # "is a"

# Per cent of CounterFact's edits (counterfact_20k, byte-level BPE of 8,192 tokens) with so many
# tokens: before the subject, in the subject, behind it, in the new object.
_BEFORE = {0: 82, 1: 2, 2: 2, 3: 7, 4: 6, 5: 1}
_SUBJECT = {1: 1, 2: 10, 3: 25, 4: 27, 5: 16, 6: 9, 7: 5, 8: 4, 9: 2, 12: 1}
_AFTER = {1: 15, 2: 20, 3: 30, 4: 16, 5: 15, 6: 4}
_TARGET = {1: 96.5, 2: 2.0, 3: 1.1, 4: 0.4}


@dataclass(frozen=True)
class Shape:
    """A model's configuration and the blocks that are edited in it.

    Attributes:
        config: makes the transformers configuration.
        layers: as published: MEMIT's for GPT-2 XL and GPT-J, EasyEdit's for Llama 3.
    """

    config: Callable[[], PreTrainedConfig]
    layers: tuple[int, ...]


# `gelu_pytorch_tanh` is the function that GPT-2 and GPT-J name `gelu_new`, in one kernel: what the
# pipeline puts in its place (pipeline/models/kernels.py).
SHAPES = {
    "gpt2-xl": Shape(
        lambda: GPT2Config(
            vocab_size=50257,
            n_positions=1024,
            n_embd=1600,
            n_layer=48,
            n_head=25,
            activation_function="gelu_pytorch_tanh",
        ),
        (13, 14, 15, 16, 17),
    ),
    "gpt-j-6b": Shape(
        lambda: GPTJConfig(
            vocab_size=50400,
            n_positions=2048,
            n_embd=4096,
            n_layer=28,
            n_head=16,
            rotary_dim=64,
            activation_function="gelu_pytorch_tanh",
            tie_word_embeddings=False,
        ),
        (3, 4, 5, 6, 7, 8),
    ),
    "llama-3-8b": Shape(
        lambda: LlamaConfig(
            vocab_size=128256,
            max_position_embeddings=8192,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
        (4, 5, 6, 7, 8),
    ),
    "tiny": Shape(
        lambda: GPTJConfig(
            vocab_size=512,
            n_positions=128,
            n_embd=64,
            n_layer=4,
            n_head=4,
            rotary_dim=8,
            bos_token_id=0,
            eos_token_id=0,
            activation_function="gelu_pytorch_tanh",
            tie_word_embeddings=False,
        ),
        (1, 2),
    ),
}


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> EditableModel:
    """A model with random weights, created on the device in the dtype."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    return EditableModel(model)


def random_edits(count: int, vocab_size: int) -> list[EditPrompts]:
    """Edits of random token ids with CounterFact's lengths; the contexts are the same for all."""
    generator = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(vocab_size) for _ in range(length))

    def length(table: dict[int, float] | dict[int, int]) -> int:
        return generator.choices(list(table), list(table.values()))[0]

    contexts = [(), *(ids(CONTEXT_TOKENS) for _ in range(CONTEXTS - 1))]
    essence_end = ids(ESSENCE_TOKENS)
    edits = []
    for number in range(count):
        before, subject, after = ids(length(_BEFORE)), ids(length(_SUBJECT)), ids(length(_AFTER))
        rows = tuple(
            Row(
                (*context, *before, *subject, *after),
                len(context) + len(before) + len(subject) - 1,
            )
            for context in contexts
        )
        essence = Row((*subject, *essence_end), len(subject) - 1)
        edits.append(EditPrompts(rows, ids(length(_TARGET)), essence, f"subject {number}"))
    return edits


def random_texts(tokens: int, length: int, vocab_size: int) -> list[list[int]]:
    """Rows of `length` random ids, `tokens` in all (rounded up to whole rows)."""
    rows = torch.randint(
        vocab_size, (-(-tokens // length), length), generator=torch.Generator().manual_seed(0)
    )
    return rows.tolist()
