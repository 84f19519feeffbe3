"""The questions that judge an edit: prompts, each with the answers to measure behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pipeline.errors import InputError
from pipeline.requests import EditRequest
from pipeline.spec import Probe as Kind


@dataclass(frozen=True)
class Probe:
    """One prompt and the answers to score behind it, two or one; a generation probe has none.

    Attributes:
        case_id: the edit that the probe belongs to.
        kind: what the probe asks for, see `probes_of`.
        index: number of the probe among those of its kind in its edit, from 0.
        prompt: full text without the answer.
        target_new: the answer that the edit brings; None where no such answer is defined.
        target_true: the answer that is right without the edit; None where it is not known.
        aspect: what a locality or portability probe asks about; None where the request is silent.
    """

    case_id: str
    kind: Kind
    index: int
    prompt: str
    target_new: str | None
    target_true: str | None
    aspect: str | None = None

    @property
    def name(self) -> str:
        """How messages call the probe."""
        return f"case {self.case_id!r}, {self.kind} probe {self.index}"


def probes_of(request: EditRequest, kinds: Sequence[str]) -> list[Probe]:
    """List the probes of an edit, kind by kind in the order asked for.

    rewrite (the edited prompt itself), paraphrase and neighborhood probes carry both of the
    request's targets (`target_true` may be unknown). A locality probe carries only the answer that
    shall stay, as `target_true`; a portability probe the answer that follows from the new fact, as
    `target_new`, and that of before where the request gives it. With one side, there is a
    likelihood and an exact match and no success.
    A generation probe is only continued.

    Raises:
        InputError: a kind is not known.
    """
    found: list[Probe] = []
    for kind in kinds:
        for index, (prompt, new, true, aspect) in enumerate(_questions(request, kind)):
            # `_questions` refused the kinds that are not in Kind.
            found.append(Probe(request.case_id, kind, index, prompt, new, true, aspect))  # type: ignore[arg-type]
    return found


_Question = tuple[str, str | None, str | None, str | None]


def _questions(request: EditRequest, kind: str) -> list[_Question]:
    new, true = request.target_new, request.target_true
    match kind:
        case "rewrite":
            return [(request.text, new, true, None)]
        case "paraphrase":
            return [(prompt, new, true, None) for prompt in request.paraphrase_prompts]
        case "neighborhood":
            return [(prompt, new, true, None) for prompt in request.neighborhood_prompts]
        case "locality":
            return [(probe.prompt, None, probe.target, probe.aspect) for probe in request.locality]
        case "portability":
            return [
                (probe.prompt, probe.target, probe.target_true, probe.aspect)
                for probe in request.portability
            ]
        case "generation":
            return [(prompt, None, None, None) for prompt in request.generation_prompts]
    raise InputError(
        f"evaluation.probes: {kind!r} is not known; use some of {', '.join(get_args(Kind))}"
    )
