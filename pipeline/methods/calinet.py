"""CaliNET (arXiv 2210.03329): a small feed-forward network beside the model's, of a round's facts.

Published for the decoder of an encoder-decoder model; here any model has it beside the last block's
network unless `layers` says otherwise, and its loss is that of the object's tokens behind the
prompt in several contexts. V begins as 0, so that the model is unchanged before the first step
(published, it is drawn). There are no biases. Every round adds slots of its own; those of earlier
rounds stay. Adam takes the place of Adafactor, whose steps are relative to a weight's length and
begin at nothing with V = 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.adapters import NeuronBank
from pipeline.editing.calibration import BankGradients, BankRows, first_banks
from pipeline.editing.descent import Step, mean_loss
from pipeline.editing.update import Change, EditedWeights
from pipeline.methods.gradient import GradientMethod, Making, State, T
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts
from pipeline.spec import MethodSpec
from pipeline.spec.method import CaliNetSpec


class CaliNet(GradientMethod):
    """All edits of a round train one bank of slots a layer."""

    def __init__(self, spec: MethodSpec) -> None:
        super().__init__(spec)
        self.epochs = spec.calinet.epochs

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        size = self.spec.calinet.batch_size
        for start in range(0, len(items), size):
            yield items[start : start + size]

    def gradients(
        self, model: EditableModel, edits: Sequence[EditPrompts], max_tokens: int, *, keeps: bool
    ) -> BankRows:
        rows = BankRows(model, edits, self.layers, max_tokens, self.spec.calinet.kl_weight)
        rows.keeps = keeps
        return rows

    def factors(self, laid_out: Any, weights: EditedWeights, changes: Any) -> BankGradients:
        rows: BankRows = laid_out
        return rows.gradients(changes or self._first(rows.model.hidden_size))

    def begin(
        self, weights: Mapping[int, Tensor], pristine: Mapping[int, Tensor], state: State | None
    ) -> Making:
        width = len(next(iter(weights.values())))
        return _Calibrating(self._first(width), self.spec.calinet)

    def is_done(self, epoch: Sequence[Step]) -> bool:
        return mean_loss(epoch) < self.spec.calinet.stop_loss

    def _first(self, width: int) -> dict[int, dict[str, Tensor]]:
        own = self.spec.calinet
        return first_banks(self.layers, width, own.slots, gated=own.gated, seed=own.seed)


class _Calibrating(Making):
    def __init__(self, banks: dict[int, dict[str, Tensor]], settings: CaliNetSpec) -> None:
        self._banks, self._settings = banks, settings
        parts = [part for bank in banks.values() for part in bank.values()]
        self._adam = torch.optim.Adam(parts, lr=settings.learning_rate)
        self._sums = self._nothing()
        self._losses: list[Tensor] = []
        self._activation = ""

    def add(self, factors: BankGradients) -> None:
        self._activation = factors.activation
        self._losses.append(factors.losses)
        for layer, bank in factors.gradients.items():
            for name, gradient in bank.items():
                self._sums[layer][name] += gradient

    @torch.no_grad()
    def step(self) -> Step:
        losses = torch.cat(self._losses)
        loss = float(losses.mean())
        is_low = loss < self._settings.stop_loss
        if not is_low:
            for layer, bank in self._banks.items():
                for name, part in bank.items():
                    part.grad = (self._sums[layer][name] / len(losses)).to(part)
            self._adam.step()
        self._sums, self._losses = self._nothing(), []
        changes = {
            layer: {name: part.clone() for name, part in bank.items()}
            for layer, bank in self._banks.items()
        }
        return Step(len(losses), loss, None if is_low else changes)

    def finish(self) -> tuple[Mapping[int, Change], State]:
        return {layer: self._bank(bank) for layer, bank in self._banks.items()}, {}

    def _bank(self, bank: dict[str, Tensor]) -> NeuronBank:
        keys, biases = bank["keys"], torch.zeros(self._settings.slots)
        return NeuronBank.of(keys, biases, bank["values"], self._activation, bank.get("gates"))

    def _nothing(self) -> dict[int, dict[str, Tensor]]:
        return {
            layer: {
                name: torch.zeros_like(part, dtype=torch.float64) for name, part in bank.items()
            }
            for layer, bank in self._banks.items()
        }
