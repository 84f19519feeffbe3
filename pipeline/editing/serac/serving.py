"""A SERAC model to serve: called and generated with as the language model that it wraps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from pipeline.editing.batching import make_batch
from pipeline.models.editable import EditableModel
from pipeline.models.routing import RoutedLogits, Router, Routes, mixed

_CACHES = ("cache", "past_key_values")
"""What transformers from 5.24 on, and before, call a cache that a call goes on from."""


class SeracModel(nn.Module):
    """A plain causal LM whose prompts are looked up in an edit memory first.

    (`SeracAnswerModel` is the same for an encoder-decoder model.)

    It has the LM's interface: `model(input_ids=...)` with the LM's own output, `model.generate`,
    and every other attribute of the LM. Rows that no edit holds get the LM's own numbers, to the
    bit: it runs on the whole batch, as it would by itself.

    A row's prompt decides. In a call with `labels` it is what has the label -100, as in training a
    causal LM to answer; without labels it is the whole row.

    Args:
        model: the LM, which is not changed.
        router: the edit memory with its models.
        tokenizer: the LM's.
    """

    def __init__(
        self, model: EditableModel, router: Router, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        # `generate` comes from a mixin that PreTrainedModel does not name.
        self.base: Any = model.model
        self.router, self.tokenizer = router, tokenizer
        self._new_cache = model.new_cache

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Logits of whole rows, padded on either side; no gradients.

        Args:
            input_ids: (rows, tokens).
            attention_mask: (rows, tokens); None is a batch without padding.
            labels: (rows, tokens), -100 at prompts and padding; the output then has a loss.
            options: handed to the LM.

        Raises:
            ValueError: the rows go on from a cache: their prompts cannot be seen.
            InputError: the classifier cannot read a prompt.
        """
        _require_whole_rows(options)
        output = self.base(input_ids=input_ids, attention_mask=attention_mask, **options)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompt = real if labels is None else real * (labels == -100)
        routes = self._routes(input_ids, prompt)
        if taken := routes.taken:
            output.logits = self._answered(output.logits, input_ids, real, routes, taken)
        if labels is not None:
            output.loss = self.base.loss_function(
                logits=output.logits, labels=labels, vocab_size=output.logits.shape[-1]
            )
        return output

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_processor: Sequence[Any] | None = None,
        **options: Any,
    ) -> Any:
        """As the LM's own `generate`; each row is looked up once, by its prompt.

        What the generation settings change in scores that are not sampled from (penalties, tokens
        that are forbidden) they change in the LM's, before h's take their place.
        """
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        routes = self._routes(input_ids, real)
        rows = [ids[kept].tolist() for ids, kept in zip(input_ids, real.bool(), strict=True)]
        share = RoutedLogits(routes, rows, self._begun(input_ids))
        return self.base.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([share, *(logits_processor or ())]),
            **self._cache_for(options),
            **options,
        )

    def _cache_for(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a generation is given as a cache, unless it is to have none or one of its own."""
        config = options.get("generation_config") or self.base.generation_config
        chosen = {name: getattr(config, name) for name in ("use_cache", "cache_implementation")}
        chosen |= options
        has_own = any(chosen.get(name) is not None for name in ("cache_implementation", *_CACHES))
        # One that is given is filled even where it is not to be used, and then read twice.
        return {} if has_own or chosen["use_cache"] is False else self._new_cache()

    def _begun(self, input_ids: Tensor) -> int:
        """Tokens of a generated row before the first new one."""
        return input_ids.shape[1]

    def _routes(self, input_ids: Tensor, prompt: Tensor) -> Routes:
        rows = [ids[kept] for ids, kept in zip(input_ids, prompt.bool(), strict=True)]
        texts = self.tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return self.router.routes(texts)

    def _answered(
        self, logits: Tensor, input_ids: Tensor, real: Tensor, routes: Routes, taken: list[int]
    ) -> Tensor:
        """The LM's logits with h's share in the rows that it has one in."""
        logits, model = logits.clone(), routes.model
        ids = {number: input_ids[number][real[number].bool()].tolist() for number in taken}
        rows = [routes.row(number, ids[number]) for number in taken]
        routes.require_room(max(map(len, rows)))
        states = _states(model, rows)
        for line, number in enumerate(taken):
            # A beginning-of-text token that h does not read again keeps the LM's logits.
            count = len(rows[line]) - len(routes.prefixes[number])
            own = real[number].nonzero().flatten()[-count:]
            second = model.logits(states[line, len(rows[line]) - count : len(rows[line])])
            share = routes.shares[number].expand(count).to(logits.device)
            joint = mixed(logits[number, own], second.to(logits.device), share)
            logits[number, own] = joint.to(logits.dtype)
        return logits


class SeracAnswerModel(SeracModel):
    """A plain encoder-decoder model whose prompts are looked up in an edit memory first.

    `input_ids` are the prompts, which decide; the decoder's tokens are those of the answers.

    Args: as of `SeracModel`.
    """

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Logits of whole answers, padded on the right; no gradients.

        Args:
            input_ids, attention_mask: (rows, tokens) of the prompts.
            labels: (rows, tokens), -100 at padding; the output then has a loss.
            decoder_input_ids: (rows, tokens); None makes them of the labels.
            options: handed to the model.

        Raises:
            ValueError: there is no answer, or the rows go on from a cache: their answers'
                beginnings cannot be seen.
            InputError: the classifier cannot read a prompt.
        """
        _require_whole_rows(options)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give labels or decoder_input_ids: whole answers are read")
            decoder_input_ids = self.base.prepare_decoder_input_ids_from_labels(labels=labels)
        output = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            **options,
        )
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        routes = self._routes(input_ids, real)
        if taken := routes.taken:
            prompts = [ids[kept].tolist() for ids, kept in zip(input_ids, real.bool(), strict=True)]
            second = _answers(routes, taken, prompts, decoder_input_ids[taken].tolist())
            output.logits = _mixed_at(output.logits, second, routes, taken)
        if labels is not None:
            output.loss = cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output

    def _begun(self, input_ids: Tensor) -> int:
        return 1


