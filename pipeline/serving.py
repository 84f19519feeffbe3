"""A run with an edit memory as a model to call, without exporting it first (SERAC)."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.applying import require_fingerprint, require_round, rounds_of, spec_of
from pipeline.editing.adapters import MemoryAdapter
from pipeline.editing.serac.memory import EditMemory
from pipeline.editing.serac.serving import SeracModel, serac_model
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
        limit: tokens of a row; a longer one loses its beginning.
    """
    # The last token is predicted and not read.
    rows = [[*prompt, *answer][-(limit + 1) :][:-1] for prompt, answer in asked]
    longest, device = max(map(len, rows)), model.device
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    prompts = lengths - torch.tensor([len(answer) - 1 for _, answer in asked], device=device)
    place = torch.arange(longest, device=device)
    is_real, is_prompt = place < lengths[:, None], place < prompts[:, None]
    given = {"input_ids": ids, "attention_mask": is_real.long()}
    if looked_up:
        labels = ids.masked_fill(is_prompt | ~is_real, -100)
        logits = model(**given, labels=labels).logits
    else:
        logits = model.base(**given).logits
    found = []
    for line, (_, answer) in enumerate(asked):
        end = int(lengths[line])
        scores = logits[line, end - len(answer) : end].float().log_softmax(-1)
        target = torch.tensor(answer, device=scores.device)
        likelihood = float(scores.gather(1, target[:, None]).sum())
        found.append((likelihood, bool((scores.argmax(-1) == target).all())))
    return found
