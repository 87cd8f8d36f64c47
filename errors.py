"""The errors that are the user's to mend, and how a command ends on them."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable

UNFINISHED = 75
"""Exit status of a run that is not finished, with nothing lost: the same command goes on (sysexits.h's EX_TEMPFAIL)."""


class UserError(Exception):
    """Bad input. Its text is one line: which file, what is wrong, what to do."""

    exit_status = 1
    label = "error"


class UsageError(UserError):
    """A setting that makes no sense, whatever the input."""

    exit_status = 2


class Unfinished(UserError):  # noqa: N818 - it need not be an error
    """The run ends before its end, asked to or kept from going on; the same command goes on from its last save."""

    exit_status = UNFINISHED
    label = "not finished"


def exits_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a command's main: a `UserError` becomes one line on stderr and its exit status, without a traceback."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            say_last_words(error.label, str(error))
            sys.exit(error.exit_status)

    return wrapped


def say_last_words(label: str, text: str) -> None:
    """Print the one line that a command ends with on stderr; ranks after the first say who they are."""
    rank = os.environ.get("RANK", "0")
    who = label if rank == "0" else f"{label} on rank {rank}"
    with contextlib.suppress(OSError):  # stderr may lie on the disk that is full
        print(f"{who}: {' '.join(text.split())}", file=sys.stderr, flush=True)
