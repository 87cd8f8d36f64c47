"""A time limit for each image: no decoder may hold up a pack for ever, whatever it was given."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from errors import say_last_words
from pipeline.pack_folder import read_json
from pipeline.packing import write_whole

IMAGE_LIMIT_S = 120.0
"""Some hundred times what the largest image takes."""


class TimeLimit:
    """Ends the process when an image takes too long; the next one, given the same record, knows which it was.

    A thread that decodes can't be stopped from outside, but a pack can be killed at any moment and carried on. A
    context manager.
    """

    def __init__(self, record: Path) -> None:
        """`record` is a JSON file, which need not exist."""
        self._record = record
        self.exceeded: set[str] = set(read_json(record) or ())
        """The images that took too long in earlier attempts."""
        self._begun_at_s: dict[int, tuple[str, float]] = {}  # by thread
        self._over = threading.Event()

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """What goes on in here deals with the image `name`."""
        thread = threading.get_ident()
        self._begun_at_s[thread] = (name, time.monotonic())
        try:
            yield
        finally:
            del self._begun_at_s[thread]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="time limit", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, IMAGE_LIMIT_S / 2)):
            now_s = time.monotonic()
            for name, begun_at_s in list(self._begun_at_s.values()):
                if now_s - begun_at_s > IMAGE_LIMIT_S:
                    write_whole(self._record, json.dumps(sorted({*self.exceeded, name})).encode())
                    say_last_words(
                        "error",
                        f"{name}: not decoded within {IMAGE_LIMIT_S:g} s; the same command carries on without it",
                    )
                    os._exit(1)
