"""The model card of an edited model."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from pipeline.printable import one_line
from pipeline.results.recorded import RecordedRun
from pipeline.spec import JobSpec, MethodSpec

_BODY = """---
{data}
---

# {base}, edited

{applied} facts of `{base}` were rewritten {where} with {method} (layers {layers}) by
editfleet {version}. Everything else about the model, its licence included, is its own.

- Base model: `{base}`{revision}, fingerprint `{fingerprint}`
- Edited parameters: {edited} of blocks {layers}
- Settings: {settings}

Editing changes more than the facts it aims at. Before use, read the run's summary: paraphrase and
neighbourhood success tell how far edits carry and what they cost elsewhere.
"""

_LOADED = "`pipeline.load_adapter(model, directory)` puts it beside the model"


def write_model_card(
    directory: Path, spec: JobSpec, run: RecordedRun, applied: int, *, merged: bool = False
) -> None:
    """Write README.md with a model card beside an edited model.

    Args:
        directory: the saved model.
        spec: the run's spec.
        run: what its manifest says.
        applied: how many facts were rewritten.
        merged: whether adapters were merged into the weights.
    """
    method, base = spec.method, one_line(run.model.path)
    where, edited = "in its weights", "the MLP down-projections"
    if method.is_adapter:
        edited = "modules merged into the MLPs" if merged else "none; modules beside the MLPs"
        where = "in its weights" if merged else f"by an adapter ({_LOADED})"
    data = ModelCardData(
        tags=["knowledge-editing", method.name],
        base_model=base if "/" in base else None,
        library_name="transformers",
    )
    content = _BODY.format(
        data=data.to_yaml().strip(),
        base=base,
        applied=applied,
        where=where,
        edited=edited,
        method=method.name.upper(),
        layers=", ".join(map(str, method.layers or ())),
        version=run.versions.get("editfleet") or "(from source)",
        revision=f" at revision `{one_line(run.model.revision)}`" if run.model.revision else "",
        fingerprint=run.model.fingerprint,
        settings=_settings(method),
    )
    ModelCard(content).save(directory / "README.md")


def _settings(method: MethodSpec) -> str:
    """What the method was told beside its layers and the value search."""
    said = []
    if method.uses_covariance_weight:
        said.append(f"covariance weight {method.covariance_weight}")
    if method.norm_penalty:
        said.append(f"norm penalty {method.norm_penalty}")
    for name in (method.name, *method.wrappers):
        own = getattr(method, name, None)
        own = ", ".join(f"{k} {v}" for k, v in own.model_dump().items()) if own else ""
        said += [f"{name}: {own}"] if own else []
    if not method.is_adapter:
        value = method.value.model_dump().items()
        said.append("value search " + ", ".join(f"{k} {v}" for k, v in value if v is not None))
    return "; ".join(said)
