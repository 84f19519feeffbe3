"""Likelihoods of answers behind prompts, for many probes at once.

Prompts are shared between their answers (see `pipeline.evaluation.packing`), rows of like length
are batched, and only positions that predict an answer are projected onto the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.errors import InputError
from pipeline.evaluation.metrics import Score, exact, is_success
from pipeline.evaluation.packing import (
    EncodedProbes,
    Ints,
    Layout,
    as_ints,
    encode_probes,
    length_batches,
)
from pipeline.evaluation.probes import Probe
from pipeline.models.editable import EditableModel
from pipeline.models.routing import Routes, mixed

LOGIT_BYTES = 32 << 20
"""Memory for logits at one time; the vocabulary projection is cut to fit."""


def score(
    model: EditableModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    max_tokens: int,
) -> list[Score]:
    """Score probes, in their order.

    Each distinct pair of a prompt and an answer is scored once. The answer's ids follow the
    prompt's ids; text is never joined and segmented again. (An encoder-decoder model's answers are
    texts of their own, and end.) Where the model has a router, prompts are answered as it sends
    them. Logits are float32 (float64 for a float64 model).

    Args:
        max_tokens: tokens of a batch at most, padding counted; a longer row is a batch of its own.

    Raises:
        InputError: a probe is longer than the model has positions for, or its prompt or an answer
            has no token.
    """
    if not probes:
        return []
    encoded = encode_probes(tokenizer, probes, model.answers)
    _check_fit(model.max_positions, probes, encoded)
    layout = Layout(encoded)
    nll, right, said = _run(model, layout, max_tokens)
    if model.router is not None:
        routes = model.router.routes(list(dict.fromkeys(probe.prompt for probe in probes)))
        _put_routed(model, encoded, routes, max_tokens, (nll, right, said))
    return [
        _judge(probe, pair_new, pair_true, nll, right, said)
        for probe, pair_new, pair_true in zip(probes, encoded.new, encoded.true, strict=True)
    ]


def probe_lengths(tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]) -> list[int]:
    """Positions that each probe needs: its prompt's tokens and its longer answer's but the last.

    Raises:
        InputError: a prompt or an answer has no token.
    """
    return encode_probes(tokenizer, probes).lengths if probes else []


def _check_fit(limit: int | None, probes: Sequence[Probe], encoded: EncodedProbes) -> None:
    if limit is None:
        return
    for probe, length in zip(probes, encoded.lengths, strict=True):
        if length > limit:
            raise InputError(
                f"{probe.name}: needs {length} tokens with its answer, the model has {limit} "
                "positions; shorten the prompt or leave it out"
            )


@torch.inference_mode()
def _run(
    model: EditableModel, layout: Layout, max_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], list[Ints]]:
    """Of each pair: mean NLL, whether all its tokens are the model's first choice, that choice."""
    order, nlls, rights, choices = [], [], [], []
    for batch in length_batches(layout.lengths, max_tokens):
        chosen, hidden, slots = _states(model, layout, batch)
        nll, right, choice = project(model, hidden, slots, layout.labels[chosen])
        order.append(layout.pairs[chosen])
        nlls.append(nll)
        rights.append(right)
        choices.append(choice)
    # One transfer at the end: a transfer a batch would make a GPU wait.
    return _of_pairs(
        np.concatenate(order), torch.cat(nlls), torch.cat(rights), torch.cat(choices), layout
    )


def _states(
    model: EditableModel, layout: Layout, batch: Sequence[int]
) -> tuple[Ints, Tensor, Ints]:
    """Of some rows: the answer tokens, normed states (n, d), and which of them predicts each."""
    rows = as_ints(batch)
    ids, positions, segments = (
        torch.from_numpy(part).to(model.input_device) for part in layout.tokens(rows)
    )
    parent = segments.clamp(max=0)  # every answer continues segment 0; padding stays -1
    chosen, of_row = layout.answer_tokens(rows)
    # A position that predicts tokens of several answers is read and projected once.
    read, slots = np.unique(of_row * ids.shape[1] + layout.columns[chosen], return_inverse=True)
    hidden = model.final(
        None,
        first=0,
        masks=model.masks(
            positions, torch.stack([segments, parent], dim=-1), sources=layout.sources_of(batch)
        ),
        position_ids=positions,
        input_ids=ids,
        read=torch.from_numpy(read).to(model.output_device),
    )
    return chosen, hidden, slots


