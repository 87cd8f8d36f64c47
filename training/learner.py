"""What learns, on one rank: networks, optimizers, precision. No data: the benchmarks build one without a loader."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from errors import UsageError
from model import distributed
from model.device import autocast, choose_precision
from model.dira import DiRA, LossWeights
from model.optim import make_adam, make_sgd
from settings import Settings


@dataclass(kw_only=True)
class Learner:
    """All that a step changes."""

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
    step: int = 0
    """Steps taken."""

    def autocast(self) -> AbstractContextManager[None]:
        """Forward passes run in here."""
        return autocast(self.device, self.precision)


def build_learner(settings: Settings, device: torch.device) -> Learner:
    """Build it as the settings say, from their seed: the same networks and queue on every rank.

    Raises:
        UserError: The ranks and micro-batches can't share the batch out, or the device can't do what was asked.
    """
    torch.manual_seed(settings.seed)
    ranks = distributed.world_size()
    if settings.batch_size % (ranks * settings.accumulate):
        parts = f"{ranks} ranks" + f" of {settings.accumulate} micro-batches" * (settings.accumulate > 1)
        raise UsageError(f"--batch-size {settings.batch_size} can't be shared out evenly over {parts}")
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
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
            network.compile(fullgraph=True)
    fused = {"fused": settings.fused, "device": device}
    precision = choose_precision(settings.precision, device)
    disc = model.discriminator
    return Learner(
        settings=settings,
        device=device,
        precision=precision,
        model=model,
        query=distributed.wrap_ddp(model.query, static_graph=settings.accumulate == 1),
        discriminator=disc and distributed.wrap_ddp(disc, static_graph=settings.accumulate == 1),
        optimizer=make_sgd(
            model.query.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            **fused,
        ),
        disc_optimizer=disc and make_adam(disc.parameters(), lr=settings.disc_lr, betas=(0.5, 0.999), **fused),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
    )
