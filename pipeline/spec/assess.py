"""Settings of the assessment of facts."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.setting_types import Finite, Positive
from pipeline.spec.part import Part


class AssessSpec(Part):
    """Contrastive knowledge assessment (arXiv 2210.03329): `editfleet assess`, docs/assess.md."""

    object: Literal["target_true", "target_new"] = "target_true"
    """Which of a request's objects is the right one."""
    prompts: Positive = 3
    """Contrastive prompts of a fact, of as many other relations drawn by `seed`."""
    smoothing: Annotated[Finite, Field(ge=0)] = 1e-4
    """Added to both probabilities of the ratio, so that an object that is unlikely behind every
    prompt is not held; 0 is the published code's plain ratio."""
    threshold: Annotated[Finite, Field(gt=0)] = 1.0
    """A fact whose ratio is above this is held, any other is not."""
    read: Literal["object", "first_token"] = "object"
    """The probability of the whole object, or of its first token, as the published code has it."""
