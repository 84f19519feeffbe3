"""How a model's answers stand to their prompts: behind them, or in a decoder of their own."""

from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError


@dataclass(frozen=True)
class AnswerForm:
    """Where an answer begins and ends.

    Attributes:
        start: the token that the decoder of an encoder-decoder model begins every answer with; None
            where an answer continues its prompt's own tokens.
        end: the token that ends an answer; None where none does.
    """

    start: int | None = None
    end: int | None = None

    @property
    def is_apart(self) -> bool:
        """Whether a prompt goes to an encoder, and its answer is a text of its own."""
        return self.start is not None


CONTINUED = AnswerForm()
"""A decoder-only model's: the answer is the prompt's continuation, and nothing ends it."""


def is_encoder_decoder(config: Any) -> bool:
    """Whether a Hugging Face configuration is that of an encoder-decoder model."""
    return bool(getattr(config, "is_encoder_decoder", False))


def answer_form(config: Any) -> AnswerForm:
    """The form of a model's answers, from its Hugging Face configuration.

    An encoder-decoder model learns every answer with its end, so the end is one of the answer's
    tokens: an edit without it would leave open what follows, and a likelihood without it would take
    the beginning of a longer answer for the answer.

    Raises:
        InputError: the configuration does not name the tokens.
    """
    if not is_encoder_decoder(config):
        return CONTINUED
    start, end = config.decoder_start_token_id, config.eos_token_id
    end = end[0] if isinstance(end, list | tuple) else end
    for name, token in (("decoder_start_token_id", start), ("eos_token_id", end)):
        if token is None:
            raise InputError(
                f"model.path: config.json has no {name}, with which an encoder-decoder model's"
                " answers begin or end; put it there"
            )
    return AnswerForm(int(start), int(end))


def num_encoder_blocks(config: Any) -> int:
    """How many blocks read the prompt, of an encoder-decoder model's configuration."""
    return int(config.num_layers)


def num_blocks(config: Any) -> int:
    """How many blocks can be edited: of an encoder-decoder model the decoder's."""
    if is_encoder_decoder(config):
        return int(config.num_decoder_layers)
    return int(config.get_text_config().num_hidden_layers)
