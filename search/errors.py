"""The exceptions that the command line ends with, and its exit codes.

raise SearchError("epochs is a number above 0. Received: epochs=-1. Fix: --epochs 5")
"""

from __future__ import annotations

EXIT_USER_ERROR = 1  # one line explains it
EXIT_USAGE = 2  # a wrong argument, or another process holds the study
EXIT_STORAGE_LOST = 3
EXIT_DAMAGED = 4  # a study or an artifact is not what was written
EXIT_NOTHING_USABLE = 5  # the run ended and no trial can be used


class SearchError(Exception):
    """Something outside the code is wrong and its user can mend it; shown without a traceback.

    Args:
        message: the rule, the received value and the fix. Line breaks become spaces, because the
            command line promises one line.
        exit_code: one of the constants above; the process ends with it.
        detail: what stands below that line where it helps, such as the user's own traceback.
    """

    def __init__(self, message: str, *, exit_code: int = EXIT_USER_ERROR, detail: str = "") -> None:
        super().__init__(" ".join(message.splitlines()))
        self.exit_code = exit_code
        self.detail = detail


class Interrupted(Exception):
    """A signal asked the run to end. Workers are ended, their trials can be continued.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"interrupted by signal {number}")
        self.number = number
