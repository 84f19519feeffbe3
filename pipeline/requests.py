"""Edit requests: the one definition of what an edit is, and what happens when two disagree.

A reader of `pipeline.sources` turns every record of a file into one `RequestRow`, right or wrong,
so that none disappears on the way to `edits/*.parquet`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from pipeline.errors import InputError

OnConflict = Literal["refuse", "last", "first", "error"]
RowStatus = Literal["accepted", "rejected", "conflict"]

# A length constraint makes pydantic check that the string is encodable (no lone surrogates).
Text = Annotated[str, StringConstraints(strict=True, min_length=1)]
OptionalText = Annotated[str, StringConstraints(strict=True, min_length=0)]

STORED_FIELDS = ("case_id", "subject", "prompt", "target_new", "target_true", "relation_id")
"""The fields of a request that a row of `edits/*.parquet` holds."""


class LocalityProbe(BaseModel):
    """A question beside the edit and the answer that is expected to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompt: Text
    """The full prompt, without the answer."""

    target: Text
    """The expected continuation of the prompt."""

    aspect: Text | None = None
    """What is asked about, to group results by: subject_alias, reversed, one_hop, ..."""

    target_true: Text | None = None
    """Of a portability question: the answer before the edit, when it is known."""

    @model_serializer(mode="wrap")
    def _without_unknown_truth(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Requests without it keep the digest that runs begun before the field was there have.
        fields: dict[str, Any] = dump(self)
        if self.target_true is None:
            fields.pop("target_true", None)
        return fields

    @field_validator("target", "target_true")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        return None if value is None else _filled(value, "write the expected answer")

    @field_validator("target_true")
    @classmethod
    def _answers_differ(cls, value: str | None, info: ValidationInfo) -> str | None:
        target = info.data.get("target")
        if value is not None and target is not None and value.strip() == target.strip():
            raise ValueError(f"is the same as target, {quote(value)}; leave it away")
        return value


class EditRequest(BaseModel):
    """One fact to rewrite, with the probes that judge the rewrite.

    All strings must be encodable as UTF-8; types are strict (a number is not taken for a string).

    Raises:
        pydantic.ValidationError: a field is missing, unknown, of the wrong type or without sense.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    case_id: Text
    """Name of the request, unique in a job."""

    subject: Text
    """The entity that the fact is about, as it is written in the prompt."""

    prompt: Text
    """Template with exactly one `{}` where the subject goes; any other brace is literal."""

    target_new: Text
    """The answer that the edited model shall give."""

    target_true: Text | None = None
    """The answer before the edit, when it is known."""

    relation_id: OptionalText | None = None
    """Name of the relation, for grouping results."""

    paraphrase_prompts: tuple[Text, ...] = ()
    """Full prompts that ask for the same fact in other words; the answer is `target_new`."""

    neighborhood_prompts: tuple[Text, ...] = ()
    """Full prompts about other subjects whose answer is, and shall stay, `target_true`."""

    locality: tuple[LocalityProbe, ...] = ()
    """Unrelated questions whose answers shall not change."""

    portability: tuple[LocalityProbe, ...] = ()
    """Questions whose answers follow from the new fact."""

    generation_prompts: tuple[Text, ...] = ()
    """Full prompts to continue freely."""

    @field_validator("locality")
    @classmethod
    def _one_answer(cls, probes: tuple[LocalityProbe, ...]) -> tuple[LocalityProbe, ...]:
        for number, probe in enumerate(probes):
            if probe.target_true is not None:
                raise ValueError(
                    f"[{number}] has target_true, but an edit shall not change what target says; "
                    "leave it away"
                )
        return probes

    @field_validator("case_id", "subject", "target_new", "target_true")
    @classmethod
    def _not_blank(cls, value: str | None, info: ValidationInfo) -> str | None:
        what = {
            "case_id": "give every request a name of its own",
            "subject": "write the subject as it stands in the prompt",
        }.get(str(info.field_name), "write the answer")
        return None if value is None else _filled(value, what)

    @field_validator("prompt")
    @classmethod
    def _one_placeholder(cls, value: str) -> str:
        found = value.count("{}")
        if found == 0:
            raise ValueError("has no {}; write {} where the subject goes")
        if found > 1:
            raise ValueError(f"has {{}} {found} times; write {{}} once, where the subject goes")
        return value

    @field_validator("target_true")
    @classmethod
    def _targets_differ(cls, value: str | None, info: ValidationInfo) -> str | None:
        target_new = info.data.get("target_new")
        if value is not None and target_new is not None and value.strip() == target_new.strip():
            raise ValueError(
                f"is the same as target_new, {quote(value)}; an edit must change the answer"
            )
        return value

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject, 1)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Where the subject stands in `text`: first character and one past the last."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)


class StoredFields(Mapping[str, str | None]):
    """A request's `STORED_FIELDS`, without a copy of them: a job may hold a million requests."""

    __slots__ = ("_request",)

    def __init__(self, request: EditRequest) -> None:
        self._request = request

    def __getitem__(self, name: str) -> str | None:
        if name not in STORED_FIELDS:
            raise KeyError(name)
        value: str | None = getattr(self._request, name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(STORED_FIELDS)

    def __len__(self) -> int:
        return len(STORED_FIELDS)


@dataclass(frozen=True, slots=True)
class RequestRow:
    """What became of one record of a request file."""

    row: int
    """Position of the record in the file, from 0."""

    source: str
    """The file or data set as the user named it."""

    request: EditRequest | None
    """The request; None unless the status is accepted."""

    status: RowStatus
    reason: str = ""
    """Why the row is not accepted, one line a problem; empty when it is."""

    fields: Mapping[str, str | None] = field(default_factory=dict)
    """What could be read of `STORED_FIELDS`; `case_id` is never None."""

    @classmethod
    def accept(cls, row: int, source: str, request: EditRequest) -> "RequestRow":
        """The row of a valid request."""
        return cls(row, source, request, "accepted", "", StoredFields(request))


def resolve_conflicts(rows: Iterable[RequestRow], on_conflict: OnConflict) -> list[RequestRow]:
    """Find accepted rows that contradict or repeat one another and take them out, in linear time.

    Rows with the same subject and prompt conflict when their targets differ (blanks around a
    target do not count). `refuse` gives all of them the status `conflict`; `first` and `last` keep
    one, in the order of `rows`. Rows that agree in the target as well are repetitions, and so are
    rows that share a `case_id` after that: the first stays, the others are rejected.

    Raises:
        InputError: `on_conflict` is `error` and there is a conflict, or it is not known.
    """
    if on_conflict not in get_args(OnConflict):
        raise InputError(
            f"requests.on_conflict: {on_conflict!r} is not known; "
            f"use one of {', '.join(get_args(OnConflict))}"
        )
    result = list(rows)
    for members in _groups(result, "subject", "prompt"):
        if len({str(result[i].fields["target_new"]).strip() for i in members}) > 1:
            _settle_conflict(result, members, on_conflict)
        else:
            _reject_later(result, members, "target_new", "asks for the same edit as row {}")
    for members in _groups(result, "case_id"):
        _reject_later(result, members, "case_id", "{value} is taken by row {}")
    return result


def quote(value: str, longest: int = 60) -> str:
    """The string for use in a message: one line, quoted, cut when it is long."""
    return repr(value if len(value) <= longest else value[: longest - 3] + "...")


def _filled(value: str, what_to_do: str) -> str:
    if not value.strip():
        raise ValueError(f"is blank; {what_to_do}")
    return value


def _groups(rows: Sequence[RequestRow], *names: str) -> list[list[int]]:
    """Indices of accepted rows that agree in the named fields, where there are at least two."""
    first: dict[tuple[str | None, ...], int] = {}
    # Only of those that are not alone is there a list: of a million, few as a rule.
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if row.status == "accepted":
            start = first.setdefault(tuple(row.fields[name] for name in names), index)
            if start != index:
                groups.setdefault(start, [start]).append(index)
    return [groups[start] for start in sorted(groups)]


def _settle_conflict(rows: list[RequestRow], members: list[int], on_conflict: OnConflict) -> None:
    first = rows[members[0]]
    if on_conflict == "error":
        raise InputError(
            f"{first.source}: rows {_listed(rows, members)}, subject "
            f"{quote(str(first.fields['subject']))}: the same prompt has different targets; "
            "keep one of them or set requests.on_conflict to refuse, first or last"
        )
    kept = {"first": members[0], "last": members[-1]}.get(on_conflict)
    # Enough of the others to name any five of them beside the row itself: reasons stay short.
    sample = members[:6]
    for index in members:
        if index == kept:
            continue
        if kept is None:
            others = [other for other in sample if other != index][:5]
            word = "row" if len(members) == 2 else "rows"
            named = f"{word} {_listed(rows, others, total=len(members) - 1)}"
            rest = "keep one of them or set requests.on_conflict to first or last"
        else:
            named = f"row {_listed(rows, [kept])}"
            rest = f"the {on_conflict} one is kept, as requests.on_conflict says"
        what = f"conflicts with {named}: same subject and prompt, different targets; {rest}"
        rows[index] = _out(rows[index], "conflict", "target_new", what)


def _reject_later(rows: list[RequestRow], members: list[int], name: str, what: str) -> None:
    """Reject all members but the first; `what` has a place for the first one's row number."""
    for index in members[1:]:
        value = quote(str(rows[index].fields[name]))
        text = what.format(rows[members[0]].row, value=value)
        rows[index] = _out(rows[index], "rejected", name, f"{text}; remove one of them")


def _listed(rows: Sequence[RequestRow], members: Sequence[int], total: int | None = None) -> str:
    shown = [f"{rows[i].row} ({quote(str(rows[i].fields['target_new']))})" for i in members[:5]]
    hidden = (len(members) if total is None else total) - len(shown)
    return ", ".join(shown) + (f" and {hidden} more" if hidden else "")


def _out(row: RequestRow, status: RowStatus, name: str, what: str) -> RequestRow:
    reason = f"{row.source}: row {row.row}, field {name}: {what}"
    return replace(row, request=None, status=status, reason=reason)
