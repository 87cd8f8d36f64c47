import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from benchmarks.timing import cpu_seconds, in_fresh_process, measure_in_turn, peak_memory_mib, summarise
from errors import UserError

BURN = "import time\nwhile time.process_time() < 0.5: pass\n"


def test_rows_are_measured_in_turn() -> None:
    calls = []

    def measure(name: str) -> dict[str, float]:
        calls.append(name)
        return {"images_per_second": len(calls)}

    rounds = measure_in_turn(["a", "b"], 3, measure)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [figures["b"]["images_per_second"] for figures in rounds] == [2, 4, 6]


def test_rows_are_medians_with_ratios_within_their_round() -> None:
    plain, ours = [10.0, 20.0, 40.0], [100.0, 30.0, 400.0]
    rounds: list[dict[str, Any]] = [
        {"the-plain": {"images_per_second": p, "memory_mib": p}, "ours": {"images_per_second": o, "memory_mib": -o}}
        for p, o in zip(plain, ours, strict=True)
    ]
    assert summarise(rounds, baseline="the-plain") == [
        {"name": "the-plain", "images_per_second": 20, "spread": [10, 40], "ratio_to_the_plain": 1, "memory_mib": 20},
        {"name": "ours", "images_per_second": 100, "spread": [30, 400], "ratio_to_the_plain": 10, "memory_mib": -100},
    ]
    assert "ratio_to_plain" not in summarise(rounds, baseline="plain")[0]


def test_cpu_time_counts_children_while_they_live_and_afterwards() -> None:
    before = cpu_seconds()
    child = subprocess.Popen(
        [sys.executable, "-c", f"{BURN}print(flush=True)\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    alive = cpu_seconds() - before
    child.communicate(b"\n")
    assert alive > 0.45
    assert cpu_seconds() - before >= alive - 0.02
    started = time.process_time()
    assert cpu_seconds() >= started - 0.02


def hold_memory() -> dict[str, float]:
    """Peak memory in MiB: at first, once 128 MiB came and went, while a child holds 128 MiB, and without it."""
    peaks = {"at_first": peak_memory_mib()}
    np.ones(2**24)
    peaks["afterwards"] = peak_memory_mib()
    code = "data = bytearray(b'1') * 2**27\nprint(flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    peaks["with_child"] = peak_memory_mib()
    child.communicate(b"\n")
    peaks["without"] = peak_memory_mib()
    return peaks


def test_peak_memory_counts_what_is_freed_again_and_what_children_hold() -> None:
    peaks = in_fresh_process("tests.test_timing:hold_memory")
    assert 120 < peaks["afterwards"] - peaks["at_first"] < 140
    assert 125 < peaks["with_child"] - peaks["afterwards"] < 150
    assert abs(peaks["without"] - peaks["afterwards"]) < 10


def fail() -> dict[str, float]:
    raise UserError("mend the data")


def test_a_fresh_process_that_fails_says_why() -> None:
    with pytest.raises(UserError, match=r"json:loads.*: TypeError"):
        in_fresh_process("json:loads", nonsense=1)
    with pytest.raises(UserError, match=r"^mend the data$"):
        in_fresh_process("tests.test_timing:fail")
