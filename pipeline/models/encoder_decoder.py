"""An encoder-decoder model seen as the stack of its decoder's blocks.

The encoder reads a row's prompt, its source, and stays as it is; the decoder's row begins with the
model's start token. What the decoder reads besides its own tokens travels with the masks: the
encoder's states, and the relative position biases, which in T5 (arXiv 1910.10683) belong to block
0 and are handed from block to block, so that a block that is entered in the middle needs them too.

Rows are packed as in a decoder-only model: several answers to one prompt share the start token and
the encoder's states.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from pipeline.models.anatomy import family_of
from pipeline.models.answers import AnswerForm, answer_form
from pipeline.models.caches import AttentionCache
from pipeline.models.editable import EditableModel
from pipeline.models.masks import attention_masks, lowest


@dataclass(frozen=True)
class DecoderMasks:
    """What a decoder's rows attend to.

    Attributes:
        bias: (rows, heads, queries, tokens) relative position bias, the most negative finite number
            where nothing is seen.
        source_ids: (rows, source tokens) int64, right-padded.
        source_real: (rows, source tokens) int64, 0 at padding.
        crossing: (rows, 1, 1, source tokens), 0, the most negative finite number at padding.
        states: (rows, source tokens, d) what the encoder makes of the sources; None computes it
            when it is needed.
    """

    bias: Tensor
    source_ids: Tensor
    source_real: Tensor
    crossing: Tensor
    states: Tensor | None = None


class EncoderDecoderModel(EditableModel):
    """A T5 with named parts; layers are numbered in its decoder.

    Args:
        model: a model with a language modelling head, of a family that has an encoder.

    Raises:
        ModelNotSupportedError: the architecture is not covered.
        InputError: its configuration does not name the tokens that answers begin and end with.
    """

    has_encoder = True

    def __init__(self, model: PreTrainedModel) -> None:
        self._answers = answer_form(model.config)
        super().__init__(model)
        assert self.family.encoder is not None and self.family.cross_attention is not None
        self.encoder = model.get_submodule(self.family.encoder)
        self.encoder_blocks: list[nn.Module] = list(self.encoder.block)  # type: ignore[arg-type]
        self.cross_attentions = [
            block.get_submodule(self.family.cross_attention) for block in self.blocks
        ]
        self._block_signature = inspect.signature(type(self.blocks[0]).forward)
        # Older transformers go by the tied embeddings.
        tied = getattr(self.config, "tie_word_embeddings", False)
        self._scales_outputs = bool(getattr(self.config, "scale_decoder_outputs", tied))

    @property
    def answers(self) -> AnswerForm:
        return self._answers

    def new_cache(self) -> dict[str, Any]:
        # The one that generation makes itself has as many layers as the encoder.
        return {self._cache_argument: EncoderDecoderCache(DynamicCache(), DynamicCache())}

    def masks(
        self,
        positions: Tensor,
        segments: Tensor,
        query_start: int = 0,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> DecoderMasks:
        """What these rows attend to.

        Args:
            positions, segments, query_start: of the decoder's tokens, as in `attention_masks`; a
                row's positions are smaller than its width.
            sources: for each row the ids that the encoder reads.

        Raises:
            ValueError: there are no sources.
        """
        if sources is None:
            raise ValueError("an encoder-decoder model's rows need the prompts that they answer")
        by_type = attention_masks(self.config, positions, segments, query_start, self.dtype)
        mask = by_type["full_attention"]
        width = positions.shape[1]
        table = self.attention(0).compute_bias(width, width, device=positions.device)[0]  # type: ignore[operator]
        bias = table[:, positions[:, query_start:, None], positions[:, None, :]].transpose(0, 1)
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(source, dtype=torch.long) for source in sources], batch_first=True
        )
        lengths = torch.tensor([len(source) for source in sources])
        real = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.input_device)
        crossing = torch.zeros(real.shape, dtype=self.dtype, device=self.input_device)
        crossing.masked_fill_(~real, lowest(self.dtype))
        return DecoderMasks(
            torch.where(mask < 0, mask, bias),
            ids.to(self.input_device),
            real.long(),
            crossing[:, None, None],
        )

    def attentions(self, layer: int) -> list[nn.Module]:
        return [self.attention(layer), self.cross_attentions[layer]]

    def masks_alone(self, positions: Tensor) -> DecoderMasks:
        nothing = torch.zeros_like(positions)
        bias = torch.zeros(len(positions), 1, 1, 1, dtype=self.dtype, device=positions.device)
        # A block without states of an encoder would leave out what its attention to them gives.
        states = bias[:, 0].expand(-1, -1, self.hidden_size)
        return DecoderMasks(bias, nothing, torch.ones_like(nothing), bias, states)

    def ready(self, masks: DecoderMasks) -> DecoderMasks:
        """The same with the encoder's states, which no edit of the decoder changes.

        They have a graph where the encoder's parameters are trained.
        """
        if masks.states is not None:
            return masks
        output = self.encoder(input_ids=masks.source_ids, attention_mask=masks.source_real)
        return replace(masks, states=output.last_hidden_state)

    def ready_bytes(self, masks: DecoderMasks) -> int:
        return masks.source_ids.numel() * self.hidden_size * self.dtype.itemsize

    def logits(self, final_hidden: Tensor) -> Tensor:
        """As of any model; the original T5 scales the states that its embeddings project."""
        if self._scales_outputs:
            final_hidden = final_hidden * self.hidden_size**-0.5
        return super().logits(final_hidden)

    def _forward_base(
        self,
        hidden: Tensor | None,
        masks: DecoderMasks,
        position_ids: Tensor,
        input_ids: Tensor | None,
        cache: AttentionCache | None,
    ) -> Tensor:
        if cache is not None:
            raise ValueError("rows of an encoder-decoder model are run without a cache")
        masks = self.ready(masks)
        ids = torch.zeros_like(position_ids) if input_ids is None else input_ids
        with self._biased(masks):
            output = self.base(
                input_ids=ids,
                # The biases hold the mask; without one the decoder would make another.
                attention_mask=torch.zeros_like(masks.bias[:, :1]),
                encoder_hidden_states=masks.states,
                use_cache=False,
            )
        return output.last_hidden_state

    @contextmanager
    def _biased(self, masks: DecoderMasks) -> Iterator[None]:
        """Give every block the biases that those before it, which may not run, hand on."""

        def give(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            bound = self._block_signature.bind(module, *args, **kwargs)
            bound.arguments["position_bias"] = masks.bias
            bound.arguments["encoder_decoder_position_bias"] = masks.crossing
            return bound.args[1:], bound.kwargs

        with ExitStack() as stack:
            for block in self.blocks:
                handle = block.register_forward_pre_hook(give, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _as_output(self, hidden: Tensor) -> Any:
        return hidden, None, None

    def _blocks_return_tuples(self) -> bool:
        return True


def editable_model(model: PreTrainedModel) -> EditableModel:
    """A model with named parts, whichever kind it is.

    Raises:
        ModelNotSupportedError: the architecture is not covered.
        InputError: as of `EncoderDecoderModel`.
    """
    has_encoder = family_of(model).encoder is not None
    return EncoderDecoderModel(model) if has_encoder else EditableModel(model)
