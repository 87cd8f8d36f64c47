"""Collectives, on this process alone and on two processes that gloo joins."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model import distributed

RANKS = 2
SIZES = (1, 3, 4)


def run_on_ranks(function: Callable[[Path], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What a module-level function returns on each of two fresh processes, which find each other as under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (function, port, folder), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _enter(rank: int, function: Callable[[Path], dict[str, Any]], port: int, folder: Path) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    distributed.init_from_environment(torch.device("cpu"))
    result = function(folder)
    distributed.shutdown()
    torch.save(result, folder / f"rank{rank}.pt")


def global_batch(size: int) -> torch.Tensor:
    """Distinct uint8 images for `size` images a rank."""
    return torch.arange(RANKS * size * 6).to(torch.uint8).reshape(RANKS * size, 1, 2, 3)


def permutations(size: int) -> list[torch.Tensor]:
    """Some orders of the global batch: as it is, reversed, and random ones."""
    rng = np.random.default_rng(size)
    total = RANKS * size
    return [torch.arange(total), torch.arange(total).flip(0), *(torch.tensor(rng.permutation(total)) for _ in range(6))]


def _collectives(folder: Path) -> dict[str, Any]:
    rank = distributed.rank()
    result: dict[str, Any] = {
        "world_size": distributed.world_size(),
        "rank": rank,
        "local_rank": distributed.local_rank(),
        "local_world_size": distributed.local_world_size(),
        "is_main": distributed.is_main(),
        "gathered": distributed.all_gather(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * rank),
        "sum": distributed.all_reduce_sum(torch.tensor([1.0, 10.0]) * (rank + 1)),
        "mean": distributed.all_reduce_mean(torch.tensor(3.0 * rank)),
        "first given": [distributed.first_given(value) for value in (None, "both", rank if rank == 1 else None)],
        "objects": distributed.gather_objects(f"from rank {rank}"),
        "broadcast": [torch.full((2,), rank + 1.0), torch.tensor(10 * rank)],
    }
    distributed.broadcast(result["broadcast"])
    if distributed.is_main():
        time.sleep(0.3)  # without the barrier the other rank would be well past it by then
        (folder / "written").touch()
    distributed.barrier()
    result["seen after the barrier"] = (folder / "written").exists()
    for dtype in (torch.uint8, torch.float32):
        for size in SIZES:
            mine = global_batch(size)[rank * size : (rank + 1) * size].to(dtype)
            result[dtype, size] = [distributed.exchange(mine, permutation) for permutation in permutations(size)]
    torch.manual_seed(rank)
    wrapped = distributed.wrap_ddp(nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)))
    result["initial weight"] = wrapped.module[0].weight.detach().clone()
    for _ in range(2):  # buffers would be broadcast at the start of the second pass
        wrapped(torch.full((2, 3), rank + 1.0)).sum().backward()
    result["statistics"] = wrapped.module[1].running_mean
    linear = distributed.wrap_ddp(nn.Linear(3, 1, bias=False))
    linear(torch.full((1, 3), rank + 1.0)).sum().backward()
    result["gradient"] = linear.module.weight.grad
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(_collectives, tmp_path_factory.mktemp("ranks"))


def test_torchruns_variables_join_the_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [result["rank"] for result in ranks] == [0, 1]
    assert [result["local_rank"] for result in ranks] == [0, 1]
    assert [result["world_size"] for result in ranks] == [2, 2]
    assert [result["local_world_size"] for result in ranks] == [2, 2]
    assert [result["is_main"] for result in ranks] == [True, False]


def test_all_gather_keeps_the_order_of_the_ranks(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["gathered"].tolist() == [[1, 2], [3, 4], [11, 12], [13, 14]]


def test_every_rank_gets_the_sum_and_the_mean(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["sum"].tolist() == [3, 30]
        assert result["mean"].item() == 1.5


def test_rank_0_gets_every_ranks_object(ranks: list[dict[str, Any]]) -> None:
    assert [result["first given"] for result in ranks] == [[None, "both", 1]] * 2
    assert [result["objects"] for result in ranks] == [["from rank 0", "from rank 1"], []]


def test_every_rank_gets_rank_0s_object_and_tensors_and_waits_at_the_barrier(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert [tensor.tolist() for tensor in result["broadcast"]] == [[1, 1], 0]
        assert result["seen after the barrier"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_exchange_gives_each_rank_its_share_of_the_permuted_batch(
    ranks: list[dict[str, Any]], dtype: torch.dtype, size: int
) -> None:
    whole = global_batch(size).numpy()
    for rank, result in enumerate(ranks):
        for permutation, share in zip(permutations(size), result[dtype, size], strict=True):
            assert share.dtype == dtype
            np.testing.assert_array_equal(share.numpy(), whole[permutation.numpy()][rank * size : (rank + 1) * size])


def test_ddp_starts_equal_averages_gradients_and_leaves_bn_statistics_to_each_rank(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert torch.equal(first["initial weight"], second["initial weight"])
    for result in ranks:
        assert result["gradient"].tolist() == [[1.5, 1.5, 1.5]]
    torch.testing.assert_close(second["statistics"], 2 * first["statistics"])


def test_one_process_is_the_only_rank_and_collectives_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    distributed.init_from_environment(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.local_world_size() == 1
    assert distributed.is_main()
    tensor, module = torch.rand(4, 2), nn.Linear(2, 2)
    assert distributed.all_gather(tensor) is tensor
    assert distributed.all_reduce_sum(tensor) is tensor
    assert torch.equal(distributed.all_reduce_mean(tensor), tensor)
    assert distributed.gather_objects(module) == [module]
    distributed.broadcast([tensor])
    assert distributed.wrap_ddp(module) is module
    order = torch.tensor([2, 0, 3, 1])
    np.testing.assert_array_equal(distributed.exchange(tensor, order).numpy(), tensor.numpy()[[2, 0, 3, 1]])
    distributed.barrier()
    distributed.shutdown()
