"""What a run is made of on one rank, and how it is built from its settings."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model import distributed
from pipeline.check import BackgroundCheck
from pipeline.loader import LoaderSpec, PretrainLoader, ValidationLoader
from pipeline.shardset import ShardSet
from pipeline.spec import DistortionSpec, ViewSpec
from settings import Settings
from training.learner import Learner, build_learner

if TYPE_CHECKING:
    from downstream.probe import Probe

TERMS = {
    "di": ("total", "contrastive"),
    "dir": ("total", "contrastive", "mse"),
    "dira": ("total", "contrastive", "mse", "adversarial", "discriminator"),
}


@dataclass(kw_only=True)
class Run(Learner):
    """A learner with its data, and how far it has come."""

    loader: PretrainLoader
    val_loader: ValidationLoader
    check: BackgroundCheck
    """Of the tars, against their checksums."""
    probe: "Probe | None"
    """Scores the encoder every `--probe-every` epochs."""
    has_queue: bool = False
    """Whether the queue holds keys of radiographs, not random directions."""
    is_validation_due: bool = False
    """Whether an epoch has ended whose validation was cut off: it comes first when the run goes on."""
    best_loss: float = math.inf
    best_step: int = 0

    @property
    def num_steps(self) -> int:
        """Where the run ends."""
        scheduled = self.settings.num_epochs * self.loader.steps_per_epoch
        return min(scheduled, self.settings.max_steps or scheduled)

    @property
    def checkpoints(self) -> Path:
        """Where last.pt and best.pt are."""
        return Path(self.settings.run_path) / "checkpoints"


class Meter:
    """Means of the loss terms over a log interval, and its speed. Adding to it never waits for the device."""

    def __init__(self, sums: torch.Tensor | None = None, num_steps: int = 0) -> None:
        """Begin an interval, or go on with a saved one."""
        self.sums, self.num_steps = sums, num_steps
        self._num_timed, self._waited_s, self._began_at = 0, 0.0, time.monotonic()

    def add(self, terms: torch.Tensor, waited_s: float) -> None:
        """Count one step."""
        self.sums = terms if self.sums is None else self.sums + terms
        self.num_steps += 1
        self._num_timed += 1
        self._waited_s += waited_s

    def line(self, names: tuple[str, ...], batch_size: int) -> dict[str, float]:
        """Return the interval's means over all ranks, and its speed."""
        means = distributed.all_reduce_mean(self.sums / self.num_steps).tolist()
        seconds = time.monotonic() - self._began_at
        rate = self._num_timed * batch_size / seconds
        return {
            **dict(zip(names, means, strict=True)),
            "images_per_second": rate,
            "images_per_second_per_gpu": rate / distributed.world_size(),
            "data_wait_fraction": self._waited_s / seconds,
        }


def build(settings: Settings, device: torch.device) -> Run:
    """Build everything but what a checkpoint holds. Every rank builds the same networks and queue."""
    spec = loader_spec(settings, device)
    learner = build_learner(settings, device)
    return Run(
        **vars(learner),
        loader=PretrainLoader(spec),
        val_loader=ValidationLoader(spec),
        check=BackgroundCheck(
            () if settings.trust_shards else spec.shard_sets,
            ("train", "val"),
            share=distributed.local_rank(),
            num_shares=distributed.local_world_size(),
        ),
        probe=build_probe(learner, spec) if settings.probe_every else None,
    )


def build_probe(learner: Learner, spec: LoaderSpec) -> "Probe":
    """What scores the encoder meanwhile; raises UserError where the sets have no labels."""
    from downstream.probe import Probe  # noqa: PLC0415 - scikit-learn is not loaded for runs without a probe

    return Probe(
        spec.shard_sets,
        spec.view.crop_size_px,
        spec.batch_size_per_rank,
        learner.device,
        precision=learner.precision,
        num_threads=spec.num_threads,
    )


def loader_spec(settings: Settings, device: torch.device) -> LoaderSpec:
    """What this rank loads; opens the shard sets."""
    ranks = distributed.world_size()
    return LoaderSpec(
        shard_sets=tuple(ShardSet.open(path) for path in settings.shards),
        view=ViewSpec(crop_size_px=settings.crop_size),
        distortion=None if settings.mode == "di" else DistortionSpec(),
        batch_size_per_rank=settings.batch_size // ranks,
        seed=settings.seed,
        device=device,
        target=settings.target,
        rank=distributed.rank(),
        world_size=ranks,
        num_threads=settings.data_threads or max(1, (os.cpu_count() or 1) // distributed.local_world_size()),
    )


def say(text: str) -> None:
    """Print a line from the main rank."""
    if distributed.is_main():
        print(text, flush=True)
