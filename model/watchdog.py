"""Names the rank that all the others wait for. Collectives that time out don't, and a rank that hangs says nothing."""

import os
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch.distributed as dist

from errors import UNFINISHED, say_last_words
from model import distributed


class Beat(NamedTuple):
    """What a rank has last told of itself."""

    num_beats: int
    """Grows as long as its process runs."""
    position: int
    """Grows as long as its training moves on: it stands still in a rank that hangs, and in those that wait for it."""


class Hearing:
    """Tells from the ranks' beats which of them hangs."""

    def __init__(self, ranks: Sequence[int], timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._beats = dict.fromkeys(ranks, Beat(-1, -1))
        self._beat_at_s = dict.fromkeys(ranks, now_s)
        self._moved_at_s = dict.fromkeys(ranks, now_s)

    def hear(self, rank: int, beat: Beat, now_s: float) -> None:
        """Take down what a rank tells."""
        if beat.num_beats != self._beats[rank].num_beats:
            self._beat_at_s[rank] = now_s
        if beat.position != self._beats[rank].position:
            self._moved_at_s[rank] = now_s
        self._beats[rank] = beat

    def silent(self, now_s: float) -> list[int]:
        """The ranks that have told nothing for too long."""
        return [rank for rank, at_s in self._beat_at_s.items() if now_s - at_s > self._timeout_s]

    def stuck(self, now_s: float) -> list[int]:
        """The ranks that are furthest behind, if none has moved for too long."""
        if now_s - max(self._moved_at_s.values()) <= self._timeout_s:
            return []
        least = min(beat.position for beat in self._beats.values())
        return [rank for rank, beat in self._beats.items() if beat.position == least]


class Watchdog:
    """Ends this process when a rank has hung for `timeout_s`, with a line that names the rank.

    A thread tells the other ranks through torchrun's store that this one lives, and how far it has come. Rank 0 listens
    to all, the others to rank 0: when one gives up, torchrun ends the rest. On one rank it does nothing. A context
    manager, to be entered on all ranks.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._interval_s = min(5.0, timeout_s / 5)
        self.position = 0
        """How far this rank has come; a plain number that only grows. The thread passes it on."""
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if distributed.world_size() > 1:
            self._store = dist.PrefixStore("watchdog", distributed.open_store(self._timeout_s))
            self._tell(0)
            distributed.barrier()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if distributed.world_size() > 1:
            self._over.set()
            self._thread.join(self._interval_s)  # not for long, as the store may have died

    def _tell(self, num_beats: int) -> None:
        self._store.set(str(distributed.rank()), f"{num_beats} {self.position}")

    def _watch(self) -> None:
        ranks = range(distributed.world_size()) if distributed.is_main() else [0]
        hearing = Hearing(ranks, self._timeout_s, time.monotonic())
        num_beats = 0
        while not self._over.wait(self._interval_s):
            num_beats += 1
            try:
                self._tell(num_beats)
                for rank, text in zip(ranks, self._store.multi_get([str(rank) for rank in ranks]), strict=True):
                    hearing.hear(rank, Beat(*map(int, text.split())), time.monotonic())
            except dist.DistError:
                pass  # the store is silent; so, in a while, is whom we would hear through it
            if silent := hearing.silent(time.monotonic()):
                self._give_up(f"{_named(silent)} did not answer for {self._timeout_s:g} s")
            if distributed.is_main() and (stuck := hearing.stuck(time.monotonic())):
                self._give_up(f"{_named(stuck)} did not move on for {self._timeout_s:g} s, and all others wait")

    def _give_up(self, why: str) -> None:
        say_last_words("not finished", f"{why} (--timeout-s): the same command goes on from the last save")
        os._exit(UNFINISHED)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
