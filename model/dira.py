"""DiRA: discriminative, restorative and adversarial learning united (Haghighi et al., CVPR 2022)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import distributed, moco
from model.batch_norm import group_batch_norm
from model.discriminator import PatchDiscriminator, adversarial_loss
from model.unet import UNet, to_unit_range

MODES = ("di", "dir", "dira")
"""The discriminative term alone; with the restorative one; with the adversarial one too."""


class LossWeights(NamedTuple):
    """What each term counts for in the total."""

    contrastive: float = 1.0
    mse: float = 10.0
    adversarial: float = 0.001


class Keys(NamedTuple):
    """The embedded key views, fp32, of unit length, without gradient."""

    local: Tensor
    """[B, C]: this rank's, in the order of its batch."""
    all: Tensor
    """[world size * B, C]: every rank's, in the order of the global batch. In eval mode the same as `local`."""


class Losses(NamedTuple):
    """Scalar fp32 means over this rank's batch; the terms are unweighted, and None where the mode has them not."""

    total: Tensor
    contrastive: Tensor
    mse: Tensor | None
    adversarial: Tensor | None


class DiRA(nn.Module):
    """DiRA's networks and its queue.

    The training loop owns the optimizers. A step is: `encode_keys`, `query(views)`, `losses`, backward, the optimizer's
    step, the discriminator's own (`discriminator_loss`), `update_key_encoder`, `enqueue`.

    There is no `forward`: with several ranks the loop wraps `query` and `discriminator` in DDP, each by itself, and
    what is here never calls those wrappers. Build it under the same seed on every rank: DDP makes the wrapped networks
    equal, but not the key network and the queue.

    Args:
        arch: The encoder, one of `unet.ARCHS`.
        mode: One of `MODES`.
        moco_dim: Length C of an embedding.
        moco_k: Keys in the queue.
        moco_m: Momentum of the key network's moving average.
        moco_t: Temperature of the contrastive loss.
        key_bn_groups: On one rank, the number of groups in which the shuffled keys go through BN.
        weights: What each term counts for.
    """

    def __init__(
        self,
        *,
        arch: str,
        mode: str,
        moco_dim: int,
        moco_k: int,
        moco_m: float,
        moco_t: float,
        key_bn_groups: int,
        weights: LossWeights,
    ) -> None:
        super().__init__()
        self.moco_m = moco_m
        self.moco_t = moco_t
        self.weights = weights
        self.query = UNet(arch, moco_dim, with_decoder=mode != "di")
        self.key = UNet(arch, moco_dim, with_decoder=False).requires_grad_(requires_grad=False)
        query_state = self.query.state_dict()
        self.key.load_state_dict({name: query_state[name] for name in self.key.state_dict()})
        group_batch_norm(self.key, key_bn_groups if distributed.world_size() == 1 else 1)
        self.discriminator = PatchDiscriminator() if mode == "dira" else None
        self.register_buffer("queue", moco.random_queue(moco_k, moco_dim))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def encode_keys(
        self, images: Tensor, permutation: Tensor | None = None, mark: Callable[[str], None] = lambda _: None
    ) -> Keys:
        """Embed the key views so that BN gives no query away.

        A query is normalised with its own batch's statistics. Were its key normalised with the same images', the two
        could be matched by these traces alone. So in training mode the global batch is shuffled for the keys, and each
        rank, or on one rank each of `key_bn_groups` groups as even as possible, takes its share of it (MoCo paper,
        section 3.3). Groups are fewer where one would hold a single image. In eval mode BN takes no statistics from
        the batch: no shuffle, no collective, and any batch size on any rank.

        Args:
            images: uint8 [B, 1, H, W]; in training mode B is the same on every rank.
            permutation: From `moco.shuffle_permutation`, of the global batch; the same on every rank. Not looked at in
                eval mode. With several ranks it must be on the CPU.
            mark: Called with `communication` and `forward_key` when such a part has ended, for benchmarks.
        """
        if not self.training:
            local, _ = self.key(images)
            return Keys(local, local)
        size, rank = len(images), distributed.rank()
        shuffled = distributed.exchange(images, permutation)
        mark("communication")
        embedded, _ = self.key(shuffled)
        mark("forward_key")
        everyones = moco.unshuffle(distributed.all_gather(embedded), permutation)
        mark("communication")
        return Keys(everyones[rank * size : (rank + 1) * size], everyones)

    def losses(self, embedding: Tensor, reconstruction: Tensor | None, keys: Keys, target: Tensor) -> Losses:
        """Every term of the mode and their weighted sum. Changes no state, so validation calls it too.

        Args:
            embedding: What `query` made of the query views, [B, C].
            reconstruction: Likewise, [B, 1, H, W] in 0..1; not looked at in mode `di`.
            keys: Of the same radiographs' key views.
            target: What is to be restored, uint8 [B, 1, H, W].
        """
        contrastive = moco.info_nce(embedding, keys.local, self.queue, self.moco_t)
        total = self.weights.contrastive * contrastive
        mse = adversarial = None
        if self.query.decoder is not None:
            mse = F.mse_loss(reconstruction, to_unit_range(target))
            total = total + self.weights.mse * mse
        if self.discriminator is not None:
            adversarial = adversarial_loss(self.discriminator, reconstruction)
            total = total + self.weights.adversarial * adversarial
        return Losses(total, contrastive, mse, adversarial)

    def update_key_encoder(self) -> None:
        """Move the key network's weights towards the query's, after the optimizer's step.

        MoCo does so before the next step's keys, which is the same but for its very first time, when both networks are
        equal and nothing moves. BN statistics are not averaged: the key network gathers its own.
        """
        current = (*self.query.encoder.parameters(), *self.query.projection.parameters())
        average = (*self.key.encoder.parameters(), *self.key.projection.parameters())
        moco.update_moving_average(average, current, self.moco_m)

    def enqueue(self, keys: Tensor) -> None:
        """Put the step's `Keys.all` into the queue, after the backward pass: the loss still needs the old ones."""
        moco.enqueue(self.queue, self.queue_ptr, keys)

    def queue_similarity(self) -> Tensor:
        """The mean cosine between any two keys of the queue: 1 says that every image is embedded alike.

        InfoNCE does not tell: while the network changes quickly, newer keys differ from older ones, and it is low.
        """
        return self.queue.mean(dim=0).square().sum()
