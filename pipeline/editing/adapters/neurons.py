"""Neurons added to a block's feed-forward network: T-Patcher's patches, CaliNET's slots.

FFN'(q) = FFN(q) + sum_p a_p v_p with a_p = act(q.k_p + b_p), and with a gate
a_p = act(q.g_p) (q.k_p + b_p) (T-Patcher, arXiv 2301.09785; CaliNET, arXiv 2210.03329). q is the
network's input, behind the norm that stands before it. That is a network with M neurons more: into
one of their own form, with the biases that they need, they can be merged.

Shapes: M neurons, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pipeline.editing.adapters.base import Adapter
from pipeline.errors import InputError
from pipeline.models.anatomy import is_transposed
from pipeline.models.editable import EditableModel

_REQUIRED, _OPTIONAL = {"keys", "biases", "values"}, {"gates", "queries"}


@dataclass(frozen=True)
class NeuronBank(Adapter):
    """M neurons beside a feed-forward network.

    Its parts are keys (M, D), biases (M,), values (M, D) and, where the neurons are gated, gates
    (M, D); its settings name the `activation`, as transformers does. Neurons that were made for an
    input each say which in queries (M, D), which compute nothing.
    """

    kind = "neurons"

    @classmethod
    def of(
        cls,
        keys_MD: Tensor,
        biases_M: Tensor,
        values_MD: Tensor,
        activation: str,
        gates_MD: Tensor | None = None,
        queries_MD: Tensor | None = None,
    ) -> Self:
        """Keep tensors as float32 on the CPU."""
        parts = {"keys": keys_MD, "biases": biases_M, "values": values_MD}
        parts |= {} if gates_MD is None else {"gates": gates_MD}
        parts |= {} if queries_MD is None else {"queries": queries_MD}
        kept = {name: part.detach().float().cpu() for name, part in parts.items()}
        return cls(kept, {"activation": activation})

    @classmethod
    def empty(cls, width: int, activation: str, *, with_queries: bool = False) -> Self:
        """No neuron, to join others to."""
        nothing = torch.zeros(0, width)
        queries = nothing if with_queries else None
        return cls.of(nothing, torch.zeros(0), nothing, activation, queries_MD=queries)

    @classmethod
    def joined(cls, increments: Sequence[Self]) -> Self:
        first = increments[0]
        for other in increments[1:]:
            if other.settings != first.settings or other.parts.keys() != first.parts.keys():
                raise ValueError(
                    f"neurons {dict(first.settings)} with {', '.join(first.parts)} and others"
                    f" {dict(other.settings)} with {', '.join(other.parts)} make no one bank"
                )
        names = first.parts.keys()
        return cls(
            {n: torch.cat([one.parts[n] for one in increments]) for n in names}, first.settings
        )

    @property
    def num_neurons(self) -> int:
        """M."""
        return len(self.parts["biases"])

    def attach(self, model: EditableModel, layer: int) -> Callable[[], None]:
        wide = torch.promote_types(model.dtype, torch.float32)
        held = {
            name: part.to(device=model.device_of(layer), dtype=wide)
            for name, part in self.parts.items()
            if name != "queries"
        }
        activation = ACT2FN[self.settings["activation"]]
        return add_to_ffn(model, layer, lambda queries: bank_output(queries, held, activation))

    def problem(self) -> str | None:
        names = set(self.parts)
        if not _REQUIRED <= names <= _REQUIRED | _OPTIONAL:
            return f"neurons with the tensors {', '.join(sorted(names))}"
        count = len(self.parts["biases"])
        shape = tuple(self.parts["keys"].shape)
        wanted = {n: (count,) if n == "biases" else (count, shape[-1]) for n in names}
        found = {n: tuple(part.shape) for n, part in self.parts.items()}
        if len(shape) != 2 or found != wanted:
            return f"neurons of shapes {found}, which do not fit each other"
        activation = self.settings.get("activation")
        if not isinstance(activation, str) or activation not in ACT2FN:
            return f"neurons with the unknown activation {activation!r}"
        return None

    def misfit(self, model: EditableModel, layer: int) -> str | None:
        width = self.parts["keys"].shape[1]
        if width == model.hidden_size:
            return None
        return f"its neurons are {width} wide, the model {model.hidden_size}"

    @torch.no_grad()
    def merge(self, model: EditableModel, layer: int) -> None:
        """Concatenate the neurons to the block's two or three matrices.

        A configuration names one inner size for all blocks, so the other blocks get as many neurons
        that put out zero.

        Raises:
            InputError: the network is of another form or activation, or has no biases where the
                neurons have.
        """
        if problem := self._obstacle(model):
            raise InputError(f"{problem}: they cannot be merged; export them as an adapter")
        zeros = {name: torch.zeros_like(part) for name, part in self.parts.items()}
        for block in range(model.num_blocks):
            parts = self.parts if block == layer else zeros
            _grow_inputs(model, block, parts)
            _grow(model.down_projection(block), "weight", parts["values"].T, rows=False)
        _set_inner_size(model, model.key_size(layer))

    def _obstacle(self, model: EditableModel) -> str | None:
        """Why the neurons are none of the model's own, or None."""
        if model.has_encoder:
            return "encoder and decoder have networks of one size, and the neurons the decoder's"
        forms = {True: "gated", False: "plain"}
        own, has = forms["gates" in self.parts], forms[model.family.is_gated]
        if own != has:
            return (
                f"the neurons are {own}, the feed-forward networks of model type"
                f" {model.config.model_type!r} {has}"
            )
        if self.settings["activation"] != model.activation:
            return (
                f"the neurons' activation is {self.settings['activation']!r}, the model's"
                f" {model.activation!r}"
            )
        if self.parts["biases"].any() and _multiplied(model, 0).bias is None:
            return "the feed-forward networks have no biases, the neurons do"
        return None


