"""Asked to stop: a signal becomes a wish, which the training loop grants where nothing is lost."""

import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks for a stop: schedulers and torchrun, Ctrl-C, Slurm's warning before the time is up."""
ECHO_S = 1.0
"""A terminal's Ctrl-C reaches a rank twice, from the terminal and from torchrun: within this time that is one."""


class StopRequest:
    """Notes the signals that ask this rank to stop. A second SIGINT ends the process at once, whatever it is doing.

    A thread listens, woken by Python's low-level handler: the main thread may be waiting in C++, where no Python runs.
    A context manager; it belongs into the main thread.
    """

    def __init__(self) -> None:
        self.name = ""
        """The first signal that came, such as SIGTERM; empty while none has."""
        self._interrupted_at: float | None = None

    @property
    def is_asked(self) -> bool:
        """Whether this rank has been asked to stop."""
        return bool(self.name)

    def __enter__(self) -> Self:
        self._wakeup, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, _leave_it_to_the_thread) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._woken.close()
        self._thread.join()
        self._wakeup.close()

    def _listen(self) -> None:
        while numbers := self._wakeup.recv(64):  # nothing comes once the other end is closed
            for number in numbers:
                if number in SIGNALS:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now > self._interrupted_at + ECHO_S:
                os._exit(128 + signal.SIGINT)
            self._interrupted_at = self._interrupted_at or now
        self.name = self.name or number.name


def _leave_it_to_the_thread(_number: int, _frame: FrameType | None) -> None:
    pass
