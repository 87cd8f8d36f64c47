"""A sample of `python -m tests.faults`: a fault of each sort, and that the harm is seen where there is some."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults import hostile, packing, training
from tests.faults.mutations import good_images, read_chunks, read_segments, write_chunks
from tests.faults.report import Tally
from tests.faults.runs import Config, difference

ONE_RANK, TWO_RANKS = Config("dira", 1), Config("di", 2)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reference runs are kept from one test to the next."""
    return tmp_path_factory.mktemp("faults")


def assert_nothing_lost(tally: Tally, count: int) -> None:
    assert tally.lost == []
    assert tally.survived == tally.tried >= count


@pytest.mark.parametrize(
    ("harm", "configs"),
    [
        (training.kill_training, [ONE_RANK]),
        (training.stop_signals, [ONE_RANK]),
        (training.disk_full, [ONE_RANK]),
        (training.rank_death, [TWO_RANKS]),
    ],
)
def test_a_run_that_was_harmed_ends_as_if_nothing_had_happened(
    work: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[int, int, Path], Tally], configs: list[Config]
) -> None:
    monkeypatch.setattr(training, "CONFIGS", configs)
    assert_nothing_lost(harm(1, 0, work), 1)


def test_packs_that_were_killed_end_with_the_same_bytes(work: Path) -> None:
    assert_nothing_lost(packing.kill_packing(1, 0, work), 1)


def test_hostile_images_are_packed_or_rejected_with_a_reason(work: Path) -> None:
    tally = hostile.hostile_images(200, 0, work)
    assert_nothing_lost(tally, 200)
    assert min(tally.moments[outcome] for outcome in ("packed", "rejected", "archive packed", "archive refused")) > 0


def test_good_images_come_through_the_mutators_reading_and_writing() -> None:
    for png in good_images()["png"]:
        assert write_chunks(read_chunks(png)) == png
    for jpeg in good_images()["jpg"]:
        segments, rest = read_segments(jpeg)
        assert b"\xff\xd8" + b"".join(segments) + rest == jpeg


def test_a_difference_of_one_bit_is_seen() -> None:
    def state(value: float) -> dict[str, object]:
        return {"model": [{"weight": torch.tensor([1.0, value])}], "step": (3, None)}

    assert difference(state(1.0), state(1.0)) == ""
    assert difference(state(1.0), state(1.0 + 2**-23)) == ".model[0].weight: other numbers"
    assert difference({"step": 1}, {"step": 2}) == ".step: 1 and 2"
    assert difference({"step": 1}, {"step": 1, "queue": 2}) == ": other keys"
    assert difference([1], [1, 2], "a") == "a: 1 and 2 items"
