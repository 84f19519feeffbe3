"""The model card of an edited model."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_BODY = """---
{data}
---

# {base}, edited

{applied} facts of `{base}` were rewritten in its weights with {method} (layers {layers}) by
editfleet {version}. Everything else about the model, its licence included, is its own.

- Base model: `{base}`{revision}, fingerprint `{fingerprint}`
- Edited parameters: the MLP down-projections of blocks {layers}
- Settings: covariance weight {covariance_weight}; value search {value}

Editing changes more than the facts it aims at. Before use, read the run's summary: paraphrase and
neighbourhood success tell how far edits carry and what they cost elsewhere.
"""


def write_model_card(directory: Path, manifest: dict[str, Any], applied: int) -> None:
    """Write README.md with a model card beside an edited model.

    Args:
        directory: the saved model.
        manifest: the run's manifest.
        applied: how many facts were rewritten.
    """
    spec, model = manifest["spec"], manifest["model"]
    method = spec["method"]
    data = ModelCardData(
        tags=["knowledge-editing", method["name"]],
        base_model=model["path"] if "/" in model["path"] else None,
        library_name="transformers",
    )
    content = _BODY.format(
        data=data.to_yaml().strip(),
        base=model["path"],
        applied=applied,
        method=method["name"].upper(),
        layers=", ".join(map(str, method["layers"])),
        version=manifest["versions"]["editfleet"] or "(from source)",
        revision=f" at revision `{model['revision']}`" if model["revision"] else "",
        fingerprint=model["fingerprint"],
        covariance_weight=method["covariance_weight"],
        value=", ".join(f"{k} {v}" for k, v in method["value"].items() if v is not None),
    )
    ModelCard(content).save(directory / "README.md")
