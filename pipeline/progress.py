"""How far a pack or a verification is."""

import sys
import threading
import time
from typing import Self

from tqdm import tqdm


class Progress:
    """Progress on standard error: a bar on a terminal; elsewhere a line every five seconds, and the last one."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done, self._done_before = what, total, done, done
        self._started = self._spoke = time.monotonic()
        self._lock = threading.Lock()
        is_idle = done >= total
        self._bar = tqdm(
            total=total, initial=done, desc=what, unit=" images", dynamic_ncols=True, disable=True if is_idle else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Another few are done."""
        with self._lock:
            self._done += count
            self._bar.update(count)
            now = time.monotonic()
            if self._bar.disable and (now > self._spoke + 5 or self._done == self._total):
                rate = (self._done - self._done_before) / max(now - self._started, 1e-9)
                left = tqdm.format_interval((self._total - self._done) / rate)
                counts = f"{self._done}/{self._total} images"
                print(f"{self._what}: {counts}, {rate:.0f} images/s, {left} left", file=sys.stderr, flush=True)
                self._spoke = now
