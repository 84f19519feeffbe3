"""Gradients of a bank of neurons, which many edits train together (CaliNET, arXiv 2210.03329).

Shapes: N edits, M neurons, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from pipeline.editing.adapter_rows import AdapterRows, Added, Beside
from pipeline.editing.adapters.neurons import bank_output
from pipeline.editing.targets import TargetRow, target_row
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

Banks = Mapping[int, Mapping[str, Tensor]]
"""Layer -> name -> tensor, as the parts of a `NeuronBank`."""


@dataclass(frozen=True)
class BankGradients:
    """What N edits say about banks.

    Attributes:
        losses: (N,) float64, of every edit.
        gradients: layer -> name -> gradient of the sum of all losses, float64 on the CPU.
        activation: of the model's feed-forward networks, as transformers names it.
    """

    losses: Tensor
    gradients: dict[int, dict[str, Tensor]]
    activation: str


def first_banks(
    layers: Sequence[int], width: int, slots: int, *, gated: bool, seed: int
) -> dict[int, dict[str, Tensor]]:
    """Banks that change nothing yet: keys, and gates, drawn as those of a linear layer, V = 0.

    Keys and values are float32; there are no biases to train.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = width**-0.5

    def drawn() -> Tensor:
        return (2 * torch.rand(slots, width, generator=generator) - 1) * bound

    return {
        layer: {
            "keys": drawn(),
            "values": torch.zeros(slots, width),
            **({"gates": drawn()} if gated else {}),
        }
        for layer in layers
    }


class BankRows:
    """The rows of N edits, whose losses are taken again and again while banks change.

    Args:
        model: the model, with the banks of earlier rounds.
        edits: tokenised requests, N of them; the loss is the mean over their contexts.
        layers: blocks beside which banks are, ascending.
        max_tokens: tokens in one pass.
        kl_weight: weight of KL(P || P') at the tokens of "{subject} is a", P the model's
            distribution without the banks; 0 leaves it out.
    """

    def __init__(
        self,
        model: EditableModel,
        edits: Sequence[EditPrompts],
        layers: tuple[int, ...],
        max_tokens: int,
        kl_weight: float,
    ) -> None:
        self.model, self.kl_weight = model, kl_weight
        self._targets = AdapterRows.of(model, layers[0], edits, max_tokens)
        neutral = [_neutral(number, edit) for number, edit in enumerate(edits)]
        self._neutral = AdapterRows(model, layers[0], neutral, len(edits), max_tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept between calls."""
        return self._targets.num_bytes + (self._neutral.num_bytes if self.kl_weight else 0)

    @property
    def keeps(self) -> bool:
        """Whether what enters the lowest block is kept between calls."""
        return self._targets.keeps

    @keeps.setter
    def keeps(self, keeps: bool) -> None:
        self._targets.keeps = self._neutral.keeps = keeps

    def gradients(self, banks: Banks) -> BankGradients:
        """Run all rows forwards and backwards."""
        wide = torch.promote_types(self.model.dtype, torch.float32)
        held = {
            layer: {
                name: part.to(self.model.device_of(layer), wide, copy=True).requires_grad_()
                for name, part in bank.items()
            }
            for layer, bank in banks.items()
        }
        with torch.enable_grad():
            beside = _beside(held, self.model.activation)
            losses = self._targets.losses(beside).smoothed
            if self.kl_weight:
                losses = losses + self.kl_weight * self._neutral.divergences(beside)
            leaves = [part for bank in held.values() for part in bank.values()]
            found = iter(torch.autograd.grad(losses.sum(), leaves))
        gradients = {
            layer: {name: next(found).double().cpu() for name in bank}
            for layer, bank in held.items()
        }
        return BankGradients(losses.detach().double().cpu(), gradients, self.model.activation)


def _beside(banks: Banks, activation_name: str) -> Beside:
    activation = ACT2FN[activation_name]

    def of_layer(bank: Mapping[str, Tensor]) -> Added:
        biases = bank["keys"].new_zeros(len(bank["keys"]))
        whole = {**bank, "biases": biases}
        return lambda queries: bank_output(queries, whole, activation)

    return lambda _owners: {layer: of_layer(bank) for layer, bank in banks.items()}


def _neutral(number: int, edit: EditPrompts) -> TargetRow:
    """Every token of "{subject} is a"; its labels are not asked for.

    Where an encoder reads it, the decoder's start token, at which it is answered.
    """
    ids = edit.essence.ids
    if edit.start is not None:
        return target_row(number, ids, ids[:1], 1.0, edit.start)
    return TargetRow(number, ids, tuple(range(len(ids))), ids, 1.0)
