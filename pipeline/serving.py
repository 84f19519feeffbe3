"""A run with an edit memory as a model to call, without exporting it first (SERAC)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.applying import require_fingerprint, require_round, rounds_of, spec_of
from pipeline.editing.adapters import MemoryAdapter
from pipeline.editing.serac.memory import EditMemory
from pipeline.editing.serac.serving import SeracAnswerModel, SeracModel, serac_model
from pipeline.errors import ResultsDamagedError
from pipeline.methods.serac import Serac
from pipeline.models.encoder_decoder import editable_model
from pipeline.results import Run
from pipeline.results.updates import read_update

Asked = tuple[list[int], list[int]]
"""Token ids of a prompt and of an answer."""


def served_run(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    round: int | None = None,
) -> tuple[SeracModel, EditMemory]:
    """What `load_serac` gives of an exported run, from the run itself, and the memory in it.

    Args:
        run: one of a method with a memory.
        model: the unedited model that it edited.
        tokenizer: the model's.
        round: as of `apply_updates`.

    Raises:
        InputError: the run, or the round, is not finished, or the editor is gone.
        FingerprintMismatchError: the model is another one.
        ResultsDamagedError: the run or the editor is damaged.
    """
    require_round(run, round)
    run.verify()
    require_fingerprint(model, run)
    editable = editable_model(model)
    router = Serac(spec_of(run).method).router(editable, tokenizer)
    for number in rounds_of(run, round):
        for path in run.updates(number):
            change = read_update(path)[1]
            if not isinstance(change, MemoryAdapter):
                raise ResultsDamagedError(f"{path} holds no entries of a memory")
            if change.entries:
                router.memory.add(change.entries, change.parts["embeddings"])
    return serac_model(editable, router, tokenizer), router.memory


@torch.no_grad()
def log_likelihoods(
    model: SeracModel, asked: Sequence[Asked], *, looked_up: bool, limit: int
) -> list[tuple[float, bool]]:
    """What a model gives to answers: sums of log-probabilities, and whether all are the argmax.

    Args:
        model: the model.
        asked: prompts with their answers, in one batch.
        looked_up: whether the prompts are asked of the memory; else the edited model reads rows as
            running text.
        limit: tokens of a row, of an encoder-decoder model those of a prompt; a longer one loses
            its beginning.
    """
    logits_of = _logits_apart if isinstance(model, SeracAnswerModel) else _logits_behind
    found = []
    for logits, (_, answer) in zip(logits_of(model, asked, looked_up, limit), asked, strict=True):
        scores = logits.float().log_softmax(-1)
        target = torch.tensor(answer, device=scores.device)
        likelihood = float(scores.gather(1, target[:, None]).sum())
        found.append((likelihood, bool((scores.argmax(-1) == target).all())))
    return found


def _logits_behind(
    model: SeracModel, asked: Sequence[Asked], looked_up: bool, limit: int
) -> list[Tensor]:
    """Logits of every answer's tokens, each (tokens, v), where answers continue prompts."""
    # The last token is predicted and not read.
    ids, is_real = _padded(model, [[*ids, *answer][-(limit + 1) :][:-1] for ids, answer in asked])
    lengths = is_real.sum(dim=1)
    given = {"input_ids": ids, "attention_mask": is_real.long()}
    if looked_up:
        counts = torch.tensor([len(answer) for _, answer in asked], device=ids.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        is_prompt = place < (lengths - counts + 1)[:, None]
        logits = model(**given, labels=ids.masked_fill(is_prompt | ~is_real, -100)).logits
    else:
        logits = model.base(**given).logits
    ends = lengths.tolist()
    return [logits[i, ends[i] - len(answer) : ends[i]] for i, (_, answer) in enumerate(asked)]


def _logits_apart(
    model: SeracModel, asked: Sequence[Asked], looked_up: bool, limit: int
) -> list[Tensor]:
    """The same where answers are texts of a decoder's own."""
    ids, is_real = _padded(model, [prompt[-limit:] for prompt, _ in asked])
    start = model.config.decoder_start_token_id
    rows, _ = _padded(model, [[start, *answer[:-1]] for _, answer in asked])
    asking = model if looked_up else model.base
    given = {"input_ids": ids, "attention_mask": is_real.long(), "decoder_input_ids": rows}
    logits = asking(**given).logits
    return [logits[i, : len(answer)] for i, (_, answer) in enumerate(asked)]


def _padded(model: SeracModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids, padded on the right, and where they are real."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    is_real = torch.arange(longest) < lengths[:, None]
    return ids.to(model.device), is_real.to(model.device)
