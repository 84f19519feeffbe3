"""The value search against the plain one-edit-at-a-time procedure, in the same process.

    python benchmarks/values.py --model MODEL --requests COUNTERFACT.json --edits 64 --threads 2

The plain procedure runs the whole model over all of an edit's padded prompts in every step, as the
published code does, and projects every position onto the vocabulary. Prints milliseconds an edit
for both, their ratio, and the largest relative difference of z.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import append_row, describe_machine
from torch import Tensor

from pipeline.editing.batching import make_batch
from pipeline.editing.values import FoundValue, ValueSettings, find_values
from pipeline.methods.settings import value_settings
from pipeline.models.editable import EditableModel, resolve_device
from pipeline.models.loading import fuse_activations, load_model, load_tokenizer
from pipeline.prompts import EditPrompts, tokenize_edits
from pipeline.sources import read_requests
from pipeline.spec import load_spec

SPEC = Path(__file__).parents[1] / "jobs" / "specs" / "counterfact_12m.yaml"


def main() -> None:
    """Run the benchmark from the command line."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    paths = [f"model.path={arguments.model}", f"requests.path={arguments.requests}"]
    spec = load_spec(SPEC, [*paths, f"model.dtype={arguments.dtype}"])
    assert spec.method.contexts is not None and spec.method.layers is not None
    device, _ = resolve_device()
    tokenizer = load_tokenizer(spec.model)
    rows = read_requests(spec.requests.path, spec.requests.format, limit=arguments.edits)
    requests = [row.request for row in rows if row.request is not None]
    edits = tokenize_edits(tokenizer, requests, spec.method.contexts)
    layer, settings = spec.method.layers[-1], value_settings(spec.method)

    plain_model = EditableModel(load_model(spec.model, device))
    fast_model = load_model(spec.model, device)
    fuse_activations(fast_model)
    plain_edits = edits[: arguments.plain_edits]
    find_values(EditableModel(fast_model), edits[:2], layer, settings, 2)  # warm up
    start = time.perf_counter()
    found = find_values(EditableModel(fast_model), edits, layer, settings, arguments.batch)
    fast_seconds = (time.perf_counter() - start) / len(edits)
    start = time.perf_counter()
    expected = [plain_value(plain_model, edit, layer, settings) for edit in plain_edits]
    plain_seconds = (time.perf_counter() - start) / len(plain_edits)
    row = {
        **describe_machine(),
        "edits": len(edits),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "milliseconds_an_edit": 1e3 * fast_seconds,
        "plain_milliseconds_an_edit": 1e3 * plain_seconds,
        "ratio": plain_seconds / fast_seconds,
        "largest_relative_difference": _difference(found, expected),
    }
    for name, value in row.items():
        print(f"{name:<28} {value:.6g}" if isinstance(value, float) else f"{name:<28} {value}")
    append_row("values", row)


def plain_value(
    model: EditableModel, edit: EditPrompts, layer: int, settings: ValueSettings
) -> Tensor:
    """Search one value with the whole model in every step; (d,)."""
    rows = [(*row.ids, *edit.target[:-1]) for row in (*edit.rewrites, edit.essence)]
    rows[-1] = edit.essence.ids
    batch = make_batch(model, rows, range(len(rows)))
    lookups = torch.tensor([row.lookup for row in (*edit.rewrites, edit.essence)])
    clean: list[Tensor] = []
    delta = torch.zeros(model.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)

    def add_delta(_module: object, _inputs: object, output: Tensor) -> Tensor:
        if not clean:
            clean.append(output[0, lookups[0]].detach().clone())
        changed = output.clone()
        for index, lookup in enumerate(lookups):
            changed[index, lookup] += delta
        return changed

    handle = model.blocks[layer].register_forward_hook(add_delta)
    reference: Tensor | None = None
    for step in range(settings.steps):
        logits = model.model(input_ids=batch.ids, attention_mask=batch.real.long()).logits
        log_p = logits.log_softmax(dim=-1)
        essence = log_p[-1, lookups[-1]]
        reference = essence.detach() if reference is None else reference
        kl = (essence.exp() * (essence - reference)).sum()
        decay = settings.weight_decay * delta.norm() / clean[0].norm() ** 2
        nll = _plain_nll(log_p, edit, [len(row) for row in rows[:-1]])
        loss = nll + settings.kl_weight * kl + decay
        if loss.item() < settings.stop_loss or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            limit = settings.clamp_norm * clean[0].norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    handle.remove()
    return (clean[0] + delta).detach()


def _plain_nll(log_p: Tensor, edit: EditPrompts, lengths: Sequence[int]) -> Tensor:
    target = torch.tensor(edit.target)
    rows = [
        log_p[index, length - len(target) : length].gather(-1, target[:, None]).mean()
        for index, length in enumerate(lengths)
    ]
    return -torch.stack(rows).mean()


def _difference(found: Sequence[FoundValue], expected: Sequence[Tensor]) -> float:
    pairs = zip(found[: len(expected)], expected, strict=True)
    return max(float((value.z - plain).norm() / plain.norm()) for value, plain in pairs)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=64)
    parser.add_argument("--plain-edits", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
