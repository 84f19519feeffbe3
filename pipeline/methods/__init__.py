"""Editing methods: each says how the parts of the editing core combine."""

from pipeline.errors import InputError
from pipeline.methods.adapter import AdapterMethod, Made, Scene, join, seed_of
from pipeline.methods.alphaedit import AlphaEdit
from pipeline.methods.base import Method
from pipeline.methods.calinet import CaliNet
from pipeline.methods.closed_form import ClosedForm
from pipeline.methods.emmet import Emmet
from pipeline.methods.fine_tuning import FineTuning
from pipeline.methods.gradient import GradientMethod
from pipeline.methods.hypernetworks import TRAINED
from pipeline.methods.ke_training import KnowledgeEditorTraining
from pipeline.methods.knowledge_neurons import KnowledgeNeurons
from pipeline.methods.malmen_training import MalmenTraining
from pipeline.methods.memit import Memit
from pipeline.methods.memit_accumulated import MemitAccumulated
from pipeline.methods.mend_training import MendTraining
from pipeline.methods.merge import first_of_each_value
from pipeline.methods.nas import mean_length
from pipeline.methods.pmet import Pmet
from pipeline.methods.rome import Rome
from pipeline.methods.serac import MemoryMethod, Serac
from pipeline.methods.serac_training import SeracTraining
from pipeline.methods.settings import resolve_settings, value_settings
from pipeline.methods.t_patcher import TPatcher
from pipeline.methods.trainable import Trainable
from pipeline.methods.ultraedit import UltraEdit
from pipeline.spec import JobSpec, MethodSpec

CLOSED_FORM: dict[str, type[ClosedForm]] = {
    "memit": Memit,
    "memit_accumulated": MemitAccumulated,
    "emmet": Emmet,
    "pmet": Pmet,
    "alphaedit": AlphaEdit,
    "rome": Rome,
}
GRADIENT: dict[str, type[GradientMethod]] = {
    "ft": FineTuning,
    "ultraedit": UltraEdit,
    "calinet": CaliNet,
    **TRAINED,
}
LOCATING: dict[str, type[KnowledgeNeurons]] = {"kn": KnowledgeNeurons}
ADAPTER: dict[str, type[AdapterMethod]] = {"t_patcher": TPatcher}

TRAINABLE: dict[str, type[Trainable]] = {
    "mend": MendTraining,
    "malmen": MalmenTraining,
    "ke": KnowledgeEditorTraining,
    "serac": SeracTraining,
}
"""Methods whose editor is trained before it edits."""

MEMORY: dict[str, type[MemoryMethod]] = {"serac": Serac}

UPDATE_WRAPPERS = frozenset({"rect", "prune"})
"""Wrappers that change updates after they are solved for (`Method.wrap`)."""

__all__ = [
    "ADAPTER",
    "CLOSED_FORM",
    "GRADIENT",
    "LOCATING",
    "MEMORY",
    "TRAINABLE",
    "UPDATE_WRAPPERS",
    "AdapterMethod",
    "ClosedForm",
    "GradientMethod",
    "KnowledgeNeurons",
    "Made",
    "MemoryMethod",
    "Method",
    "Scene",
    "build_adapter_method",
    "build_closed_form",
    "build_gradient_method",
    "build_locating_method",
    "build_memory_method",
    "build_method",
    "build_trainable",
    "check_batch",
    "first_of_each_value",
    "join",
    "mean_length",
    "resolve_settings",
    "resolve_training",
    "seed_of",
    "value_settings",
    "wraps_updates",
]


def build_method(spec: MethodSpec) -> Method:
    """Make the method that a resolved spec names."""
    if spec.is_locating:
        return build_locating_method(spec)
    if spec.is_piecewise:
        return build_adapter_method(spec)
    if spec.is_memory:
        return build_memory_method(spec)
    return build_closed_form(spec) if spec.is_closed_form else build_gradient_method(spec)


def build_memory_method(spec: MethodSpec) -> MemoryMethod:
    """The same for one that keeps edits in a memory."""
    return MEMORY[spec.name](spec)


def build_closed_form(spec: MethodSpec) -> ClosedForm:
    """The same for one that searches values (`MethodSpec.is_closed_form`)."""
    return CLOSED_FORM[spec.name](spec)


def build_gradient_method(spec: MethodSpec) -> GradientMethod:
    """The same for one that works on gradients."""
    return GRADIENT[spec.name](spec)


def build_locating_method(spec: MethodSpec) -> KnowledgeNeurons:
    """The same for one that looks for neurons (`MethodSpec.is_locating`)."""
    return LOCATING[spec.name](spec)


def build_trainable(spec: JobSpec) -> Trainable:
    """Make what the training of an editor is of, from a resolved spec."""
    return TRAINABLE[spec.method.name](spec)


def resolve_training(spec: JobSpec) -> JobSpec:
    """The spec with every setting of its training decided.

    Raises:
        InputError: the method has nothing to train.
    """
    if spec.method.name not in TRAINABLE:
        raise InputError(
            f"method.name: {spec.method.name} has no editor to train; take {' or '.join(TRAINABLE)}"
        )
    assert spec.train is not None
    published = TRAINABLE[spec.method.name].published
    given = spec.train.model_dump()
    open_ = {name: value for name, value in published.items() if given[name] is None}
    return spec.model_copy(update={"train": spec.train.model_copy(update=open_)})


def build_adapter_method(spec: MethodSpec) -> AdapterMethod:
    """The same for one that makes adapters piece by piece (`MethodSpec.is_piecewise`)."""
    return ADAPTER[spec.name](spec)


def wraps_updates(spec: MethodSpec) -> bool:
    """Whether a method changes updates after they are solved for (`Method.wrap`)."""
    return not UPDATE_WRAPPERS.isdisjoint(spec.wrappers)


def check_batch(spec: MethodSpec, num_edits: int) -> None:
    """Refuse a batch that is larger than the method takes.

    Raises:
        InputError: it is, or the method lacks an editor.
    """
    if spec.trained is not None and spec.trained.editor is None:
        raise InputError(
            f"method.{spec.name}.editor: {spec.name} edits with an editor that is trained first;"
            " train one with `editfleet train SPEC` and name its directory (RUN/editor)"
        )
    if spec.name in ("rome", "ke") and num_edits > 1:
        raise InputError(
            f"method.name: {spec.name} writes one edit at a time, and there are {num_edits}"
            " requests; take another method, requests.limit: 1, or a sequential study of one edit a"
            " round"
        )
