"""One step: keys, forward, backward, the discriminator's own step, moving average and queue."""

import torch

from model.dira import Losses
from model.discriminator import discriminator_loss
from pipeline.spec import Batch
from training.run import Run


def train_step(run: Run, batch: Batch) -> torch.Tensor:
    """Take one step on this rank's share of a batch; return the terms of the loss, in the order of `TERMS`."""
    model = run.model
    with run.autocast():
        keys = model.encode_keys(batch.key, shuffle_seed=(run.settings.seed << 32) + run.step)
        embedding, reconstruction = run.query(batch.query)
        losses = model.losses(embedding, reconstruction, keys, batch.target)
    run.optimizer.zero_grad()
    run.scaler.scale(losses.total).backward()
    run.scaler.step(run.optimizer)
    disc_loss = None
    if run.discriminator is not None:
        with run.autocast():
            disc_loss = discriminator_loss(run.discriminator, batch.target, reconstruction)
        run.disc_optimizer.zero_grad()
        run.scaler.scale(disc_loss).backward()
        run.scaler.step(run.disc_optimizer)
    run.scaler.update()
    model.update_key_encoder()
    model.enqueue(keys.all)
    return stack_terms(losses, disc_loss)


def stack_terms(losses: Losses, disc_loss: torch.Tensor | None) -> torch.Tensor:
    """Return the terms that the mode has, fp32, without gradient."""
    return torch.stack([term.detach().float() for term in (*losses, disc_loss) if term is not None])
