"""The counterfactual model h: a small LM that answers a query given an edit (arXiv 2206.06520).

Its input is "x_e y_e " + x. It has the edited model's tokenizer; the ids of the three pieces stand
side by side, and text is never joined and segmented again. Of an encoder-decoder model h is one
too: its encoder reads the three pieces, each with its end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import InputError
from pipeline.models.editable import EditableModel
from pipeline.models.encoder_decoder import editable_model
from pipeline.prompts import encode_targets, token_ids


@dataclass(frozen=True)
class Counterfactual:
    """h, with the tokenizer that it shares with the edited model.

    Attributes:
        model: h.
        tokenizer: the edited model's.
    """

    model: EditableModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> "Counterfactual":
        """Take a language model as h.

        Args:
            vocab_size: the edited model's, whose logits h's stand in for.

        Raises:
            InputError: h has another vocabulary.
        """
        editable = editable_model(model)
        if editable.vocab_size != vocab_size:
            raise InputError(
                f"the counterfactual model has a vocabulary of {editable.vocab_size} tokens, the"
                f" edited model one of {vocab_size}; it must have the same tokenizer"
            )
        return cls(editable, tokenizer)

    def edit_ids(self, prompts: Sequence[str], targets: Sequence[str]) -> list[list[int]]:
        """Token ids of "x_e y_e ", with the tokens that begin every text of this tokenizer."""
        form = self.model.answers
        gap = [] if form.is_apart else token_ids(self.tokenizer, [" "], add_special_tokens=False)[0]
        answers = encode_targets(self.tokenizer, targets, form)
        rows = token_ids(self.tokenizer, prompts)
        return [[*row, *answer, *gap] for row, answer in zip(rows, answers, strict=True)]

    def behind(self, edit: Sequence[int], query: Sequence[int]) -> list[int]:
        """Ids of an edit and a query; the query's beginning-of-text token does not come again."""
        begins = bool(query) and query[0] == self.tokenizer.bos_token_id == edit[0]
        return [*edit, *(query[1:] if begins else query)]
