"""The code published with AlphaEdit (jianghoucheng/AlphaEdit), run from a checkout.

Nothing of that code is here. It was written for CUDA and an older transformers, so what it sees is
adapted: what it sends to "cuda" goes to the model's device, and blocks hand it a tuple as they once
did.
"""

import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerBase

from benchmarks.public_values import first_in_path, hand_out_tuples, public_settings
from pipeline.methods.settings import value_settings
from pipeline.models.editable import EditableModel
from pipeline.requests import EditRequest
from pipeline.spec import MethodSpec


class PublicAlphaEdit:
    """The published `apply_AlphaEdit_to_model`, one round a call.

    Args:
        checkout: directory of the published code.
        model: an unedited float32 model that nothing else uses: its blocks are changed in place.
        tokenizer: the model's; it is made to pad on the right.
        method: the settings, resolved; its contexts are given and its threshold is absolute.
        covariances: layer -> C, (F, F) float64.
        dtype: that the projection is made in; the published code makes it in float32.

    Attributes:
        ranks: directions of the projection, a layer each.

    Raises:
        SystemExit: the checkout is none.
    """

    def __init__(
        self,
        checkout: Path,
        model: EditableModel,
        tokenizer: PreTrainedTokenizerBase,
        method: MethodSpec,
        covariances: Mapping[int, Tensor],
        dtype: torch.dtype,
    ) -> None:
        if not (checkout / "AlphaEdit" / "AlphaEdit_main.py").is_file():
            sys.exit(f"--public {checkout}: has no AlphaEdit/AlphaEdit_main.py")
        assert method.contexts is not None and method.alphaedit.threshold_is == "absolute"
        for block in model.blocks:
            hand_out_tuples(block)
        self._model, self._tokenizer = model, tokenizer
        self._pristine = {layer: model.oriented_weight(layer).clone() for layer in covariances}
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        self._module, settings = _import_from(checkout)
        self._contexts = [list(method.contexts[:1]), list(method.contexts[1:])]
        vars(self._module)["CONTEXT_TEMPLATES_CACHE"] = self._contexts
        threshold = method.alphaedit.threshold
        self._settings = settings(
            **public_settings(model, list(covariances), value_settings(method)),
            model_name=model.config.model_type,
            nullspace_threshold=threshold,
            L2=method.alphaedit.ridge,
        )
        made = [projection(matrix, threshold, dtype) for matrix in covariances.values()]
        self._projections = torch.stack([matrix for matrix, _ in made])
        self._past = torch.zeros_like(self._projections)
        self.ranks = [rank for _, rank in made]

    def value(self, request: EditRequest) -> Tensor:
        """Search the value of one request: (D,)."""
        z: Tensor = self._quietly(
            lambda: self._module.compute_z(
                self._model.model,
                self._tokenizer,
                _asked(request),
                self._settings,
                self._settings.layers[-1],
                self._contexts,
            )
        )
        return z.detach()

    def edit(self, requests: Sequence[EditRequest], values: Mapping[str, Tensor]) -> None:
        """Write a round into the weights; a request without a value is searched one."""
        with tempfile.TemporaryDirectory() as directory:
            # Numbered, since a case_id may be no name for a file.
            for number, request in enumerate(requests):
                if request.case_id in values:
                    z = values[request.case_id].numpy()
                    np.savez(Path(directory) / f"{number}.npz", v_star=z)
            _, self._past = self._quietly(
                lambda: self._module.apply_AlphaEdit_to_model(
                    self._model.model,
                    self._tokenizer,
                    [_asked(request, number) for number, request in enumerate(requests)],
                    self._settings,
                    cache_template=f"{directory}/{{2}}.npz",
                    cache_c=self._past,
                    P=self._projections,
                )
            )

    def weight(self, layer: int) -> Tensor:
        """A layer's weight as it is now, (D, F) float32."""
        return self._model.oriented_weight(layer).detach()

    def change(self, layer: int) -> Tensor:
        """W - W0 so far, (D, F) float64."""
        return self.weight(layer).double() - self._pristine[layer].double()

    def _quietly(self, call: Callable[[], Any]) -> Any:
        with contextlib.redirect_stdout(io.StringIO()), _OnDevice(self._model.input_device):
            return call()


class _OnDevice(TorchFunctionMode):
    """Sends to a device what is sent to "cuda" by name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0].to(self._device)
        args = tuple(self._device if _is_cuda(value) else value for value in args)
        options = {
            name: self._device if _is_cuda(value) else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **options)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str) and value == "cuda"


def projection(covariance_FF: Tensor, threshold: float, dtype: torch.dtype) -> tuple[Tensor, int]:
    """P onto the directions of C's singular values below a threshold, and how many these are.

    The published code's experiments make it of C in float32.

    Args:
        covariance_FF: C, float64.
        threshold: absolute bound on the singular values.
        dtype: to decompose C in.

    Returns:
        (F, F) float32, and the directions.
    """
    left, singular, _ = torch.linalg.svd(covariance_FF.to(dtype))
    small = left[:, singular < threshold]
    return (small @ small.T).float(), small.shape[1]


def _import_from(checkout: Path) -> tuple[ModuleType, Any]:
    with first_in_path(checkout), contextlib.chdir(checkout):
        module = importlib.import_module("AlphaEdit.AlphaEdit_main")
    return module, module.AlphaEditHyperParams


def _asked(request: EditRequest, number: int = 0) -> dict[str, Any]:
    target = request.target_new
    return {
        "case_id": number,
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": {"str": target if target.startswith(" ") else f" {target}"},
    }
