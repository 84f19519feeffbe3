"""What SERAC's models learn from: edits, questions in their scope and questions out of it.

The supervised loss of the published code (arXiv 2206.06520, section 3.3):

    edit_weight * NLL of h, given the right edit, + scope_weight * balanced loss of the classifier

with pairs (edit, question in scope) as positive and pairs (edit, question out of scope) as
negative. Both models are trained at once and share no parameter.

Shapes: B edits of a step, E size of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.editing.batching import token_batches
from pipeline.editing.serac.counterfactual import Counterfactual
from pipeline.editing.serac.editor import SeracEditor
from pipeline.editing.serac.scope import all_distances, balanced_loss, distances, hardest
from pipeline.editing.targets import TargetBatch, sources_of, target_row
from pipeline.prompts import encode_targets, token_ids


@dataclass(frozen=True)
class Example:
    """One edit to learn from.

    Attributes:
        prompt: x_e, the edit's own prompt.
        target: y_e.
        inside: a question in the edit's scope, whose answer is y_e.
        outside: a question out of it.
    """

    prompt: str
    target: str
    inside: str
    outside: str


@dataclass(frozen=True)
class LossSettings:
    """Weights of the loss; names and meaning as in the job spec."""

    edit_weight: float = 0.1
    scope_weight: float = 1.0
    all_negatives: bool = False
    hard_negatives: int = 0


@dataclass(frozen=True)
class Losses:
    """The two parts of a step's loss, unweighted, and their weighted sum, which has a graph."""

    total: Tensor
    edit: Tensor
    scope: Tensor


def losses(
    editor: SeracEditor, examples: Sequence[Example], settings: LossSettings, max_tokens: int
) -> Losses:
    """The loss of a step.

    Args:
        editor: its parameters that are trained require gradients.
        examples: B edits, about different facts.
        settings: how the parts are weighed.
        max_tokens: tokens of a forward pass at most.

    Returns:
        Scalars, nats; `edit` is the mean over edits of the mean over the target's tokens.
    """
    with torch.enable_grad():
        scope = scope_loss(editor, examples, settings, max_tokens)
        edit = edit_losses(editor.counterfactual, examples, max_tokens).mean()
        total = settings.edit_weight * edit + settings.scope_weight * scope
    return Losses(total, edit.detach(), scope.detach())


def scope_loss(
    editor: SeracEditor, examples: Sequence[Example], settings: LossSettings, max_tokens: int
) -> Tensor:
    """The classifier's balanced loss.

    Negative pairs are each edit with its own question out of scope; with `all_negatives` with
    everybody's; with `hard_negatives` also with the nearest questions of other edits.
    """
    encoder = editor.encoder
    edits_BE = encoder(
        encoder.edit_ids([e.prompt for e in examples], [e.target for e in examples]), max_tokens
    )
    asked = encoder.query_ids([e.inside for e in examples] + [e.outside for e in examples])
    inside_BE, outside_BE = encoder(asked, max_tokens).chunk(2)
    positive = distances(edits_BE, inside_BE, editor.scale)
    if settings.all_negatives:
        negative = [all_distances(edits_BE, outside_BE, editor.scale).flatten()]
    else:
        negative = [distances(edits_BE, outside_BE, editor.scale)]
    if settings.hard_negatives and len(examples) > 1:
        with_others = all_distances(edits_BE, inside_BE, editor.scale)
        negative.append(hardest(with_others, settings.hard_negatives))
    return balanced_loss(positive, torch.cat(negative))


def edit_losses(
    counterfactual: Counterfactual, examples: Sequence[Example], max_tokens: int
) -> Tensor:
    """NLL of y_e behind "x_e y_e " and the question in scope, (B,), nats a target token."""
    tokenizer, model = counterfactual.tokenizer, counterfactual.model
    targets = [e.target for e in examples]
    edits = counterfactual.edit_ids([e.prompt for e in examples], targets)
    questions = token_ids(tokenizer, [e.inside for e in examples])
    rows, form = [], model.answers
    for number, answer in enumerate(encode_targets(tokenizer, targets, form)):
        prompt = tuple(counterfactual.behind(edits[number], questions[number]))
        rows.append(target_row(number, prompt, answer, 1.0, form.start))
    order, found = [], []
    for batch in token_batches(model, [row.ids for row in rows], max_tokens, sources_of(rows)):
        targeted = TargetBatch.of(batch, rows, model.output_device)
        states = model.final(
            None,
            first=0,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
            read=targeted.read,
        )
        found.append(targeted.losses(model, states))
        order.append(batch.index)
    return torch.cat(found)[torch.cat(order).argsort().to(model.output_device)]
