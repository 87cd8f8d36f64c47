"""The one error that is the user's to mend, and how a command ends on it."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. Its text is one line: which file, what is wrong, what to do."""


def exits_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a command's main: a `UserError` becomes one line on stderr and exit status 1, without a traceback."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)

    return wrapped
