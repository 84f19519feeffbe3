"""Edits, settings and tiny models that the tests of the numeric core share.

Models are built once a process and must be left as they were found; a test that edits weights
builds its own with `fresh`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts, tokenize_edits
from pipeline.requests import EditRequest
from tests import families
from tests.oracles.memit import Edit, Value, compute_value

ALL_FAMILIES = [*families.FAMILIES, "gemma3"]
"""The table of tiny models, and Gemma 3 as it is released: a text model inside a multimodal one."""

CONTEXTS = ["{}", "The house is old. {}", "Therefore, {x} is in the city of. {}"]

# Subjects inside, at the start, in quotes, alone and short; targets of one to several tokens; a
# two-byte letter at a subject's end; a brace in a prompt.
EDITS = [
    Edit("The mother tongue of {} is", "Anselm Quillfeather", "English"),
    Edit("{} plays the", "Zdeněk Kováč", "piano and drums"),
    Edit('"{}" is in', "Port Velmora", "Ostrania the Great"),
    Edit("{}", "Brightwater Mills", "London"),
    Edit("In {}, the capital {x} is", "Rome", "Paris"),
]

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "learning_rate": 0.5,
    "weight_decay": 0.5,
    "kl_weight": 0.0625,
    "clamp_norm": 0.75,
    "stop_loss": 0.05,
}

THREE = [EDITS[1], EDITS[2], EDITS[4]]  # subjects at the start, in quotes, inside


class Case(NamedTuple):
    """A tiny model with its parts and a tokenizer."""

    family: str
    model: PreTrainedModel
    editable: EditableModel
    tokenizer: PreTrainedTokenizerFast
    blocks: list[nn.Module]
    down_projections: list[nn.Module]

    @property
    def tolerance(self) -> float:
        """Error that rounding explains: some attentions are float32 whatever the weights are."""
        if self.model.dtype != torch.float64:
            return 1e-4
        return 1e-5 if self.family in ("gemma2", "gptj") else 1e-9

    def prompts(
        self, edits: list[Edit] = EDITS, contexts: list[str] = CONTEXTS
    ) -> list[EditPrompts]:
        return tokenize_edits(self.tokenizer, requests(edits), contexts, self.editable.answers)


def requests(edits: list[Edit]) -> list[EditRequest]:
    return [
        EditRequest(
            case_id=str(i), prompt=edit.prompt, subject=edit.subject, target_new=edit.target_new
        )
        for i, edit in enumerate(edits)
    ]


@cache
def tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    return families.build_tokenizer(bos)


@cache
def case(family: str, dtype: torch.dtype = torch.float64) -> Case:
    """The family's model, shared by all tests: its weights must stay."""
    return fresh(family, dtype)


def fresh(family: str, dtype: torch.dtype = torch.float64) -> Case:
    """A model of the caller's own; `t5` and `t5_gated` as one stream of tokens."""
    if family.startswith("t5"):
        from tests import encoder_decoders

        return encoder_decoders.in_one_stream(family, dtype)
    model = _build_gemma3(dtype) if family == "gemma3" else families.build(family, dtype)
    editable = EditableModel(model)
    if family == "gemma3":
        blocks = list(model.model.language_model.layers)
        downs: list[nn.Module] = [block.mlp.down_proj for block in blocks]
    else:
        blocks, downs = families.modules(model, family)
    begins = "llama" in family or "gemma" in family
    return Case(family, model, editable, tokenizer(begins), blocks, downs)


@cache
def oracle_values(family: str, layer: int) -> list[tuple[Tensor, Value]]:
    """The plain search's values of the three edits, in float64."""
    tiny = case(family)
    parts = tiny.model, tiny.tokenizer, tiny.blocks, layer
    return [compute_value(*parts, edit, CONTEXTS, **SETTINGS) for edit in THREE]


def confident() -> Case:
    """GPT-2 of two blocks, whose last network alone can make any token likely.

    Behind the last norm a state has length sqrt(32): with the other models' embeddings, of length
    one, no token's probability comes near one.
    """
    config = GPT2Config(**families.GPT, n_layer=2, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = GPT2LMHeadModel(config).double().eval()
    model.transformer.wte.weight.data *= 5
    blocks, downs = families.modules(model, "gpt2")
    return Case("gpt2", model, EditableModel(model), tokenizer(False), blocks, downs)


def token_rows(count: int = 40, seed: int = 0, below: int = 400) -> list[list[int]]:
    """Random texts of unequal length, enough of them that every inner unit of OPT fires."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(10, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, below, (length,), generator=generator).tolist() for length in lengths]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _build_gemma3(dtype: torch.dtype) -> PreTrainedModel:
    text_model = families.build("gemma3_text", torch.float32)
    config = Gemma3Config(
        text_config=text_model.config.to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=397,
        eoi_token_index=398,
        image_token_index=399,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    model.lm_head.load_state_dict(text_model.lm_head.state_dict())
    weights = model.state_dict()
    return (
        type(model)
        .from_pretrained(None, config=model.config, state_dict=weights, dtype=dtype)
        .eval()
    )
