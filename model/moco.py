"""Momentum contrast (He et al. 2020, https://arxiv.org/abs/1911.05722): its loss, queue, moving average and shuffle."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.device import at_least_fp32


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The contrastive loss, equation 1 of the MoCo paper, in fp32 even under autocast.

    Args:
        query: [N, C], of unit length.
        key: [N, C], of unit length: key i is the positive of query i.
        queue: [K, C], of unit length: the negatives of every query.
        temperature: What the similarities are divided by.

    Returns:
        Scalar: the mean over the queries of -log(exp(q.k / t) / (exp(q.k / t) + sum_j exp(q.queue_j / t))).
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key, queue = map(at_least_fp32, (query, key, queue))
        positive = (query * key).sum(dim=1, keepdim=True)
        logits = torch.cat((positive, query @ queue.T), dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def random_queue(num_keys: int, dim: int) -> Tensor:
    """A queue to start from: fp32 [num_keys, dim], directions uniform on the sphere."""
    return F.normalize(torch.randn(num_keys, dim), dim=1)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write the keys over the oldest in the queue, in place; more keys than it holds leave the last of them.

    Args:
        queue: [K, C]; K need not be a multiple of the number of keys.
        pointer: int64 [1] on the queue's device: the place of the oldest key. Nothing is read back to the host.
        keys: [N, C], oldest first.
    """
    size, num_keys = len(queue), len(keys)
    kept = keys[-size:]
    first = pointer + (num_keys - len(kept))
    places = (first + torch.arange(len(kept), device=queue.device)) % size
    queue.index_copy_(0, places, kept.to(queue.dtype))
    pointer.add_(num_keys).remainder_(size)


@torch.no_grad()
def update_moving_average(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """Equation 2 of the MoCo paper, in place: average = momentum * average + (1 - momentum) * current."""
    torch._foreach_lerp_(list(average), list(current), 1 - momentum)


def shuffle_permutation(num_images: int, seed: int) -> Tensor:
    """A uniformly random order of the global batch, int64 [num_images] on the CPU: the same wherever the seed is."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))


def unshuffle(features: Tensor, permutation: Tensor) -> Tensor:
    """Undo a shuffle: row i of the features [N, ...] belongs to image `permutation[i]`, and becomes that row."""
    places = permutation.to(features.device, non_blocking=True)
    return torch.empty_like(features).index_copy_(0, places, features)
