"""The worker: one model replica that computes values, keys, covariance sums and scores.

A plain class: the driver wraps it as a Ray actor, tests and machines without Ray call it directly.
What it can be asked is in `pipeline.cluster.calls`, by kinds of methods.
"""

from pipeline.cluster.calls.adapters import AdapterCalls
from pipeline.cluster.calls.asking import AskingCalls
from pipeline.cluster.calls.closed_form import ClosedFormCalls
from pipeline.cluster.calls.gradients import GradientCalls
from pipeline.cluster.calls.neurons import NeuronCalls


class EditWorker(ClosedFormCalls, GradientCalls, AdapterCalls, NeuronCalls, AskingCalls):
    """One replica of the model, at a known weight version.

    Args:
        spec: the resolved job spec.
        threads: compute threads.
        replica: the unedited model, which others may use as well (see `WorkerHost`); null loads it.

    Raises:
        InputError: the model cannot be loaded or is not supported.
    """
