"""Settings of methods whose editor is trained before it edits."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.setting_types import Finite, NonNegative, Place, Positive
from pipeline.spec.part import Part


class TrainedSpec(Part):
    """What methods have in common whose editor is trained first (docs/training.md)."""

    editor: Place | None = None
    """Directory of the editor: `editor/` in the run of `editfleet train` that made it. The other
    settings of the group are then the editor's, and need not be given."""
    editor_sha256: str | None = None
    """Digest of the editor's parameters; null takes the one that is there when a run begins."""


class MendSpec(TrainedSpec):
    """MEND (arXiv 2110.11309)."""

    rank: Positive = 1920
    """Rank of the two factors of each residual layer."""
    hidden_layers: NonNegative = 1
    """Residual layers before the last one."""
    edit_rate: Annotated[Finite, Field(gt=0)] = 1e-4
    """What the learned scale of each matrix's update begins at."""
    edit_rate_learning_rate: Annotated[Finite, Field(gt=0)] = 1e-4
    """The optimiser's learning rate of these scales; `train.learning_rate` is the network's."""


class MalmenSpec(TrainedSpec):
    """MALMEN (arXiv 2311.04661)."""

    rank: Positive = 1920
    """Rank of the two factors of each residual block."""
    blocks: Positive = 2
    """Residual blocks."""
    edit_rate: Annotated[Finite, Field(gt=0)] = 1e-6
    """What eta, the learned scale of each matrix's value shifts, begins at."""


class KnowledgeEditorSpec(TrainedSpec):
    """KE, KnowledgeEditor (arXiv 2104.08164)."""

    condition_size: Positive = 1024
    """Entries of the condition."""
    hidden_size: Positive = 128
    """Hidden units of each matrix's network."""
    lstm_size: Positive = 256
    """Hidden units of the LSTM that reads the edit, in each direction."""
    max_scale: Annotated[Finite, Field(gt=0)] = 1.0
    """Bound of an update's scale."""
    begins: Literal["random", "descent"] = "random"
    """What it is before it is trained: gates as they are drawn (random, as published), or a plain
    step of max_scale / 2 D down the gradient (descent), D the hidden size."""
    label_smoothing: Annotated[Finite, Field(ge=0, lt=1)] = 0.1
    """Share of the target's probability in the training's loss that all tokens have alike."""
    margin: Annotated[Finite, Field(gt=0)] = 1e-3
    """Bound of the divergence from the unedited model at first, nats a token."""
    margin_factor: Annotated[Finite, Field(gt=0, le=1)] = 0.8
    """It is multiplied by this after a measurement in which nine in ten edits succeed."""
    margin_floor: Annotated[Finite, Field(gt=0)] = 1e-5
    """It goes no lower."""
    multiplier_learning_rate: Annotated[Finite, Field(gt=0)] = 0.1
    """Step of the bound's multiplier, which begins at 1."""
    repeats: Positive = 1
    """Times that an edit is applied at most, each one to the model as the last one left it: again
    while the model's likeliest tokens are not the new answer's."""


class SeracSpec(TrainedSpec):
    """SERAC (arXiv 2206.06520)."""

    classifier: Place | None = None
    """Encoder of the scope classifier: local directory or hub id of one whose first token's state
    is the embedding (DistilBERT, as published), or a T5, of whose encoder the mean state is. Null
    copies the edited model's own first blocks, those of its encoder where it has one."""
    classifier_blocks: Positive = 2
    """How many of them, where `classifier` is null."""
    embedding_size: Positive = 128
    """Entries of an embedding, where `classifier` is null."""
    scale: Annotated[Finite, Field(gt=0)] = 1.0
    """Of the squared distance d: a query is in scope with probability exp(-scale d)."""
    counterfactual: Place | None = None
    """Small model h that answers in scope, with the edited model's tokenizer: local directory or
    hub id. Null copies the edited model."""
    counterfactual_blocks: Positive | None = None
    """How many of its first blocks, where `counterfactual` is null; null copies all."""
    mode: Literal["hard", "soft"] = "hard"
    """h answers where the probability is above `threshold` (hard), or every answer is a mixture of
    both models' by it (soft)."""
    threshold: Annotated[Finite, Field(gt=0, lt=1)] = 0.5
    """Of the hard mode."""
    index: Literal["faiss"] | None = None
    """What finds the nearest edits of a large memory; null looks at every edit. An index may miss
    one. Needs the extra `index`."""
    exact_below: Positive = 20_000
    """Up to so many edits every one is looked at all the same."""
    index_probes: Positive = 16
    """Clusters of the index that a query looks into."""
    all_negatives: bool = False
    """In training, pair every edit with all questions that are to be left alone, not with its own
    only."""
    hard_negatives: NonNegative = 0
    """In training, pair every edit with so many questions of other edits too, those nearest to
    it."""
