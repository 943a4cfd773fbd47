"""The exceptions that mean: the user can fix this, and the message says how; and what exit codes mean."""

DONE, FAILED, NOT_FINITE, RESTART = 0, 1, 3, 42  # of verbs; RESTART: the same command goes on where this one was


class UserError(Exception):
    """A mistake of the user's; verbs print its one line and exit 1, without a traceback."""


class TooManyRejectedError(UserError):
    """More of a source is unusable than allowed; `rejected` lists it, one {"id", "reason"} a recording."""

    def __init__(self, message: str, rejected: list[dict[str, str]]):
        super().__init__(message)
        self.rejected = rejected
