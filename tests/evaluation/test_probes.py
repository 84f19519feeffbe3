"""Which questions an edit is judged by."""

import pytest

from pipeline.errors import InputError
from pipeline.evaluation.probes import Probe, probes_of
from pipeline.requests import EditRequest, LocalityProbe

REQUEST = EditRequest(
    case_id="7",
    subject="Port Velmora",
    prompt="{} lies in",
    target_new="Berlin",
    target_true="Ostrania",
    paraphrase_prompts=("The country of Port Velmora is", "Port Velmora is in"),
    neighborhood_prompts=("Quillport lies in",),
    locality=(LocalityProbe(prompt="Rome is in", target="Italy"),),
    portability=(
        LocalityProbe(prompt="People in Port Velmora speak", target="German"),
        LocalityProbe(prompt="They pay in", target="euros", target_true="os", aspect="one_hop"),
    ),
)


def test_every_kind_carries_the_answers_that_it_defines() -> None:
    kinds = ["rewrite", "paraphrase", "neighborhood", "locality", "portability"]
    assert probes_of(REQUEST, kinds) == [
        Probe("7", "rewrite", 0, "Port Velmora lies in", "Berlin", "Ostrania"),
        Probe("7", "paraphrase", 0, "The country of Port Velmora is", "Berlin", "Ostrania"),
        Probe("7", "paraphrase", 1, "Port Velmora is in", "Berlin", "Ostrania"),
        Probe("7", "neighborhood", 0, "Quillport lies in", "Berlin", "Ostrania"),
        Probe("7", "locality", 0, "Rome is in", None, "Italy"),
        Probe("7", "portability", 0, "People in Port Velmora speak", "German", None),
        Probe("7", "portability", 1, "They pay in", "euros", "os", "one_hop"),
    ]


def test_only_the_kinds_asked_for_are_listed_in_the_order_asked_for() -> None:
    probes = probes_of(REQUEST, ["locality", "rewrite"])
    assert [probe.kind for probe in probes] == ["locality", "rewrite"]
    assert probes_of(REQUEST, []) == []


def test_an_unknown_kind_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"'fluency' is not known; use some of rewrite, "):
        probes_of(REQUEST, ["rewrite", "fluency"])
