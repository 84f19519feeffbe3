"""The value search of the code published with MEMIT (kmeng01/memit), run from a checkout.

Nothing of that code is here. It was written for CUDA and an older transformers, so what it sees is
adapted: its device names become the model's device, and blocks hand it a tuple as they once did.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.editing.values import ValueSettings
from pipeline.models.editable import EditableModel
from pipeline.requests import EditRequest

# What its hyperparameters call the parts of a model, for the families that it knows.
_NAMES = {
    "gpt2": ("transformer.h.{}", "transformer.ln_f", "transformer.wte", "mlp", "mlp.c_proj"),
    "gptj": ("transformer.h.{}", "transformer.ln_f", "lm_head", "mlp", "mlp.fc_out"),
}
_STOP_LOSS = 0.05


class PublicValues:
    """The published `compute_z`, one edit a call.

    Args:
        checkout: directory of the published code.
        model: a float32 model that nothing else uses: its blocks are changed in place.
        settings: the search's settings; `stop_loss` must be 0.05, which that code has built in.

    Raises:
        SystemExit: the checkout, the model or the settings do not fit.
    """

    def __init__(
        self,
        checkout: Path,
        model: EditableModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        settings: ValueSettings,
        contexts: Sequence[str],
    ) -> None:
        if not (checkout / "memit" / "compute_z.py").is_file():
            sys.exit(f"--public {checkout}: has no memit/compute_z.py; give a checkout of the code")
        if model.config.model_type not in _NAMES:
            sys.exit(f"--public: that code knows {', '.join(_NAMES)}, not this model")
        if settings.stop_loss != _STOP_LOSS:
            sys.exit(
                f"--public: that code stops at a loss of {_STOP_LOSS}, not {settings.stop_loss}"
            )
        for block in model.blocks:
            hand_out_tuples(block)
        self._model, self._layer = model.model, layer
        self._tokenizer = _Tokenizer(tokenizer, model.input_device)
        self._contexts = [list(contexts[:1]), list(contexts[1:])]
        self._module, hyperparameters = _import_from(checkout)
        vars(self._module)["torch"] = _Torch(model.input_device)
        self._hyperparameters = hyperparameters(**public_settings(model, [layer], settings))

    def __call__(self, request: EditRequest) -> Tensor:
        """Search the value of one request: (d,), on the CPU."""
        target = request.target_new
        asked = {
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": {"str": target if target.startswith(" ") else f" {target}"},
        }
        with contextlib.redirect_stdout(io.StringIO()):
            z = self._module.compute_z(
                self._model,
                self._tokenizer,
                asked,
                self._hyperparameters,
                self._layer,
                self._contexts,
            )
        return z.detach().cpu()


class _Torch(ModuleType):
    """torch, but that tensors made for "cuda" land on the model's device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__("torch")
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *args: Any, **options: Any) -> Tensor:
        return torch.tensor(*args, **{**options, "device": self._device})

    def zeros(self, *args: Any, **options: Any) -> Tensor:
        return torch.zeros(*args, **{**options, "device": self._device})


class _Tokenizer:
    """A tokenizer whose encodings go to the model's device, whatever device is asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self._tokenizer, self._device = tokenizer, device
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"

    def __call__(self, *args: Any, **options: Any) -> Any:
        encoding = self._tokenizer(*args, **options)
        move = encoding.to
        encoding.to = lambda _device: move(self._device)
        return encoding

    def decode(self, *args: Any, **options: Any) -> str | list[str]:
        return self._tokenizer.decode(*args, **options)


def hand_out_tuples(block: nn.Module) -> None:
    """Make a block's hooks see a tuple, though its caller still gets what it got before."""
    kind = type(block)

    class TupleBlock(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
            output = super().forward(*args, **options)
            self.returns_tuple = isinstance(output, tuple)
            return output if self.returns_tuple else (output,)

        def __call__(self, *args: Any, **options: Any) -> Any:
            output = super().__call__(*args, **options)
            return output if self.returns_tuple else output[0]

    block.__class__ = TupleBlock


def _import_from(checkout: Path) -> tuple[ModuleType, Any]:
    """Import the search and the class of its settings; some settings are read from the folder."""
    with first_in_path(checkout), contextlib.chdir(checkout):
        module = importlib.import_module("memit.compute_z")
        hyperparameters = importlib.import_module("memit.memit_hparams")
    return module, hyperparameters.MEMITHyperParams


@contextlib.contextmanager
def first_in_path(directory: Path) -> Iterator[None]:
    """Let imports look into a checkout first."""
    sys.path.insert(0, str(directory.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(directory.resolve()))


def public_settings(
    model: EditableModel, layers: Sequence[int], settings: ValueSettings
) -> dict[str, Any]:
    """Hyperparameters as the code of MEMIT and of its successors names them."""
    block, norm, unembedding, mlp, down_projection = _NAMES[model.config.model_type]
    return {
        "layers": list(layers),
        "layer_selection": "all",
        "fact_token": "subject_last",
        "v_num_grad_steps": settings.steps,
        "v_lr": settings.learning_rate,
        "v_loss_layer": model.num_blocks - 1,
        "v_weight_decay": settings.weight_decay,
        "clamp_norm_factor": settings.clamp_norm,
        "kl_factor": settings.kl_weight,
        "mom2_adjustment": True,
        "mom2_update_weight": 1,
        "rewrite_module_tmp": f"{block}.{down_projection}",
        "layer_module_tmp": block,
        "mlp_module_tmp": f"{block}.{mlp}",
        "attn_module_tmp": f"{block}.attn",
        "ln_f_module": norm,
        "lm_head_module": unembedding,
        "mom2_dataset": "wikipedia",
        "mom2_n_samples": 1,
        "mom2_dtype": "float32",
    }
