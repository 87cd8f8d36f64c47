"""What a run is made of on one rank, and how it is built from its settings."""

import math
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from errors import UserError
from model import distributed
from model.device import autocast, choose_precision
from model.dira import DiRA, LossWeights
from model.optim import make_adam, make_sgd
from pipeline.loader import LoaderSpec, PretrainLoader, ValidationLoader
from pipeline.shardset import ShardSet
from pipeline.spec import DistortionSpec, ViewSpec
from settings import Settings

TERMS = {
    "di": ("total", "contrastive"),
    "dir": ("total", "contrastive", "mse"),
    "dira": ("total", "contrastive", "mse", "adversarial", "discriminator"),
}


@dataclass
class Run:
    """What a run is made of, on one rank."""

    settings: Settings
    device: torch.device
    precision: str
    model: DiRA
    query: nn.Module
    """`model.query`, its gradients averaged over the ranks; so is `discriminator`."""
    discriminator: nn.Module | None
    optimizer: torch.optim.Optimizer
    disc_optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler
    loader: PretrainLoader
    val_loader: ValidationLoader
    step: int = 0
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

    def autocast(self) -> AbstractContextManager[None]:
        """Forward passes run in here."""
        return autocast(self.device, self.precision)


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
    torch.manual_seed(settings.seed)
    ranks = distributed.world_size()
    if settings.batch_size % ranks:
        raise UserError(f"--batch-size {settings.batch_size} can't be shared out evenly over {ranks} ranks")
    spec = LoaderSpec(
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
    loader, val_loader = PretrainLoader(spec), ValidationLoader(spec)
    model = DiRA(
        arch=settings.arch,
        mode=settings.mode,
        moco_dim=settings.moco_dim,
        moco_k=settings.moco_k,
        moco_m=settings.moco_m,
        moco_t=settings.moco_t,
        key_bn_groups=settings.key_bn_groups,
        weights=LossWeights(settings.contrastive_weight, settings.mse_weight, settings.adv_weight),
    ).to(device, memory_format=torch.channels_last)
    if settings.compile:
        for network in filter(None, (model.query, model.key, model.discriminator)):
            network.compile()
    fused = {"fused": settings.fused, "device": device}
    precision = choose_precision(settings.precision, device)
    disc = model.discriminator
    return Run(
        settings=settings,
        device=device,
        precision=precision,
        model=model,
        query=distributed.wrap_ddp(model.query),
        discriminator=disc and distributed.wrap_ddp(disc),
        optimizer=make_sgd(
            model.query.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            **fused,
        ),
        disc_optimizer=disc and make_adam(disc.parameters(), lr=settings.disc_lr, betas=(0.5, 0.999), **fused),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        loader=loader,
        val_loader=val_loader,
    )


def say(text: str) -> None:
    """Print a line from the main rank."""
    if distributed.is_main():
        print(text, flush=True)
