"""Runs of pre-training that take seconds, and how two of them compare."""

import json
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_checkpoint
from settings import Settings
from tests.faults.runs import difference, run_difference
from training.run import Run
from training.saving import Keeper
from training.stopping import StopRequest

CPU = torch.device("cpu")


def small(shard_folder: Path, run_dir: Path, mode: str = "dira", **changes: Any) -> Settings:
    """Settings of a run that takes seconds."""
    values = {
        "arch": "resnet18",
        "crop_size": 32,
        "batch_size": 4,
        "moco_k": 30,
        "epochs": 2,
        "max_steps": 10,
        "log_every": 4,
        "save_every": 3,
        "precision": "fp32",
        "device": "cpu",
        "data_threads": 1,
    }
    return Settings(shards=(str(shard_folder),), mode=mode, run_dir=str(run_dir), **values | changes)


def options(settings: Settings) -> list[str]:
    """Return the command line that gives these settings."""
    pairs = settings.to_dict()
    shards = pairs.pop("shards")
    flags = [
        text
        for name, value in pairs.items()
        if value not in (None, [], False)
        for text in ("--" + name.replace("_", "-"), str(value))
    ]
    return [*shards, *flags]


def keeper_of(run: Run) -> Keeper:
    """Return what a run asks whether to stop: no."""
    return Keeper(run, StopRequest())


def last_checkpoint(run_dir: Path) -> dict[str, Any]:
    """What a run has saved last."""
    return load_checkpoint(run_dir / "checkpoints" / "last.pt", CPU)


def assert_same(ours: object, theirs: object) -> None:
    """Compare nested checkpoints, tensors to the bit."""
    assert difference(ours, theirs) == ""


def assert_ended_alike(run_dir: Path, whole: Path) -> None:
    """Compare finished runs: checkpoints, metrics, exports, files."""
    assert run_difference(run_dir, whole) == ""


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = {"images_per_second", "images_per_second_per_gpu", "data_wait_fraction"}
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]
