"""A causal language model seen as a stack of blocks that can be entered and left anywhere.

Hugging Face's own forward runs every time, so rotary positions, embedding scaling, masks by layer
type and the final norm are the architecture's own. Blocks outside the wanted range are passed
through untouched while the context is open, which costs nothing but the call.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import InputError, ModelNotSupportedError
from pipeline.models.anatomy import family_of, is_transposed
from pipeline.models.answers import CONTINUED, AnswerForm
from pipeline.models.caches import AttentionCache
from pipeline.models.masks import attention_masks, plain_segments
from pipeline.models.routing import Router


class EditableModel:
    """A Hugging Face causal LM with named parts; weights frozen, in evaluation mode.

    Args:
        model: a causal LM of one of the families in `pipeline.models.anatomy`.

    Attributes:
        router: sends prompts to another model, for an editor that works like that; None as a rule.

    Raises:
        ModelNotSupportedError: the architecture is not covered.
    """

    has_encoder = False
    """Whether prompts are read by an encoder (see `EncoderDecoderModel`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.family = family_of(model)
        if (self.family.encoder is not None) != self.has_encoder:
            raise ModelNotSupportedError(
                f"{type(self).__name__} is no view of model type {model.config.model_type!r};"
                " pipeline.models.encoder_decoder.editable_model chooses the right one"
            )
        self.model = model.eval().requires_grad_(False)
        self.base = model.get_submodule(self.family.base)
        self.blocks: list[nn.Module] = list(model.get_submodule(self.family.blocks))  # type: ignore[call-overload]
        self.config = model.config.get_text_config()
        self.unembedding: nn.Module = model.get_output_embeddings()
        self.router: Router | None = None
        self._tuple_outputs = self._blocks_return_tuples()
        # transformers 5.24 has renamed it, and takes the old name with a warning until 5.40.
        known = inspect.signature(self.base.forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.unembedding.weight.shape[0])  # type: ignore[index]

    @property
    def input_device(self) -> torch.device:
        """Where token ids go in: the embedding's device."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.device

    @property
    def output_device(self) -> torch.device:
        """Where `final` and `logits` put out: the unembedding's device."""
        weight: Tensor = self.unembedding.weight  # type: ignore[assignment]
        return weight.device

    def device_of(self, layer: int) -> torch.device:
        """Where a block is, with all that is in it."""
        weight: Tensor = self.down_projection(layer).weight  # type: ignore[assignment]
        return weight.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that hold a part of the model, in the order in which a state passes them."""
        blocks = (self.device_of(layer) for layer in range(self.num_blocks))
        return tuple(dict.fromkeys((self.input_device, *blocks, self.output_device)))

    @property
    def output_embeddings(self) -> Tensor:
        """What the final hidden state is multiplied by: (v, d), a row a token."""
        weight: Tensor = self.unembedding.weight  # type: ignore[assignment]
        return weight.data

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def max_positions(self) -> int | None:
        """Longest input in tokens that the model has positions for, None if it has no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @property
    def answers(self) -> AnswerForm:
        """How answers stand to their prompts."""
        return CONTINUED

    def new_cache(self) -> dict[str, Any]:
        """What transformers' own generation is to be given as a cache, beside its inputs."""
        return {}

    def attention(self, layer: int) -> nn.Module:
        return self.blocks[layer].get_submodule(self.family.attention)

    def attentions(self, layer: int) -> list[nn.Module]:
        """All attention modules of a block, in the order in which they run."""
        return [self.attention(layer)]

    def mlp(self, layer: int) -> nn.Module | None:
        return (
            None if self.family.mlp is None else self.blocks[layer].get_submodule(self.family.mlp)
        )

    @property
    def activation(self) -> str:
        """The feed-forward networks' activation, as transformers names it."""
        names = ("hidden_activation", "activation_function", "hidden_act", "dense_act_fn")
        found = (getattr(self.config, name, None) for name in names)
        return next(name for name in found if isinstance(name, str))

    def up_projection(self, layer: int) -> nn.Module:
        """The linear map that reads the MLP's input."""
        return self.blocks[layer].get_submodule(self.family.up_projection)

    def down_projection(self, layer: int) -> nn.Module:
        return self.blocks[layer].get_submodule(self.family.down_projection)

    def key_size(self, layer: int) -> int:
        """Width f of a key at this layer: the down-projection's input features."""
        return int(self.oriented_weight(layer).shape[1])

    def weight_name(self, layer: int) -> str:
        """Name of the edited parameter as it stands in the model's state dict."""
        return f"{self.family.blocks}.{layer}.{self.family.down_projection}.weight"

    def oriented_weight(self, layer: int) -> Tensor:
        """The down-projection's weight as an (out, in) view of the parameter itself."""
        module = self.down_projection(layer)
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.data.T if is_transposed(module) else weight.data

    def masks(
        self,
        positions: Tensor,
        segments: Tensor,
        query_start: int = 0,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> Any:
        """4D additive masks in the form that this architecture takes; see `attention_masks`.

        `sources` are for `EncoderDecoderModel`.
        """
        assert sources is None, "this model has no encoder"
        by_type = attention_masks(self.config, positions, segments, query_start, self.dtype)
        if self.family.masks_by_layer_type:
            return by_type
        kind = "sliding_attention" if self._slides_everywhere() else "full_attention"
        return by_type[kind]

    def masks_alone(self, positions: Tensor) -> Any:
        """What tokens attend to that stand alone in their rows, where their attention is given.

        Args:
            positions: (rows, 1) int64.
        """
        ones = torch.ones(len(positions), dtype=torch.long, device=positions.device)
        return self.masks(positions, plain_segments(ones, 1))

    def ready(self, masks: Any) -> Any:
        """Masks with all that can be computed once for many calls."""
        return masks

    def ready_bytes(self, masks: Any) -> int:
        """Bytes that `ready` adds to them."""
        return 0

    def run(
        self,
        hidden: Tensor | None,
        *,
        first: int,
        stop: int,
        masks: Any,
        position_ids: Tensor,
        input_ids: Tensor | None = None,
        cache: AttentionCache | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Run blocks `first` .. `stop - 1` and return the last one's output.

        Args:
            hidden: (batch, tokens, d) input of block `first`; None starts from `input_ids`, which
                needs `first == 0`.
            first: index of the first block to run.
            stop: index after the last block to run.
            masks: what `masks()` returned for these tokens.
            position_ids: (batch, tokens) int64 positions.
            input_ids: (batch, tokens) int64 token ids, when `hidden` is None.
            cache: records, or supplies, attention keys and values of earlier tokens.
            read: (n,) int64 distinct indices into batch * tokens: the states that are wanted. The
                last of these blocks computes its MLP there only, and the result is (n, d).

        Returns:
            (batch, tokens, d) output of block `stop - 1`, before the final norm, on that block's
            device (`hidden` itself when the range is empty).
        """
        if hidden is not None and first == stop:
            return hidden
        captured: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(self._only_blocks(first, stop, hidden))
            stack.enter_context(self._mlp_at(stop - 1, read))
            handle = self.blocks[stop - 1].register_forward_hook(
                lambda _module, _inputs, output: captured.append(_first(output))
            )
            stack.callback(handle.remove)
            self._forward_base(hidden, masks, position_ids, input_ids, cache)
        return captured[0] if read is None else _chosen(captured[0], read)

    def final(
        self,
        hidden: Tensor | None,
        *,
        first: int,
        masks: Any,
        position_ids: Tensor,
        input_ids: Tensor | None = None,
        cache: AttentionCache | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Run blocks from `first` to the last one and the final norm; (batch, tokens, d).

        Arguments as in `run`; `first` may equal the number of blocks (final norm only). The result
        is on the output device.
        """
        with (
            self._only_blocks(first, self.num_blocks, hidden),
            self._mlp_at(self.num_blocks - 1, read),
        ):
            output = self._forward_base(hidden, masks, position_ids, input_ids, cache)
        return (output if read is None else _chosen(output, read)).to(self.output_device)

    def logits(self, final_hidden: Tensor) -> Tensor:
        """Project normed hidden states (..., d) onto the vocabulary: (..., v) float32 or wider."""
        logits: Tensor = self.unembedding(final_hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _forward_base(
        self,
        hidden: Tensor | None,
        masks: Any,
        position_ids: Tensor,
        input_ids: Tensor | None,
        cache: AttentionCache | None,
    ) -> Tensor:
        # A model is entered where its embedding is; its blocks fetch what they are called with.
        position_ids = position_ids.to(self.input_device)
        # A hidden state that enters replaces what the embedding makes of these; id 0 always exists.
        ids = torch.zeros_like(position_ids) if input_ids is None else input_ids
        output = self.base(
            input_ids=ids,
            attention_mask=masks,
            position_ids=position_ids,
            use_cache=cache is not None,
            **{self._cache_argument: cache},
        )
        return output.last_hidden_state

    @contextmanager
    def _only_blocks(self, first: int, stop: int, entry: Tensor | None) -> Iterator[None]:
        """Let only blocks first .. stop-1 compute; the state that enters `first` is `entry`."""
        if entry is None and first != 0:
            raise ValueError("entering above block 0 needs a hidden state")
        skipped = [*range(first), *range(stop, self.num_blocks)]
        with ExitStack() as stack:
            for index in skipped:
                stack.enter_context(forward_replaced(self.blocks[index], self._pass_through))
            if entry is not None:
                stack.enter_context(self._entered_with(first, entry))
            yield

    @contextmanager
    def _mlp_at(self, layer: int, read: Tensor | None) -> Iterator[None]:
        """Let a block's MLP compute these tokens only and give zeros for the others."""
        mlp = self.mlp(layer)
        if read is None or mlp is None:
            yield
            return
        whole = mlp.forward

        def trimmed(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            flat, place = hidden.flatten(0, 1), read.to(hidden.device)
            output = whole(flat[place][None], *args, **kwargs)[0]
            # T5's down-projection stays in float32 where the model is in float16.
            return output.new_zeros(flat.shape).index_copy(0, place, output).view_as(hidden)

        with forward_replaced(mlp, trimmed):
            yield

    @contextmanager
    def _entered_with(self, first: int, entry: Tensor) -> Iterator[None]:
        if first == 0:
            handle = self.blocks[0].register_forward_pre_hook(
                lambda _module, inputs: (entry, *inputs[1:])
            )
            try:
                yield
            finally:
                handle.remove()
            return
        replaced = forward_replaced(
            self.blocks[first - 1], lambda *_args, **_kwargs: self._as_output(entry)
        )
        with replaced:
            yield

    def _pass_through(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return self._as_output(hidden)

    def _as_output(self, hidden: Tensor) -> Any:
        return (hidden,) if self._tuple_outputs else hidden

    def _slides_everywhere(self) -> bool:
        return getattr(self.config, "sliding_window", None) is not None

    def _blocks_return_tuples(self) -> bool:
        """See how this architecture's blocks hand on their state; it differs between families."""
        seen: list[bool] = []
        handle = self.blocks[0].register_forward_hook(
            lambda _module, _inputs, output: seen.append(isinstance(output, tuple))
        )
        try:
            with torch.no_grad():
                one = torch.zeros(1, 1, dtype=torch.long, device=self.input_device)
                self.base(input_ids=one, attention_mask=torch.ones_like(one))
        finally:
            handle.remove()
        return seen[0]


def resolve_device(name: str | None = None) -> tuple[torch.device, str]:
    """Choose the device to compute on, with the reason for the log."""
    if name is not None:
        return torch.device(name), "set by the caller"
    if torch.cuda.is_available():
        return torch.device("cuda"), "a CUDA device is visible to this process"
    return torch.device("cpu"), "no CUDA device is visible to this process"


def resolve_devices(gpus: float) -> tuple[list[torch.device], str]:
    """Choose where a model goes that has so many GPUs, with the reason for the log.

    More than one spread it; one, or a part of one, or none, is what `resolve_device` finds.

    Raises:
        InputError: fewer CUDA devices are visible.
    """
    if gpus <= 1:
        device, reason = resolve_device()
        return [device], reason
    found = torch.cuda.device_count()
    if found < gpus:
        raise InputError(
            f"cluster.gpus_per_worker: {gpus:.0f} GPUs for one model, but this process sees {found}"
        )
    devices = [torch.device("cuda", number) for number in range(int(gpus))]
    return devices, f"the model is spread over {len(devices)} CUDA devices"


def _first(output: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def _chosen(states: Tensor, read: Tensor) -> Tensor:
    """The states (batch, tokens, d) at indices into batch * tokens: (n, d), where they are."""
    return states.flatten(0, 1)[read.to(states.device)]


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Shadow a module's forward by an instance attribute, and take the shadow away again."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous
