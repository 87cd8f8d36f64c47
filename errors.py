"""The errors that are the user's to mend, and how a command ends on them."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. Its text is one line: which file, what is wrong, what to do."""

    exit_status = 1


class UsageError(UserError):
    """A setting that makes no sense, whatever the input."""

    exit_status = 2


def exits_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a command's main: a `UserError` becomes one line on stderr and its exit status, without a traceback."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            rank = os.environ.get("RANK", "0")
            who = "error" if rank == "0" else f"error on rank {rank}"
            print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            sys.exit(error.exit_status)

    return wrapped
