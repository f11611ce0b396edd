"""The errors a user can cause, each said in one line.

A `UserError` ends a run with exit status 2 and its text on rank 0. Everything else is a fault of ours and keeps
its traceback.
"""


class UserError(Exception):
    """Something in what the user gave. The message is one line and says what would be right."""


class ConfigError(UserError):
    """A setting, the value given, and what would be right.

    Args:
        setting: dotted name of the setting, for instance ``adapter.r``.
        problem: the value given and what is wrong with it.
        expected: what would be right.
    """

    def __init__(self, setting: str, problem: str, expected: str) -> None:
        super().__init__(f"{setting}: {problem}; {expected}")
        self.setting = setting


class DataError(UserError):
    """A row of data that cannot be used, with its file and line (lines count from 1)."""

    def __init__(self, path: object, line: int, problem: str) -> None:
        super().__init__(f"{path}:{line}: {problem}")


class CheckpointError(Exception):
    """A checkpoint folder that cannot be used: which one, which file, and why."""


class TrainingError(Exception):
    """Training cannot go on (for instance a loss that is not a number). The last checkpoint is intact."""


class LeaveRequest(Exception):
    """A signal asked the run to leave, and everything is saved: the signal, and what was saved."""
