"""Editing methods: each says how the parts of the editing core combine."""

from pipeline.errors import InputError
from pipeline.methods.alphaedit import AlphaEdit
from pipeline.methods.base import Method
from pipeline.methods.closed_form import ClosedForm
from pipeline.methods.emmet import Emmet
from pipeline.methods.fine_tuning import FineTuning
from pipeline.methods.gradient import GradientMethod
from pipeline.methods.knowledge_neurons import KnowledgeNeurons
from pipeline.methods.memit import Memit
from pipeline.methods.memit_accumulated import MemitAccumulated
from pipeline.methods.merge import first_of_each_value
from pipeline.methods.nas import mean_length
from pipeline.methods.pmet import Pmet
from pipeline.methods.rome import Rome
from pipeline.methods.settings import resolve_settings, value_settings
from pipeline.methods.ultraedit import UltraEdit
from pipeline.spec import MethodSpec

CLOSED_FORM: dict[str, type[ClosedForm]] = {
    "memit": Memit,
    "memit_accumulated": MemitAccumulated,
    "emmet": Emmet,
    "pmet": Pmet,
    "alphaedit": AlphaEdit,
    "rome": Rome,
}
GRADIENT: dict[str, type[GradientMethod]] = {"ft": FineTuning, "ultraedit": UltraEdit}
LOCATING: dict[str, type[KnowledgeNeurons]] = {"kn": KnowledgeNeurons}

UPDATE_WRAPPERS = frozenset({"rect", "prune"})
"""Wrappers that change updates after they are solved for (`Method.wrap`)."""

__all__ = [
    "CLOSED_FORM",
    "GRADIENT",
    "LOCATING",
    "UPDATE_WRAPPERS",
    "ClosedForm",
    "GradientMethod",
    "KnowledgeNeurons",
    "Method",
    "build_closed_form",
    "build_gradient_method",
    "build_locating_method",
    "build_method",
    "check_batch",
    "first_of_each_value",
    "mean_length",
    "resolve_settings",
    "value_settings",
    "wraps_updates",
]


def build_method(spec: MethodSpec) -> Method:
    """Make the method that a resolved spec names."""
    if spec.is_locating:
        return build_locating_method(spec)
    return build_closed_form(spec) if spec.is_closed_form else build_gradient_method(spec)


def build_closed_form(spec: MethodSpec) -> ClosedForm:
    """The same for one that searches values (`MethodSpec.is_closed_form`)."""
    return CLOSED_FORM[spec.name](spec)


def build_gradient_method(spec: MethodSpec) -> GradientMethod:
    """The same for one that works on gradients."""
    return GRADIENT[spec.name](spec)


def build_locating_method(spec: MethodSpec) -> KnowledgeNeurons:
    """The same for one that looks for neurons (`MethodSpec.is_locating`)."""
    return LOCATING[spec.name](spec)


def wraps_updates(spec: MethodSpec) -> bool:
    """Whether a method changes updates after they are solved for (`Method.wrap`)."""
    return not UPDATE_WRAPPERS.isdisjoint(spec.wrappers)


def check_batch(spec: MethodSpec, num_edits: int) -> None:
    """Refuse a batch that is larger than the method takes.

    Raises:
        InputError: it is.
    """
    if spec.name == "rome" and num_edits > 1:
        raise InputError(
            f"method.name: rome writes one edit at a time, and there are {num_edits} requests;"
            " take another method, requests.limit: 1, or a sequential study of one edit a round"
        )
