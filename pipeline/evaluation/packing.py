"""Probes as rows of token ids in which a prompt stands once, however many answers are asked of it.

    row = prompt ++ answer_1[:-1] ++ answer_2[:-1] ++ ...

Every answer is a segment of its own that continues the prompt: it sees the prompt and itself, and
its positions start where the prompt ends. An answer of one token adds nothing to the row.

Of an encoder-decoder model the row is the decoder's: its start token stands in the prompt's place,
and the prompt is the row's source, which the encoder reads once for all answers of the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.errors import InputError
from pipeline.evaluation.probes import Probe
from pipeline.models.answers import CONTINUED, AnswerForm
from pipeline.prompts import encode_targets, token_ids

ANSWER_TOKENS = 128
"""A row takes answers up to this many tokens (or the prompt's length if that is more), then the
prompt is put into another row: attention costs the square of a row's length."""

Ints = NDArray[np.int64]


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Cut rows, shortest first, into batches of at most `max_tokens` tokens, padding counted.

    A row longer than `max_tokens` makes a batch of its own. Yields indices of rows.
    """
    order = np.argsort(np.asarray(lengths), kind="stable").tolist()
    batch: list[int] = []
    for i in order:
        if batch and lengths[i] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True)
class EncodedProbes:
    """Probes as token ids, each prompt and each (prompt, answer) pair once.

    Attributes:
        prompts: ids of the distinct prompts.
        answers: for each prompt the ids of its distinct answers; numbered through, these are pairs.
        new: for each probe the number of its pair with `target_new`, None without one.
        true: the same with `target_true`.
        lengths: positions that each probe needs, the encoder's included.
        start: the decoder's first token, where an encoder reads the prompts.
    """

    prompts: list[list[int]]
    answers: list[list[tuple[int, ...]]]
    new: list[int | None]
    true: list[int | None]
    lengths: list[int]
    start: int | None = None


def encode_probes(
    tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], answers: AnswerForm = CONTINUED
) -> EncodedProbes:
    """Tokenise probes, prompts and answers in one batch each.

    Raises:
        InputError: a prompt or an answer has no token.
    """
    texts = list(dict.fromkeys(probe.prompt for probe in probes))
    number = {text: i for i, text in enumerate(texts)}
    prompts = token_ids(tokenizer, texts)
    targets = dict.fromkeys(
        target
        for probe in probes
        for target in (probe.target_new, probe.target_true)
        if target is not None
    )
    ids_of = dict(zip(targets, encode_targets(tokenizer, list(targets), answers), strict=True))
    slots: list[dict[tuple[int, ...], int]] = [{} for _ in texts]
    places: list[tuple[int, int | None, int | None]] = []
    lengths: list[int] = []
    for probe in probes:
        i = number[probe.prompt]
        if not prompts[i]:
            raise InputError(f"{probe.name}: prompt {probe.prompt!r} has no token")
        new, true = (
            None if target is None else ids_of[target]
            for target in (probe.target_new, probe.target_true)
        )
        places.append(
            (
                i,
                None if new is None else slots[i].setdefault(new, len(slots[i])),
                None if true is None else slots[i].setdefault(true, len(slots[i])),
            )
        )
        lengths.append(len(prompts[i]) + max(len(new or ()), len(true or ())) - 1)
    first = np.cumsum([0, *(len(of_prompt) for of_prompt in slots)]).tolist()
    return EncodedProbes(
        prompts,
        [list(of_prompt) for of_prompt in slots],
        [None if new is None else first[i] + new for i, new, _ in places],
        [None if true is None else first[i] + true for i, _, true in places],
        lengths,
        answers.start,
    )


class Layout:
    """The rows of all prompts, one behind the other, and where each answer token is predicted.

    Attributes:
        ids, positions, segments: (tokens,) of all rows' tokens; segment 0 is the prompt.
        starts: (rows + 1,) where each row begins.
        columns, labels, pairs: (answer tokens,) the index in its row of the token that predicts it,
            the answer token's id, and the pair that it belongs to.
        label_starts: (rows + 1,) where each row's answer tokens begin.
        sources: what an encoder reads of each row; None where there is no encoder.
    """

    def __init__(self, encoded: EncodedProbes) -> None:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        pairs: list[int] = []
        starts, label_starts = [0], [0]
        pair = 0
        sources: list[list[int]] = []
        for text, answers in zip(encoded.prompts, encoded.answers, strict=True):
            prompt = text if encoded.start is None else [encoded.start]
            size = len(prompt)
            for group in _groups(answers, max(ANSWER_TOKENS, size)):
                row = len(ids)
                ids += prompt
                positions += range(size)
                segments += [0] * size
                for segment, answer in enumerate(group, start=1):
                    inner = len(answer) - 1
                    start = len(ids) - row
                    columns += (size - 1, *range(start, start + inner))
                    labels += answer
                    pairs += [pair] * len(answer)
                    ids += answer[:-1]
                    positions += range(size, size + inner)
                    segments += [segment] * inner
                    pair += 1
                sources.append(text)
                starts.append(len(ids))
                label_starts.append(len(labels))
        self.num_pairs = pair
        self.sources = None if encoded.start is None else sources
        self.ids, self.positions = as_ints(ids), as_ints(positions)
        self.segments = as_ints(segments)
        self.columns, self.labels, self.pairs = as_ints(columns), as_ints(labels), as_ints(pairs)
        self.starts, self.label_starts = as_ints(starts), as_ints(label_starts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, its source's included."""
        own: list[int] = np.diff(self.starts).tolist()
        if self.sources is None:
            return own
        return [length + len(source) for length, source in zip(own, self.sources, strict=True)]

    def sources_of(self, rows: Sequence[int]) -> list[list[int]] | None:
        """What an encoder reads of some rows."""
        return None if self.sources is None else [self.sources[row] for row in rows]

    def tokens(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Ids, positions and segments of some rows, (rows, longest) each; segment -1 at padding."""
        starts, ends = self.starts[rows, None], self.starts[rows + 1, None]
        source = starts + np.arange((ends - starts).max())
        real = source < ends
        source = np.where(real, source, 0)
        return (
            np.where(real, self.ids[source], 0),
            np.where(real, self.positions[source], 0),
            np.where(real, self.segments[source], -1),
        )

    def answer_tokens(self, rows: Ints) -> tuple[Ints, Ints]:
        """Indices into `labels` of the rows' answer tokens, and which of the rows each is of."""
        starts, counts = self.label_starts[rows], np.diff(self.label_starts)[rows]
        of_row = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(of_row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return starts[of_row] + within, of_row


def _groups(answers: list[tuple[int, ...]], limit: int) -> Iterator[list[tuple[int, ...]]]:
    """Cut a prompt's answers so that each group adds at most `limit` tokens to its row."""
    group: list[tuple[int, ...]] = []
    used = 0
    for answer in answers:
        inner = len(answer) - 1
        if group and used + inner > limit:
            yield group
            group, used = [], 0
        group.append(answer)
        used += inner
    yield group


def as_ints(values: Sequence[int]) -> Ints:
    """Integers as an int64 array, an empty one included."""
    return np.array(values, dtype=np.int64)
