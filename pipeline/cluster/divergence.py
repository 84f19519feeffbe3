"""Divergence: edits that ruin the model, found before it is written; and those that did not take.

Three things are looked at: whether keys, residuals and updates are finite (where they are made),
how far an update moves ordinary tokens (`pipeline.cluster.insertion`), and, here, what the rewrite
probes say after the edits.
"""

import logging
import math

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DivergedError
from pipeline.spec import JobSpec

log = logging.getLogger(__name__)

_RUINED_SHARE = 0.9


def stop_or_warn(spec: JobSpec, what: str) -> None:
    """End a diverged job, or go on with a warning where the spec says so.

    Raises:
        DivergedError: `output.on_divergence` is `stop`.
    """
    if spec.output.on_divergence == "stop":
        raise DivergedError(f"{what}; output.on_divergence: keep goes on regardless")
    log.warning("%s; going on, as output.on_divergence says", what)


def not_taken(metrics: pa.Table, round: int) -> dict[str, str]:
    """Find the edits whose new object is not the likelier one after `round`.

    Args:
        metrics: rows of metrics/.

    Returns:
        case_id -> why, for the rewrite probes without success; edits without a true object have
        none to compare with, and are not listed.
    """
    rows = _rewrites(metrics, round)
    rows = rows.filter(pc.equal(rows["success"], False))
    columns = (rows[name].to_pylist() for name in ("case_id", "nll_new", "nll_true"))
    return {
        case_id: f"did not take: target_new has {new:.3f} nats a token, target_true {true:.3f}"
        for case_id, new, true in zip(*columns, strict=True)
    }


def find_ruin(
    metrics: pa.Table, before: int, after: int, least: int = 1, *, writes_targets: bool = True
) -> str | None:
    """Say what shows that the edited model is ruined; None when nothing does.

    Compared are the rewrite probes of two rounds: a model is ruined when likelihoods that were
    finite are not any more, or when nine in ten edits made their new object less likely. (In sound
    batches none does, in batches ten times too large one in ten.) The second is not asked of edits
    that do not write their new objects.
    """
    pairs = _likelihoods(metrics, before, after)
    broken = sum(math.isfinite(was) and not math.isfinite(now) for was, now in pairs)
    if broken:
        return f"the edited model has no finite likelihood for {broken} of {len(pairs)} rewrites"
    worse = sum(now >= was for was, now in pairs)
    if writes_targets and len(pairs) >= least and worse >= _RUINED_SHARE * len(pairs):
        return f"the edits made {worse} of {len(pairs)} new objects less likely than they were"
    return None


def _likelihoods(metrics: pa.Table, before: int, after: int) -> list[tuple[float, float]]:
    """nll_new of each rewrite probe in both rounds."""
    old, new = (
        _rewrites(metrics, round).select(["case_id", "nll_new"]) for round in (before, after)
    )
    joined = old.join(new, "case_id", join_type="inner", right_suffix="_after")
    columns = joined["nll_new"].to_pylist(), joined["nll_new_after"].to_pylist()
    return list(zip(*columns, strict=True))


def _rewrites(metrics: pa.Table, round: int) -> pa.Table:
    chosen = pc.and_(pc.equal(metrics["round"], round), pc.equal(metrics["probe"], "rewrite"))
    return metrics.filter(chosen)
