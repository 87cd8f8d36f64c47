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

from model import rendezvous

_T = TypeVar("_T")

_control: dist.ProcessGroup | None = None
"""All ranks over gloo, whatever the tensors go over: what the hosts tell one another waits for no device."""
_start = ""
"""What tells this start of the ranks from earlier ones in the same store."""

TIMEOUT_S = 1800.0
"""How long ranks wait for one another: longer than rank 0 may need to write exports on a slow disk."""


def init_from_environment(device: torch.device, timeout_s: float = TIMEOUT_S) -> None:
    """Join the ranks that torchrun started, over NCCL on GPUs and gloo on the CPU; `device` is this rank's own.

    Reads torchrun's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without them this is the only rank. After
    `timeout_s` a `watchdog.Watchdog` names the rank that is waited for; the collectives themselves, which can't, give
    up a minute later.
    """
    global _control, _start  # noqa: PLW0603 - like torch's default group they belong to the process
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        timeout = timedelta(seconds=timeout_s + 60)
        here = int(os.environ["RANK"])
        store = rendezvous.connect(timeout)
        _start = rendezvous.agree_on_start(store, here, ranks, timeout)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(_start, store),
            rank=here,
            world_size=ranks,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        _control = dist.new_group(backend="gloo", timeout=timeout)


def shutdown() -> None:
    """Leave the other ranks. A rank that ends without this makes NCCL complain."""
    global _control  # noqa: PLW0603
    if dist.is_initialized():
        _control = None
        dist.destroy_process_group()


def open_store(timeout_s: float) -> dist.Store:
    """A connection of one's own to the ranks' common store, for a thread to use."""
    return dist.PrefixStore(_start, rendezvous.connect(timedelta(seconds=timeout_s)))


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


class Votes:
    """Lets every rank learn, after each step, whether any has asked for something, without waiting for the device.

    The hosts exchange the votes beside the next step, at whose end they are read: every rank gets the same answer after
    the same step, for some microseconds of its host's time.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def exchange(self, vote: bool) -> bool:
        """Cast this rank's vote; return whether any rank voted for it: in the call before, or on one rank in this."""
        if world_size() == 1:
            return vote
        was_asked = self.close()
        votes = torch.tensor([int(vote)])
        self._pending = dist.all_reduce(votes, dist.ReduceOp.MAX, group=_control, async_op=True), votes
        return was_asked

    def close(self) -> bool:
        """Wait for the votes that are on their way, as at the end, and return what they say."""
        if self._pending is None:
            return False
        work, votes = self._pending
        work.wait()
        self._pending = None
        return bool(votes)


def broadcast_object(value: _T) -> _T:
    """Rank 0's value, which must pickle, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0, group=_control)
    return values[0]


def first_given(value: _T | None) -> _T | None:
    """The first rank's value that is not None, which must pickle, on every rank; None where all are."""
    given = [found for found in gather_objects(value) if found is not None]
    return broadcast_object(given[0] if given else None)


def gather_objects(value: _T) -> list[_T]:
    """Every rank's value, which must pickle, in the order of the ranks; on ranks other than 0 an empty list."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0, group=_control)
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
