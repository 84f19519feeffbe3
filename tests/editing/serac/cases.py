"""SERAC editors over tiny models, with weights that were drawn and not trained."""

from functools import cache

import torch

from pipeline.editing.serac.counterfactual import Counterfactual
from pipeline.editing.serac.editor import SeracEditor
from pipeline.editing.serac.encoder import TextEncoder
from pipeline.editing.serac.memory import MemoryEntry
from pipeline.editing.serac.router import Mode, SeracRouter
from pipeline.models.first_blocks import first_blocks
from tests.cases import Case, fresh

FAMILIES = ["gpt2", "llama"]
"""A model without and one with a token that begins every text."""

ENTRIES = [
    MemoryEntry("0", "The mother tongue of Anselm Quillfeather is", "English"),
    MemoryEntry("1", "Zdeněk Kováč plays the", "piano and drums"),
    MemoryEntry("2", "The capital of Ostrania is", "Port Velmora"),
    MemoryEntry("3", "Brightwater Mills", "London"),
]
QUERIES = [
    "Anselm Quillfeather speaks",
    "The capital of Ostrania is",
    "They said that the mother tongue of Marguerite Oduya, who was born in Rome, is",
    "Zdeněk Kováč plays the",
    "The",
]


SCALES = {"gpt2": 0.5, "llama": 0.3, "t5": 0.9, "t5_gated": 1.0}
"""With these, two of the queries are in scope of an edit and three are not."""


@cache
def setting(family: str, dtype: torch.dtype = torch.float64) -> tuple[Case, SeracEditor]:
    """A model, and an editor whose h is another random model of the family."""
    case = fresh(family, dtype)
    encoder = TextEncoder.from_first_blocks(case.model, case.tokenizer, blocks=2, size=8, seed=1)
    encoder.trunk.to(dtype)
    h = first_blocks(case.model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in h.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    counterfactual = Counterfactual.of(h, case.tokenizer, case.editable.vocab_size)
    return case, SeracEditor(encoder, counterfactual, scale=SCALES[family])


def router(
    editor: SeracEditor, entries: list[MemoryEntry] = ENTRIES, mode: Mode = "hard"
) -> SeracRouter:
    memory = editor.new_memory()
    memory.add(entries, editor.embed_edits(entries, 200))
    return SeracRouter(editor, memory, mode=mode, max_tokens=200)