def _of_pairs(
    pairs: Ints, nll: Tensor, right: Tensor, choice: Tensor, layout: Layout
) -> tuple[NDArray[np.float64], NDArray[np.bool_], list[Ints]]:
    """Of each pair what `_run` gives, from its answer tokens."""
    counts = np.bincount(pairs, minlength=layout.num_pairs)
    total = np.bincount(pairs, weights=nll.double().cpu().numpy(), minlength=layout.num_pairs)
    misses = np.bincount(pairs, weights=~right.cpu().numpy(), minlength=layout.num_pairs)
    said = choice.cpu().numpy()[np.argsort(pairs, kind="stable")]
    return total / counts, misses == 0, np.split(said, np.cumsum(counts)[:-1])


def _put_routed(
    model: EditableModel,
    encoded: EncodedProbes,
    routes: Routes,
    max_tokens: int,
    found: tuple[NDArray[np.float64], NDArray[np.bool_], list[Ints]],
) -> None:
    """Put the joint scores of both models in the place of those that the first has given alone.

    Args:
        model: the first model.
        encoded: the probes.
        routes: of the distinct prompts.
        max_tokens: tokens of a batch at most.
        found: what `_run` gave; scores of prompts in which the second model has no share stay.
    """
    taken = routes.taken
    first = np.cumsum([0, *(len(answers) for answers in encoded.answers)])
    alone = [number for number in taken if routes.shares[number] == 1]
    shared = [number for number in taken if routes.shares[number] < 1]
    for numbers, run in ((alone, _run_second), (shared, _run_both)):
        if not numbers:
            continue
        nll, right, said = run(model, encoded, routes, numbers, max_tokens)
        pairs = [pair for n in numbers for pair in range(first[n], first[n + 1])]
        found[0][pairs], found[1][pairs] = nll, right
        for pair, choice in zip(pairs, said, strict=True):
            found[2][pair] = choice


def _run_second(
    _model: EditableModel,
    encoded: EncodedProbes,
    routes: Routes,
    numbers: Sequence[int],
    max_tokens: int,
) -> tuple[NDArray[np.float64], NDArray[np.bool_], list[Ints]]:
    return _run(routes.model, Layout(_behind(encoded, routes, numbers)), max_tokens)


@torch.inference_mode()
def _run_both(
    model: EditableModel,
    encoded: EncodedProbes,
    routes: Routes,
    numbers: Sequence[int],
    max_tokens: int,
) -> tuple[NDArray[np.float64], NDArray[np.bool_], list[Ints]]:
    """As `_run`, of the joint distribution; both models' answer tokens stand in one order."""
    own = replace(
        encoded,
        prompts=[encoded.prompts[n] for n in numbers],
        answers=[encoded.answers[n] for n in numbers],
    )
    layouts = Layout(own), Layout(_behind(encoded, routes, numbers))
    states = [
        _states_in_order(one, layout, max_tokens)
        for one, layout in zip((model, routes.model), layouts, strict=True)
    ]
    layout = layouts[0]
    prompt_of = np.repeat(numbers, [len(answers) for answers in own.answers])
    shares = routes.shares[torch.from_numpy(prompt_of[layout.pairs])].to(model.output_device)
    labels = torch.from_numpy(layout.labels).to(model.output_device)
    step = max(1, LOGIT_BYTES // (2 * model.vocab_size * torch.float64.itemsize))
    nll, right, choice = [], [], []
    for part in torch.arange(len(labels)).split(step):
        joint = mixed(
            model.logits(states[0][part]),
            routes.model.logits(states[1][part]).to(model.output_device),
            shares[part],
        )
        likely = -joint.gather(1, labels[part, None])[:, 0]
        nll.append(likely)
        choice.append(joint.argmax(-1))
        right.append((choice[-1] == labels[part]) & likely.isfinite())
    return _of_pairs(layout.pairs, torch.cat(nll), torch.cat(right), torch.cat(choice), layout)


def _states_in_order(model: EditableModel, layout: Layout, max_tokens: int) -> Tensor:
    """The normed state that predicts each answer token, (answer tokens, d)."""
    order, found = [], []
    for batch in length_batches(layout.lengths, max_tokens):
        chosen, hidden, slots = _states(model, layout, batch)
        order.append(chosen)
        found.append(hidden[torch.from_numpy(slots).to(hidden.device)])
    return torch.cat(found)[
        torch.from_numpy(np.argsort(np.concatenate(order))).to(model.output_device)
    ]


def _behind(encoded: EncodedProbes, routes: Routes, numbers: Sequence[int]) -> EncodedProbes:
    """Some prompts as the second model reads them, with the same answers.

    Raises:
        InputError: the second model has no positions for one.
    """
    prompts = [routes.row(number, encoded.prompts[number]) for number in numbers]
    answers = [encoded.answers[number] for number in numbers]
    for prompt, of_prompt in zip(prompts, answers, strict=True):
        routes.require_room(len(prompt) + max(len(answer) for answer in of_prompt) - 1)
    return replace(encoded, prompts=prompts, answers=answers)


def project(
    model: EditableModel, hidden: Tensor, slots: Ints, labels: Ints
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL of each answer token, whether it is the argmax, and the argmax, each (answer tokens,).

    Args:
        hidden: (states, d) normed hidden states.
        slots: (answer tokens,) the state that predicts each.
        labels: (answer tokens,) ids.
    """
    order = np.argsort(slots, kind="stable")
    width = torch.float64 if model.dtype == torch.float64 else torch.float32
    step = max(1, LOGIT_BYTES // (model.vocab_size * width.itemsize))
    bounds = np.searchsorted(slots[order], np.arange(0, len(hidden) + step, step))
    nll = torch.empty(len(slots), dtype=width, device=hidden.device)
    right = torch.empty(len(slots), dtype=torch.bool, device=hidden.device)
    choice = torch.empty(len(slots), dtype=torch.int64, device=hidden.device)
    for number, start in enumerate(range(0, len(hidden), step)):
        tokens = order[bounds[number] : bounds[number + 1]]
        logits = model.logits(hidden[start : start + step])
        slot = torch.from_numpy(slots[tokens] - start).to(hidden.device)
        label = torch.from_numpy(labels[tokens]).to(hidden.device)
        where = torch.from_numpy(tokens).to(hidden.device)
        likely = logits.logsumexp(-1)[slot] - logits[slot, label]
        nll[where] = likely
        # argmax finds something among logits that are not numbers, too.
        choice[where] = logits.argmax(-1)[slot]
        right[where] = (choice[where] == label) & likely.isfinite()
    return nll, right, choice


def _judge(
    probe: Probe,
    pair_new: int | None,
    pair_true: int | None,
    nll: NDArray[np.float64],
    right: NDArray[np.bool_],
    said: list[Ints],
) -> Score:
    nll_new = None if pair_new is None else float(nll[pair_new])
    nll_true = None if pair_true is None else float(nll[pair_true])
    exact_new = None if pair_new is None else bool(right[pair_new])
    exact_true = None if pair_true is None else bool(right[pair_true])
    return Score(
        nll_new,
        nll_true,
        is_success(probe.kind, nll_new, nll_true),
        exact(probe.kind, exact_new, exact_true),
        _predicted(probe, pair_true, nll, said),
    )


def _predicted(
    probe: Probe, pair: int | None, nll: NDArray[np.float64], said: list[Ints]
) -> tuple[int, ...] | None:
    """What a question beside the edit is answered with; None where logits are no numbers."""
    if probe.kind not in ("locality", "neighborhood") or pair is None or not np.isfinite(nll[pair]):
        return None
    return tuple(said[pair].tolist())
