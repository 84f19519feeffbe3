"""The training of SERAC's scope classifier and counterfactual model h (arXiv 2206.06520)."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.editing.serac.editor import SeracEditor
from pipeline.editing.serac.training import Example, LossSettings, losses
from pipeline.editing.update import EditedWeights
from pipeline.methods.module_training import ModuleLearner, ModuleTrainer
from pipeline.methods.serac import new_editor
from pipeline.methods.trainable import Learner, Shapes, State, Trainable, Trainer
from pipeline.models.editable import EditableModel, resolve_device
from pipeline.models.encoder_decoder import editable_model
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.requests import EditRequest

MAX_TOKENS = 4096
# What an edit's scope, embedding and answer do not depend on once the editor is trained.
_AFTER_TRAINING = frozenset(
    {"editor", "editor_sha256", "mode", "threshold", "index", "exact_below", "index_probes"}
)


class SeracTraining(Trainable):
    """A batch of edits is one worker's piece: negative pairs are made inside it."""

    published: Mapping[str, Any] = {
        "batch_size": 10,
        "accumulate": 10,
        "learning_rate": 1e-5,
        "warm_up": 0,
        "edit_weight": 0.1,
        "locality_weight": 1.0,
        "max_gradient_norm": 100.0,
        "own_prompt_share": 0.5,
        "draw_targets": "all",
    }

    def pieces(
        self,
        requests: Sequence[EditRequest],
        others: Sequence[EditRequest],
        texts: Sequence[str],
        generator: random.Random,
    ) -> list[tuple[Any, ...]]:
        assert self.train.batch_size is not None
        found = [
            Example(example.edit.text, example.edit.target_new, example.asked, example.left[0])
            for example in self.drawn(requests, others, texts, generator)
        ]
        size = self.train.batch_size
        starts = range(0, len(found), size)
        return [(tuple(found[start : start + size]),) for start in starts]

    def learner(self, weights: EditedWeights, tokenizer: PreTrainedTokenizerBase) -> Learner:
        return SeracLearner(self._editor(weights.model, tokenizer), self._settings())

    def trainer(self, shapes: Shapes, state: State | None) -> Trainer:
        # The first parameters are copies of the edited model's, which the reducer has not got.
        device, _ = resolve_device()
        model = editable_model(load_model(self.spec.model, device))
        module = self._editor(model, load_tokenizer(self.spec.model)).module
        assert self.train.learning_rate is not None
        optimiser = torch.optim.Adam(module.parameters(), lr=self.train.learning_rate)
        train = self.train
        return ModuleTrainer(module, optimiser, train.max_gradient_norm, train.warm_up or 0, state)

    def settings(self) -> dict[str, Any]:
        return self.spec.method.serac.model_dump(mode="json", exclude=set(_AFTER_TRAINING))

    def _editor(self, model: EditableModel, tokenizer: PreTrainedTokenizerBase) -> SeracEditor:
        return new_editor(self.spec.method.serac, model, tokenizer, self.spec.seed)

    def _settings(self) -> LossSettings:
        own = self.spec.method.serac
        assert self.train.edit_weight is not None and self.train.locality_weight is not None
        return LossSettings(
            self.train.edit_weight,
            self.train.locality_weight,
            all_negatives=own.all_negatives,
            hard_negatives=own.hard_negatives,
        )


class SeracLearner(ModuleLearner):
    """The loss of a batch, with gradients in both models.

    Args:
        editor: what is trained.
        settings: of the loss.
    """

    def __init__(self, editor: SeracEditor, settings: LossSettings) -> None:
        super().__init__(editor.module)
        self.editor, self.settings = editor, settings

    def losses(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """A batch's means, times its examples; a batch is one item."""
        (examples,) = items
        found = losses(self.editor, examples, self.settings, MAX_TOKENS)
        means = {"loss": found.total, "edit_loss": found.edit, "locality_loss": found.scope}
        return {name: len(examples) * mean for name, mean in means.items()}

    def count(self, items: Sequence[Any]) -> int:
        (examples,) = items
        return len(examples)
