"""One step: keys, forward, backward, the discriminator's own step, moving average and queue.

Nothing here waits for the device: what a step gives is read back once a log interval.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from model import distributed, moco
from model.dira import Losses
from model.discriminator import discriminator_loss
from model.unet import to_unit_range
from pipeline.spec import Batch
from training.learner import Learner


def ignore(phase: str) -> None:
    """Do nothing at the end of a phase; the benchmarks take the time there."""


def train_step(learner: Learner, batch: Batch, mark: Callable[[str], None] = ignore) -> Tensor:
    """Take one step on this rank's share of a batch; return the terms of the loss, in the order of `TERMS`.

    `mark` is called with a phase's name whenever a part of it has ended.
    """
    return step_on_device(learner, batch, draw_permutation(learner), mark)


def draw_permutation(learner: Learner) -> Tensor:
    """The order in which this step's keys are shuffled: the same on all ranks; on one rank, already on its device."""
    settings = learner.settings
    permutation = moco.shuffle_permutation(settings.batch_size, seed=(settings.seed << 32) + learner.step)
    return permutation if distributed.world_size() > 1 else permutation.to(learner.device, non_blocking=True)


def step_on_device(learner: Learner, batch: Batch, permutation: Tensor, mark: Callable[[str], None]) -> Tensor:
    """Take the step; on one rank all of it happens on the device, so that it can be captured as a CUDA graph."""
    model, scaler, num_parts = learner.model, learner.scaler, learner.settings.accumulate
    with learner.autocast():
        keys = model.encode_keys(batch.key, permutation, mark)
    targets = to_unit_range(batch.target).chunk(num_parts)
    learner.optimizer.zero_grad()
    terms, reconstructions = [], []
    parts = zip(batch.query.chunk(num_parts), keys.local.chunk(num_parts), targets, strict=True)
    for i, (query, local_keys, target) in enumerate(parts):
        with nullcontext() if i == num_parts - 1 else distributed.without_averaging(learner.query):
            with learner.autocast():
                embedding, reconstruction = learner.query(query)
                mark("forward_query")
                losses = model.losses(embedding, reconstruction, keys._replace(local=local_keys), target)
                mark("losses")
            scaler.scale(losses.total / num_parts).backward()
            mark("backward")
        terms.append(stack_terms(losses, None))
        reconstructions.append(None if reconstruction is None else reconstruction.detach())
    scaler.step(learner.optimizer)
    mark("optimizers")
    step_terms = torch.stack(terms).mean(dim=0)
    if learner.discriminator is not None:
        disc_loss = discriminator_step(learner, targets, reconstructions, mark)
        step_terms = torch.cat((step_terms, disc_loss[None]))
    scaler.update()
    model.update_key_encoder()
    model.enqueue(keys.all)
    mark("ema_and_queue")
    return step_terms


def discriminator_step(
    learner: Learner, targets: tuple[Tensor, ...], reconstructions: list[Tensor], mark: Callable[[str], None]
) -> Tensor:
    """Train the discriminator on the step's targets and what the network made of them; return its loss."""
    num_parts, losses = len(targets), []
    learner.disc_optimizer.zero_grad()
    for i, (real, fake) in enumerate(zip(targets, reconstructions, strict=True)):
        with nullcontext() if i == num_parts - 1 else distributed.without_averaging(learner.discriminator):
            with learner.autocast():
                loss = discriminator_loss(learner.discriminator, real, fake)
            learner.scaler.scale(loss / num_parts).backward()
        losses.append(loss.detach())
    mark("discriminator")
    learner.scaler.step(learner.disc_optimizer)
    mark("optimizers")
    return torch.stack(losses).mean()


def stack_terms(losses: Losses, disc_loss: Tensor | None) -> Tensor:
    """Return the terms that the mode has, without gradient."""
    return torch.stack([term.detach() for term in (*losses, disc_loss) if term is not None])
