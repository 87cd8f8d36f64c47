import os
import subprocess
import sys
import time

import pytest

from errors import UNFINISHED
from model.watchdog import Beat, Hearing
from tests.commands import ROOT

TIMEOUT_S = 10.0


def hearing(*ranks: int) -> Hearing:
    return Hearing(ranks, TIMEOUT_S, now_s=0)


def test_a_rank_that_tells_nothing_is_named_after_the_time_and_not_before() -> None:
    heard = hearing(0, 1, 2)
    for rank in range(3):
        heard.hear(rank, Beat(1, 1), 1)
    for rank in (0, 2):
        heard.hear(rank, Beat(2, 1), 8)
    heard.hear(1, Beat(1, 1), 8)
    assert heard.silent(11) == []
    assert heard.silent(11.1) == [1]


def test_a_rank_that_never_came_is_named() -> None:
    heard = hearing(0, 1)
    heard.hear(0, Beat(1, 1), 9)
    assert heard.silent(10.1) == [1]


def test_of_living_ranks_the_one_behind_is_named_once_none_moves() -> None:
    heard = hearing(0, 1, 2)
    for now_s in range(1, 30):
        for rank, position in enumerate((7, 6, 7)):
            heard.hear(rank, Beat(now_s, position), now_s)
        assert heard.silent(now_s) == []
        assert heard.stuck(now_s) == ([1] if now_s > 11 else [])


def test_nobody_is_stuck_while_one_moves() -> None:
    heard = hearing(0, 1)
    for now_s in range(1, 100):
        heard.hear(0, Beat(now_s, now_s), now_s)
        heard.hear(1, Beat(now_s, 0), now_s)
        assert heard.stuck(now_s) == []


PROGRAM = """
import os, sys, time, torch
from model import distributed
from model.watchdog import Watchdog
distributed.init_from_environment(torch.device("cpu"))
with Watchdog(timeout_s=2) as watchdog:
    watchdog.position = 1 if distributed.rank() == 1 else 2
    print("ready", flush=True)
    for _ in range(60):
        time.sleep(0.5)
        if sys.argv[1] == "moving":
            watchdog.position += 1
            if watchdog.position > 12:
                break
"""


@pytest.mark.parametrize("how", ["moving", "halted", "stuck"])
def test_two_ranks_end_when_one_hangs_and_rank_0_names_it(how: str) -> None:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how],
            cwd=ROOT,
            env={**os.environ, **variables, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert "ready\n" in iter(rank.stdout.readline, "")  # gloo of torch 2.10 prints a line of its own before
        if how == "halted":
            ranks[1].send_signal(19)
        began_at_s = time.monotonic()
        _, words = ranks[0].communicate(timeout=60)
        if how == "moving":
            assert (ranks[0].returncode, words) == (0, "")
            return
        assert time.monotonic() - began_at_s < 15
        assert ranks[0].returncode == UNFINISHED
        verb = "answer" if how == "halted" else "move on"
        assert f"not finished: rank 1 did not {verb} for 2 s" in words
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