def add_to_ffn(
    model: EditableModel, layer: int, added: Callable[[Tensor], Tensor]
) -> Callable[[], None]:
    """Add a function of its inputs to a feed-forward network's output, where it is computed.

    Args:
        model: the model.
        layer: the block.
        added: (N, D) inputs, float32 or wider -> what to add.

    Returns:
        What takes it away again.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    entered: list[Tensor] = []

    def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered[:] = [inputs[0]]

    def leave(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        more = added(entered.pop().flatten(0, -2).to(wide))
        return output + more.reshape(output.shape).to(output.dtype)

    handles = [
        model.up_projection(layer).register_forward_pre_hook(enter),
        model.down_projection(layer).register_forward_hook(leave),
    ]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


def bank_output(
    queries_ND: Tensor, bank: Any, activation: Any, acts_NM: Tensor | None = None
) -> Tensor:
    """What neurons add to a feed-forward network's output: (N, D).

    Args:
        queries_ND: the network's inputs.
        bank: name -> tensor, as `NeuronBank.parts`.
        activation: the function.
        acts_NM: whether a neuron acts on an input at all; null is always.
    """
    inner_NM = torch.addmm(bank["biases"], queries_ND, bank["keys"].T)
    if "gates" in bank:
        inner_NM = activation(queries_ND @ bank["gates"].T) * inner_NM
    else:
        inner_NM = activation(inner_NM)
    if acts_NM is not None:
        inner_NM = inner_NM * acts_NM
    added: Tensor = inner_NM @ bank["values"]
    return added


def _multiplied(model: EditableModel, block: int) -> Any:
    """The map that keys stand in: the gate's partner, or the only one."""
    path = model.family.gated_projection or model.family.up_projection
    return model.blocks[block].get_submodule(path)


def _grow_inputs(model: EditableModel, block: int, parts: Mapping[str, Tensor]) -> None:
    """Append neurons to the maps that read a feed-forward network's input."""
    first, keyed = model.up_projection(block), _multiplied(model, block)
    rows = {"weight": parts["keys"], "bias": parts["biases"]}
    if "gates" not in parts:
        _grow_rows(keyed, rows)
        return
    gates = {"weight": parts["gates"], "bias": torch.zeros_like(parts["biases"])}
    if first is keyed:
        # The gate's rows are the upper half, so that each half has its own end.
        _grow_rows(first, rows)
        _grow_rows(first, gates, at=(first.out_features - len(parts["biases"])) // 2)
    else:
        _grow_rows(keyed, rows)
        _grow_rows(first, gates)


def _grow_rows(module: Any, more: Mapping[str, Tensor], at: int | None = None) -> None:
    """Insert output rows before one of them, null behind the last, into weight and bias."""
    for name, part in more.items():
        if getattr(module, name) is not None:
            _grow(module, name, part, rows=True, at=at)


def _grow(module: nn.Module, name: str, more: Tensor, *, rows: bool, at: int | None = None) -> None:
    """Insert into a linear module's weight, (out, in), which Conv1D turns, or into its bias."""
    parameter: Tensor = getattr(module, name)
    turned = parameter.dim() == 2 and is_transposed(module)
    oriented = parameter.data.T if turned else parameter.data
    dim = 0 if rows else 1
    place = oriented.shape[dim] if at is None else at
    before, after = oriented.split([place, oriented.shape[dim] - place], dim=dim)
    grown = torch.cat([before, more.to(oriented), after], dim=dim)
    grown = grown.T.contiguous() if turned else grown
    setattr(module, name, nn.Parameter(grown, requires_grad=False))
    if grown.dim() == 2:
        sizes = ("nx", "nf") if turned else ("out_features", "in_features")
        for size, value in zip(sizes, grown.shape, strict=True):
            setattr(module, size, value)


def _set_inner_size(model: EditableModel, size: int) -> None:
    """Say in the configuration how many neurons a block has now."""
    for name in ("n_inner", "intermediate_size", "ffn_dim"):
        if hasattr(model.config, name):
            setattr(model.config, name, size)
            return
    raise AssertionError(f"{model.config.model_type} has a configuration without an inner size")
