"""Neurons as rows of attributions/ and neurons/, and back."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from pipeline.editing.knowledge_neurons import Candidate, Candidates, Neuron
from pipeline.methods.knowledge_neurons import Chosen
from pipeline.requests import EditRequest
from pipeline.results.schemas import conform


def attribution_rows(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    found: Sequence[Candidates],
    round: int,
) -> pa.Table:
    """Rows of attributions/ for the candidates of some requests."""
    rows: list[dict[str, Any]] = [
        {
            "round": round,
            "case_id": request.case_id,
            "layer": candidate.neuron.layer,
            "neuron": candidate.neuron.number,
            "attribution": candidate.attribution,
            "agreeing": candidate.agreeing,
            "prompts": candidates.prompts,
            "answer": tokenizer.decode(list(candidates.answer)),
            "answer_ids": list(candidates.answer),
        }
        for request, candidates in zip(requests, found, strict=True)
        for candidate in candidates.neurons
    ]
    return conform("attributions", rows)


def candidates_by_case(table: pa.Table) -> dict[str, Candidates]:
    """case_id -> its candidates, from rows of attributions/."""
    names = ("case_id", "layer", "neuron", "attribution", "agreeing", "prompts", "answer_ids")
    neurons: dict[str, list[Candidate]] = {}
    about: dict[str, tuple[int, tuple[int, ...]]] = {}
    for case_id, layer, number, attribution, agreeing, prompts, answer in zip(
        *(table[name].to_pylist() for name in names), strict=True
    ):
        own = neurons.setdefault(case_id, [])
        own.append(Candidate(Neuron(layer, number), attribution, agreeing))
        about[case_id] = prompts, tuple(answer)
    return {name: Candidates(tuple(own), *about[name]) for name, own in neurons.items()}


def neuron_rows(
    case_ids: Sequence[str], chosen: Sequence[Sequence[Chosen]], round: int
) -> pa.Table:
    """Rows of neurons/ for the neurons that were chosen for some facts."""
    rows: list[dict[str, Any]] = [
        {
            "round": round,
            "case_id": case_id,
            "layer": one.candidate.neuron.layer,
            "neuron": one.candidate.neuron.number,
            "attribution": one.candidate.attribution,
            "shared_by": one.shared_by,
            "is_edited": one.is_edited,
        }
        for case_id, of_fact in zip(case_ids, chosen, strict=True)
        for one in of_fact
    ]
    return conform("neurons", rows)


def edited_neurons(table: pa.Table) -> dict[int, dict[str, tuple[int, ...]]]:
    """Layer -> case_id -> neurons to edit, from rows of neurons/."""
    edited = table.filter(pc.field("is_edited"))
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for case_id, layer, number in zip(
        *(edited[name].to_pylist() for name in ("case_id", "layer", "neuron")), strict=True
    ):
        of_layer = found.setdefault(layer, {})
        of_layer[case_id] = (*of_layer.get(case_id, ()), number)
    return found
