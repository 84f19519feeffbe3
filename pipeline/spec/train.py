"""Settings of the training of an editor."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.setting_types import Finite, NonNegative, Place, Positive, Text
from pipeline.spec.part import Part


class TrainSpec(Part):
    """Training an editor (`editfleet train`, docs/training.md): which one is `method.name`. What is
    null is what was published for that editor."""

    steps: Positive = 1000
    """Steps of the optimiser at most."""
    batch_size: Positive | None = None
    """Edits that are made together; the editor learns to make as many at once."""
    accumulate: Positive | None = None
    """Such batches whose gradients one step is the mean of."""
    learning_rate: Annotated[Finite, Field(gt=0)] | None = None
    """The optimiser's learning rate."""
    warm_up: NonNegative | None = None
    """Steps over which the learning rate grows from nothing."""
    edit_weight: Annotated[Finite, Field(ge=0)] | None = None
    """Weight in the loss of what the edits are to bring: minus the log-likelihood of their answers
    behind paraphrases, nats a token."""
    locality_weight: Annotated[Finite, Field(ge=0)] | None = None
    """Weight in the loss of what they are to leave alone: the KL divergence of the edited model
    from the unedited one on other texts, nats a token."""
    own_prompt_share: Annotated[Finite, Field(ge=0, le=1)] | None = None
    """Share of the examples that are asked by the request's own prompt; the others are asked by one
    of its paraphrases. Null is a half for `serac`, none for the others."""
    draw_targets: Literal["none", "new", "all"] | None = None
    """Give an edit another answer of its relation, drawn anew each time, so that few facts make
    many edits, and what is trained learns to read answers, not to remember them: of the new answers
    of all edits, or of their old ones, too. Null is all for `serac`, none for the others."""
    max_gradient_norm: Annotated[Finite, Field(gt=0)] | None = None
    """A step's gradient is scaled down to this norm."""
    validation: Annotated[Finite, Field(ge=0, le=0.5)] = 0.1
    """Share of the requests, the last ones in the file, that are kept to measure on."""
    validate_every: Positive = 100
    """Measure on them after every so many steps, and after the last one; the editor that is saved
    is the best one then."""
    patience: Positive | None = None
    """End after so many of these measurements in a row without a better one; null never does."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints, from which an interrupted training goes on."""
    corpus: Place | None = None
    """Texts to leave alone, in any form that `covariance.corpus` takes; null takes the requests'
    own locality questions and neighbours."""
    field: Text = "text"
    """Column with the text, where the corpus has columns."""
    texts: Positive = 1000
    """Texts of the corpus to use, drawn by `seed`."""
    max_tokens: Positive = 64
    """Cut every text to this many tokens."""
