"""The errors that editfleet raises on purpose; each message is one line meant for the user."""


class EditfleetError(Exception):
    """Base of all errors raised on purpose; the message says what was found and what to do."""


class InputError(EditfleetError, ValueError):
    """The input is wrong: a spec, a request file, a path. The command ends with exit code 2."""


class ModelNotSupportedError(InputError):
    """The model's architecture is not in the table of `pipeline.models.anatomy`."""


class FingerprintMismatchError(InputError):
    """A stored file (updates, covariance) was made for another model or other settings."""


class ResultsDamagedError(EditfleetError):
    """A run directory holds a file that does not match its manifest."""


class WeightVersionMismatchError(EditfleetError):
    """A worker holds another number of updates than the caller expects."""


class JobFailedError(EditfleetError):
    """The job cannot go on: retries are used up, or a worker cannot start."""


class DivergedError(JobFailedError):
    """The edits ruin the model; the job stops before it writes one.

    Args:
        message: what was found, in one line.
        case_ids: the requests at which it was found, where it is not the whole batch.
    """

    def __init__(self, message: str, case_ids: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.case_ids = case_ids
