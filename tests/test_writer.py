import resource
import threading
from pathlib import Path

import pytest
import torch

from errors import Unfinished, UserError
from model.checkpoint import load_checkpoint
from training.writer import CheckpointWriter, HostCopy, find_not_finite

CPU = torch.device("cpu")


def state(step: int, value: float = 1.0, size: int = 1000) -> dict[str, object]:
    return {"step": step, "model": {"weight": torch.full((size,), value)}, "loaders": [{"seed": 1}]}


def steps(folder: Path) -> dict[str, int]:
    return {path.name: load_checkpoint(path, CPU)["step"] for path in folder.iterdir()}


def test_what_is_written_is_the_state_at_the_call_whatever_becomes_of_it_then(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CPU)
    for step in range(1, 6):
        current = state(step, value=step, size=2_000_000)
        writer.write(current, is_best=step == 2)
        current["model"]["weight"].fill_(-1)
    writer.wait()
    assert steps(tmp_path) == {"last.pt": 5, "previous.pt": 4, "best.pt": 2}
    for name, value in (("last.pt", 5), ("previous.pt", 4), ("best.pt", 2)):
        assert (load_checkpoint(tmp_path / name, CPU)["model"]["weight"] == value).all()


def test_a_state_that_is_not_finite_is_never_written_and_is_named(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CPU)
    writer.write(state(1), is_best=True)
    writer.wait()
    bad = {"meters": [{"mse": torch.tensor(float("nan"))}] * 2, **state(2, value=float("inf"))}
    writer.write(bad, is_best=True)
    with pytest.raises(
        UserError, match=r"diverged by step 2: mse, model\.weight not finite; .*last\.pt is from before"
    ):
        writer.wait()
    assert writer.has_failed
    with pytest.raises(UserError, match="diverged"):
        writer.write(state(3), is_best=False)
    assert steps(tmp_path) == {"last.pt": 1, "best.pt": 1}


def test_a_full_disk_is_told_by_the_next_call_and_costs_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CPU)
    writer.write(state(1), is_best=True)
    writer.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        writer.write(state(2, size=100_000), is_best=True)
        with pytest.raises(Unfinished, match=r"last\.pt: step 2 can't be saved \(File too large\); .* is from before"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps(tmp_path) == {"last.pt": 1, "best.pt": 1}


def test_writing_goes_on_beside_the_caller(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CPU)
    writer.write(state(1, size=20_000_000), is_best=False)
    assert not (tmp_path / "last.pt").exists()
    assert any(thread.name.startswith("checkpoint") for thread in threading.enumerate())
    writer.wait()
    assert steps(tmp_path) == {"last.pt": 1}


def test_copies_go_into_the_same_memory_each_time_and_keep_their_layout() -> None:
    value = {"a": [torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), 7], "b": (torch.tensor(3), None)}
    copier = HostCopy()
    first = copier.take(value)
    addresses = [first["a"][0].data_ptr(), first["b"][0].data_ptr()]
    assert value["a"][0].data_ptr() not in addresses
    second = copier.take(value)
    assert [second["a"][0].data_ptr(), second["b"][0].data_ptr()] == addresses
    assert torch.equal(second["a"][0], value["a"][0])
    assert second["a"][0].stride() == value["a"][0].stride()
    assert (second["a"][1], second["b"][1], type(second["b"])) == (7, None, tuple)


def test_only_numbers_that_are_none_or_infinite_are_named() -> None:
    nan = torch.tensor([1.0, float("nan")])
    value = {"a": [torch.ones(2), {"b": nan}], "c": torch.tensor(5), "d": (None, "x", nan), "e": torch.zeros(0)}
    assert find_not_finite(value) == ["a.1.b", "d.2"]
