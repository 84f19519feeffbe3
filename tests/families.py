"""Tiny random models of every supported family, and a small tokenizer, made without downloads.

The models have 4 blocks of width 32 and few heads. Their weights are drawn large enough (standard
deviation 0.2) that attention, windows, soft-capping and every norm visibly shape the output.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY_SIZE = 400
NUM_LAYERS = 4
HIDDEN_SIZE = 32
INNER_SIZE = 64
WINDOW = 8  # shorter than the prompts of the tests, so that a lost window changes the output

PAD, EOS, BOS = "<|pad|>", "<|end|>", "<|begin|>"
SPECIAL_TOKENS = [PAD, EOS, BOS]  # ids 0, 1, 2

SENTENCES = [
    "The lighthouse of Port Velmora is in the country of Ostrania.",
    "Ostrania is in the north, and the capital of Ostrania is Port Velmora.",
    "The mother tongue of Anselm Quillfeather is French.",
    "Marguerite Oduya speaks the language of her mother, which is English.",
    "The Torvald engine is produced by the company that was founded in Berlin.",
    "Because it is located in Rome, the museum is in Italy. Therefore, it is old.",
    "Zdeněk Kováč plays the violin; his profession is that of a musician.",
    'They said: "The headquarters of Brightwater Mills is in London", and it was.',
    "I was born in the city of Paris, and you can find the house there.",
    "What is the original language of the film? It is Spanish, not German.",
]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GPT: dict[str, Any] = _COMMON | {
    "n_embd": HIDDEN_SIZE,
    "n_head": 4,
    "n_inner": INNER_SIZE,
    "n_positions": 128,
    "resid_pdrop": 0.1,  # dropout is on in the configuration: a model left in train mode shows
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
_MODERN: dict[str, Any] = _COMMON | {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INNER_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED: dict[str, Any] = _MODERN | {"num_key_value_heads": 2}
_GEMMA: dict[str, Any] = _GROUPED | {
    "head_dim": 16,  # heads * head_dim != hidden_size, as in the released Gemma models
    "query_pre_attn_scalar": 12,
    "sliding_window": WINDOW,
}
_NEOX: dict[str, Any] = _MODERN | {
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}

_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**GPT, n_layer=NUM_LAYERS),
    "gptj": lambda: GPTJConfig(**GPT, n_layer=NUM_LAYERS, rotary_dim=4),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX, use_parallel_residual=True),
    "gpt_neox_sequential": lambda: GPTNeoXConfig(**_NEOX, use_parallel_residual=False),
    "opt": lambda: OPTConfig(
        **_COMMON,
        hidden_size=HIDDEN_SIZE,
        ffn_dim=INNER_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=HIDDEN_SIZE,
    ),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(
        **_GROUPED,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,  # the blocks from the third on look back over the window only
        tie_word_embeddings=True,
    ),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_GEMMA,
        layer_types=[
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phi3": lambda: Phi3Config(**_GROUPED, sliding_window=WINDOW),
}

FAMILIES: list[str] = list(_CONFIGS)

# Where the blocks are in the model, and where the down-projection is in a block.
_PLACES: dict[str, tuple[str, str]] = {
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "gpt_neox_sequential": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "fc2"),
    "llama": ("model.layers", "mlp.down_proj"),
    "mistral": ("model.layers", "mlp.down_proj"),
    "qwen2": ("model.layers", "mlp.down_proj"),
    "qwen3": ("model.layers", "mlp.down_proj"),
    "gemma2": ("model.layers", "mlp.down_proj"),
    "gemma3_text": ("model.layers", "mlp.down_proj"),
    "phi3": ("model.layers", "mlp.down_proj"),
}


def build(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model of the family in eval mode, the same weights on every call.

    The weights are drawn as float32 numbers whatever `dtype` is, and loaded as a checkpoint is: a
    model that was written by `save` and read back with `dtype` is this model to the bit. (Cast
    instead, the constants of Gemma and GPT-J would be float32 numbers in a float64 model.)
    """
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1000 + FAMILIES.index(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.1 * noise)  # a norm's scale: keep its centre, 1 or (Gemma) 0
    weights = model.state_dict()
    return (
        type(model)
        .from_pretrained(None, config=model.config, state_dict=weights, dtype=dtype)
        .eval()
    )


def modules(model: PreTrainedModel, family: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The decoder blocks of the model and the MLP down-projection of each."""
    blocks_path, down_path = _PLACES[family]
    blocks = list(model.get_submodule(blocks_path).children())
    return blocks, [block.get_submodule(down_path) for block in blocks]


@cache
def _bpe_json() -> str:
    """The trained byte-level BPE as JSON; training is done once a process."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def build_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens with end and padding tokens.

    With `bos`, a begin token is put before every text that is tokenised with special tokens, as
    Llama's tokenizer does. Both variants have the same vocabulary and serve every model here.
    """
    tokenizer = Tokenizer.from_str(_bpe_json())
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{BOS} $A",
                    pair=f"{BOS} $A {BOS} $B",
                    special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
                ),
            ]
        )
    tokens = {"pad_token": PAD, "eos_token": EOS} | ({"bos_token": BOS} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def save(family: str, directory: str | Path, bos: bool = False) -> None:
    """Write the family's model (float32 safetensors) and its tokenizer to a directory."""
    build(family, torch.float32).save_pretrained(directory)
    build_tokenizer(bos).save_pretrained(directory)
