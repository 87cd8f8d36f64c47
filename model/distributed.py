"""The collectives that training needs: on one rank each is the identity or does nothing.

A *global batch* is the ranks' batches of equal size, one after the other in the order of the ranks.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")

TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for one another: longer than rank 0 may need to write checkpoints and exports on a slow disk."""


def init_from_environment(device: torch.device) -> None:
    """Join the ranks that torchrun started, over NCCL on GPUs and gloo on the CPU; `device` is this rank's own.

    Reads torchrun's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without them this is the only rank.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if on_gpu else None)


def shutdown() -> None:
    """Leave the other ranks. A rank that ends without this makes NCCL complain."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all, 0 first."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its own machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world_size() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the rank that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: _T) -> list[_T]:
    """Every rank's value, which must pickle, in the order of the ranks; on ranks other than 0 an empty list."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values or []


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite the tensors with rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors of one shape, as a new tensor."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of the ranks' floating-point tensors of one shape, as a new tensor."""
    return all_reduce_sum(tensor) / world_size()


def all_gather(tensor: Tensor) -> Tensor:
    """The ranks' tensors [B, ...] as [world size * B, ...], in the order of the ranks. Carries no gradient."""
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def exchange(images: Tensor, permutation: Tensor) -> Tensor:
    """This rank's share of the permuted global batch.

    Args:
        images: This rank's share of the global batch, [B, ...], of any dtype.
        permutation: int64 [world size * B] on the CPU, the same on every rank.

    Returns:
        [B, ...]: rank r gets the images `permutation[r * B : (r + 1) * B]` of the global batch, in that order. Every
        image travels to one rank only, unlike in an all-gather.
    """
    size, ranks, here, device = images.shape[0], world_size(), rank(), images.device
    if ranks == 1:
        return images[permutation.to(device, non_blocking=True)]
    # All counts and indices are computed on the CPU, from what every rank knows: no rank waits for its GPU here.
    holder = permutation // size
    taker = torch.arange(ranks * size) // size
    mine = holder == here
    outgoing = images[(permutation[mine] % size).to(device, non_blocking=True)]
    num_sent = torch.bincount(taker[mine], minlength=ranks).tolist()
    sources = holder[here * size : (here + 1) * size]
    num_received = torch.bincount(sources, minlength=ranks).tolist()
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, num_received, num_sent)
    # Images arrive sorted by the rank they come from, and from one rank in the order of the permutation.
    places = torch.argsort(sources, stable=True).to(device, non_blocking=True)
    return torch.empty_like(incoming).index_copy_(0, places, incoming)


def wrap_ddp(module: nn.Module, *, static_graph: bool = True) -> nn.Module:
    """The module with its gradients averaged over the ranks and its BN statistics left to each; itself on one rank.

    Every parameter must take part in every backward pass; with `static_graph`, which is faster, in the same graph, and
    then there is no `without_averaging` (torch 2.12 fails an assertion of its own).
    """
    if world_size() == 1:
        return module
    device = next(module.parameters()).device
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
    )


def without_averaging(module: nn.Module) -> AbstractContextManager[None]:
    """Passes in here add to this rank's own gradients; the next pass outside averages all that was added up."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()