def serac_model(
    model: EditableModel, router: Router, tokenizer: PreTrainedTokenizerBase
) -> SeracModel:
    """The wrapper that fits a model; arguments as of `SeracModel`."""
    kind = SeracAnswerModel if model.has_encoder else SeracModel
    return kind(model, router, tokenizer)


def _require_whole_rows(options: Mapping[str, Any]) -> None:
    if any(options.get(name) is not None for name in _CACHES):
        raise ValueError("SeracModel reads whole rows; call generate() to go on from a prompt")


def _states(
    model: EditableModel,
    rows: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Normed hidden states of whole rows, padded on the right, (rows, tokens, d)."""
    batch = make_batch(model, rows, range(len(rows)), sources)
    return model.final(
        None,
        first=0,
        masks=batch.masks,
        position_ids=batch.positions,
        input_ids=batch.ids,
    )


def _answers(
    routes: Routes, taken: list[int], prompts: Sequence[Sequence[int]], rows: Sequence[list[int]]
) -> Tensor:
    """h's logits at the decoder's tokens of some rows, (rows, tokens, v)."""
    sources = [routes.row(number, prompts[number]) for number in taken]
    return routes.model.logits(_states(routes.model, rows, sources))


def _mixed_at(logits: Tensor, second: Tensor, routes: Routes, taken: list[int]) -> Tensor:
    """Logits with h's share in the rows that it has one in."""
    shares = routes.shares[taken].repeat_interleave(logits.shape[1]).to(logits.device)
    joint = mixed(logits[taken].flatten(0, 1), second.flatten(0, 1).to(logits.device), shares)
    logits = logits.clone()
    logits[taken] = joint.view(len(taken), *logits.shape[1:]).to(logits.dtype)
    return logits
