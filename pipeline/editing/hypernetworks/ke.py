"""KE, KnowledgeEditor (arXiv 2104.08164): a gradient gated by what the edit says in words.

An LSTM reads "old answer >> new answer || prompt" and gives the condition c. For each matrix a
small network maps c to vectors a (F), a' (D), b (F), b' (D) and a number e, and the update is

    max_scale sigmoid(e) (softmax(a') a^T * G + softmax(b') b^T),

G (D, F) the gradient of the new answer's loss. The embeddings are the model's own and stay as they
are (published, a copy of them is trained); the two separators are vectors that are learned.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pipeline.editing.gradients import Condition, Factors
from pipeline.editing.hypernetworks.mend import gradients_through
from pipeline.editing.hypernetworks.network import HyperNetwork
from pipeline.editing.hypernetworks.rows import Sizes
from pipeline.editing.update import Update


class KnowledgeEditorNetwork(HyperNetwork):
    """The editor of some matrices, of one edit at a time.

    Args:
        sizes: of the edited matrices.
        width: of the model's token embeddings.
        condition_size: entries of c.
        hidden_size: hidden units of each matrix's network.
        lstm_size: hidden units of the LSTM, in each direction.
        max_scale: bound of the scale.
        begins: with drawn gates, or with `descent`: a = -1 and b = 0, a step of
            max_scale / (2 D) down the gradient, whatever is read.
        seed: draws the parameters.
    """

    def __init__(
        self,
        sizes: Sizes,
        width: int,
        *,
        condition_size: int,
        hidden_size: int,
        lstm_size: int,
        max_scale: float,
        begins: Literal["random", "descent"] = "random",
        seed: int,
    ) -> None:
        super().__init__()
        self.sizes, self.max_scale = dict(sizes), max_scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.separators = nn.Parameter(0.1 * torch.randn(2, width))
            self.lstm = nn.LSTM(width, lstm_size, bidirectional=True, batch_first=True)
            self.condition = nn.Linear(2 * lstm_size, condition_size)
            self.gates = nn.ModuleDict(
                {
                    str(layer): nn.Sequential(
                        weight_norm(nn.Linear(condition_size, hidden_size)),
                        nn.Tanh(),
                        weight_norm(nn.Linear(hidden_size, 2 * sum(size) + 1)),
                    )
                    for layer, size in sizes.items()
                }
            )
        if begins == "descent":
            self._descend()

    @torch.no_grad()
    def edit(self, factors: Factors) -> dict[int, Update]:
        return {layer: Update.of(update) for layer, update in self.updates(factors).items()}

    @torch.no_grad()
    def _descend(self) -> None:
        for layer, (_, inputs) in self.sizes.items():
            last: Any = self.gates[str(layer)][-1]  # type: ignore[index]
            # Weights of no length give the bias, and get a gradient in their length.
            last.parametrizations.weight.original0.zero_()
            last.bias.zero_()
            last.bias[:inputs] = -1.0

    def updates(self, factors: Factors) -> dict[int, Tensor]:
        """Layer -> (D, F), differentiable."""
        (condition,) = factors.conditions
        read = self.read(condition)
        return {
            layer: self.gated(read, factors.matrix(layer).to(read), layer) for layer in self.sizes
        }

    def gradients(self, factors: Factors, slopes: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return gradients_through(self, self.updates(factors), slopes)

    def read(self, condition: Condition) -> Tensor:
        """The condition c of an edit, (condition_size,)."""
        old_to_new, new_to_prompt = self.separators[:1], self.separators[1:]
        parts = (condition.old, old_to_new, condition.new, new_to_prompt, condition.prompt)
        words = torch.cat([part.to(self.separators) for part in parts])
        _, (last, _) = self.lstm(words[None])
        found: Tensor = torch.tanh(self.condition(last.flatten()))
        return found

    def gates_of(self, read: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """A = softmax(a') a^T and B = softmax(b') b^T, (D, F), and the scale, a scalar."""
        outputs, inputs = self.sizes[layer]
        parts = self.gates[str(layer)](read).split([inputs, outputs, inputs, outputs, 1])
        a, a_rows, b, b_rows, scale = parts
        first = a_rows.softmax(dim=0)[:, None] * a
        second = b_rows.softmax(dim=0)[:, None] * b
        return first, second, self.max_scale * scale.sigmoid().squeeze()

    def gated(self, read: Tensor, gradient_DF: Tensor, layer: int) -> Tensor:
        """The update of a layer, (D, F)."""
        first, second, scale = self.gates_of(read, layer)
        return scale * (first * gradient_DF + second)
