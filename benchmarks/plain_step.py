"""The step as one writes it first, for bench_step: the same method, none of the shortcuts.

fp32, NCHW, three equal channels, a key network that is a whole copy of the query's, weight gradients of the
discriminator in the generator's step too, two passes of the discriminator in its own step, a kernel for each tensor in
optimizers and moving average, and losses read back in every step. One rank: its keys are normalised as one batch.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dira import DiRA
from model.unet import smp_unet
from pipeline.spec import Batch
from training.step import ignore


class PlainUNet(nn.Module):
    """smp's U-Net on three channels, and the projection."""

    def __init__(self, arch: str, embedding_dim: int) -> None:
        super().__init__()
        self.backbone = smp_unet(arch)
        width = self.backbone.encoder.out_channels[-1]
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embedding_dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in 0..1 to embeddings [B, C] and reconstructions [B, 1, H, W]."""
        features = self.backbone.encoder(images)
        embedding = self.projection(F.adaptive_avg_pool2d(features[-1], 1).flatten(1))
        return F.normalize(embedding, dim=1), self.backbone.segmentation_head(self.backbone.decoder(features))


class PlainStep:
    """Everything that the plain step trains, with the weights of a fresh `DiRA` of mode `dir` or `dira`.

    Its own weights are in `networks`, under the names that they have in `DiRA`.
    """

    def __init__(
        self, model: DiRA, arch: str, *, lr: float, momentum: float, weight_decay: float, disc_lr: float
    ) -> None:
        self.weights, self.temperature, self.key_momentum = model.weights, model.moco_t, model.moco_m
        device, dtype = model.queue.device, model.queue.dtype
        self.query = PlainUNet(arch, model.queue.shape[1]).to(device, dtype)
        self.query.load_state_dict(_plain_names(model.query.state_dict()))
        self.key = deepcopy(self.query)
        self.queue, self.queue_ptr = model.queue.T.clone(), 0
        self.optimizer = torch.optim.SGD(
            self.query.parameters(), lr, momentum, weight_decay=weight_decay, foreach=False, fused=False
        )
        self.discriminator = deepcopy(model.discriminator)
        if self.discriminator is not None:
            self.discriminator.to(memory_format=torch.contiguous_format)
            self.disc_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), disc_lr, (0.5, 0.999), foreach=False, fused=False
            )

    def __call__(self, batch: Batch, mark: Callable[[str], None] = ignore) -> list[float]:
        """Take a step on float views [B, 3, H, W] and targets [B, 1, H, W], as `plain_batch` makes them.

        Returns:
            The terms of the loss, in the order of `training.run.TERMS`.
        """
        with torch.no_grad():
            keys, _ = self.key(batch.key)
        mark("forward_key")
        embedding, reconstruction = self.query(batch.query)
        mark("forward_query")
        positive = torch.einsum("nc,nc->n", embedding, keys).unsqueeze(1)
        negative = torch.einsum("nc,ck->nk", embedding, self.queue.clone())
        logits = torch.cat([positive, negative], dim=1) / self.temperature
        contrastive = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        mse = F.mse_loss(reconstruction, batch.target)
        losses = [contrastive, mse]
        if self.discriminator is not None:
            score = self.discriminator(reconstruction)
            losses.append(F.mse_loss(score, torch.ones_like(score)))
        total = sum(weight * loss for weight, loss in zip(self.weights, losses, strict=False))
        mark("losses")
        self.optimizer.zero_grad()
        total.backward()
        mark("backward")
        self.optimizer.step()
        mark("optimizers")
        losses = [total, *losses]
        if self.discriminator is not None:
            losses.append(self._discriminator_step(batch.target, reconstruction.detach(), mark))
        self._update_key_network()
        self._enqueue(keys)
        terms = [loss.item() for loss in losses]
        mark("ema_and_queue")
        return terms

    def _discriminator_step(self, real: Tensor, fake: Tensor, mark: Callable[[str], None]) -> Tensor:
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        real_loss = F.mse_loss(on_real, torch.ones_like(on_real))
        loss = 0.5 * (real_loss + F.mse_loss(on_fake, torch.zeros_like(on_fake)))
        self.disc_optimizer.zero_grad()
        loss.backward()
        mark("discriminator")
        self.disc_optimizer.step()
        mark("optimizers")
        return loss

    @torch.no_grad()
    def _update_key_network(self) -> None:
        for average, current in zip(self.key.parameters(), self.query.parameters(), strict=True):
            average.data = average.data * self.key_momentum + current.data * (1 - self.key_momentum)

    def _enqueue(self, keys: Tensor) -> None:
        num_keys, size = len(keys), self.queue.shape[1]
        if size % num_keys:
            raise ValueError(f"a plain queue of {size} takes no batches of {num_keys}: they must divide it")
        self.queue[:, self.queue_ptr : self.queue_ptr + num_keys] = keys.T
        self.queue_ptr = (self.queue_ptr + num_keys) % size

    def networks(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the networks and the queue by its name in `DiRA`; the key network's decoder left out."""
        for network, state in (("query", self.query.state_dict()), ("key", self.key.state_dict())):
            for name, tensor in state.items():
                if network == "query" or not name.startswith(("backbone.decoder", "backbone.segmentation_head")):
                    yield f"{network}.{name.removeprefix('backbone.')}", tensor
        if self.discriminator is not None:
            for name, tensor in self.discriminator.state_dict().items():
                yield f"discriminator.{name}", tensor
        yield "queue", self.queue.T


def plain_batch(batch: Batch, dtype: torch.dtype = torch.float32) -> Batch:
    """The batch as a plain loader hands it over: floating point in 0..1, the views with three equal channels."""
    query, key, target = (images.to(dtype) / 255 for images in batch)
    return Batch(query.repeat(1, 3, 1, 1), key.repeat(1, 3, 1, 1), target)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name if name.startswith("projection.") else f"backbone.{name}": tensor for name, tensor in state.items()}
