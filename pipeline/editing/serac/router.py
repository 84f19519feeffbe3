"""SERAC's decision for every query: the nearest edit, whether it holds it, and so who answers.

hard: h answers where s > threshold, the edited model elsewhere, each untouched.
soft: p = (1 - s) p_base + s p_h. (The published code adds a small constant inside the logarithm;
here the logarithm of a sum needs none, and probabilities add up to 1.)
"""

from collections.abc import Sequence
from typing import Literal

import torch

from pipeline.editing.serac.editor import SeracEditor
from pipeline.editing.serac.memory import EditMemory, MemoryEntry
from pipeline.editing.serac.scope import similarity
from pipeline.models.routing import Routes

Mode = Literal["hard", "soft"]


class SeracRouter:
    """An editor with a memory.

    Args:
        editor: its trained models.
        memory: the edits; may change at any time.
        mode: see above.
        threshold: of the hard mode.
        max_tokens: tokens in one batch of the classifier.
    """

    def __init__(
        self,
        editor: SeracEditor,
        memory: EditMemory,
        *,
        mode: Mode = "hard",
        threshold: float = 0.5,
        max_tokens: int = 2048,
    ) -> None:
        self.editor, self.memory = editor, memory
        self.mode, self.threshold, self.max_tokens = mode, threshold, max_tokens
        self._edit_ids: dict[MemoryEntry, list[int]] = {}

    def routes(self, prompts: Sequence[str]) -> Routes:
        """Decide for every prompt, each distinct one once.

        Raises:
            InputError: the classifier cannot read a prompt.
        """
        distinct = list(dict.fromkeys(prompts))
        found = self.editor.recall(self.memory, distinct, self.max_tokens)
        shares = similarity(found.distances)
        if self.mode == "hard":
            shares = (shares > self.threshold).to(shares.dtype)
        number = {text: i for i, text in enumerate(distinct)}
        order = [number[text] for text in prompts]
        counterfactual = self.editor.counterfactual
        prefixes = self._prefixes(found.entries, shares)
        return Routes(
            counterfactual.model,
            shares[torch.tensor(order, dtype=torch.long)],
            [prefixes[i] for i in order],
            counterfactual.tokenizer.bos_token_id,
        )

    def _prefixes(
        self, entries: Sequence[MemoryEntry | None], shares: torch.Tensor
    ) -> list[list[int]]:
        """For every query what h reads before it; nothing where h is not asked."""
        asked = [entry if share > 0 else None for entry, share in zip(entries, shares, strict=True)]
        new = [e for e in dict.fromkeys(asked) if e is not None and e not in self._edit_ids]
        if new:
            ids = self.editor.counterfactual.edit_ids(
                [e.prompt for e in new], [e.target for e in new]
            )
            self._edit_ids.update(zip(new, ids, strict=True))
        return [[] if entry is None else self._edit_ids[entry] for entry in asked]
