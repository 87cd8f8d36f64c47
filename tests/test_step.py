"""The step: never waits for the device, compiles whole, and gives in micro-batches what it gives in one batch."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from errors import UsageError
from model import distributed
from pipeline.spec import Batch
from settings import Settings
from tests.test_dira import images
from tests.test_distributed import RANKS, run_on_ranks
from tests.test_plain_step import in_float64
from training.graphs import GraphedStep
from training.learner import Learner, build_learner
from training.step import train_step

CPU = torch.device("cpu")
NUM_IMAGES = 8
SIZE_PX = 32


def small_settings(mode: str = "dira", device: torch.device = CPU, **changes: Any) -> Settings:
    settings = {"arch": "resnet18", "crop_size": SIZE_PX, "moco_k": 24, "key_bn_groups": 2, "batch_size": NUM_IMAGES}
    settings |= {"precision": "fp32", "device": device.type, "moco_m": 0.9, "adv_weight": 0.1, "fused": "torch"}
    return Settings(shards=("none",), mode=mode, **settings | changes)


def small_learner(mode: str = "dira", device: torch.device = CPU, **changes: Any) -> Learner:
    return build_learner(small_settings(mode, device, **changes), device)


def small_batch(seed: int, device: torch.device = CPU) -> Batch:
    """This rank's share of a global batch of smooth images."""
    views = (images(NUM_IMAGES, 10 * seed + i)[:, :, ::2, ::2] for i in range(3))
    return Batch(*(view.chunk(distributed.world_size())[distributed.rank()].to(device) for view in views))


def take_steps(learner: Learner, num_steps: int) -> list[list[float]]:
    terms = []
    for step in range(num_steps):
        terms.append(distributed.all_reduce_mean(train_step(learner, small_batch(step, learner.device))).tolist())
        learner.step += 1
    return terms


class ReadsFromDevice(TorchDispatchMode):
    """Notes the operators that hand a value, or a shape that depends on values, from the device to the host.

    On a CPU `tolist` goes unseen: tests/test_gpu.py has CUDA itself look.
    """

    def __enter__(self) -> Self:
        self.seen: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}:
            self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", ["di", "dir", "dira"])
def test_a_step_reads_nothing_back_from_the_device(mode: str) -> None:
    learner = small_learner(mode, precision="bf16")
    with ReadsFromDevice() as reads:
        terms = train_step(learner, small_batch(0))
    assert not reads.seen
    with ReadsFromDevice() as reads:
        terms[0].item()
    assert reads.seen, "the claim above can fail"


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_networks_have_no_graph_breaks_and_train_as_before() -> None:
    """`fullgraph` raises at a break. `aot_eager` generates no code: what is tested is that each graph is whole."""
    compiled, eager = small_learner(precision="bf16"), small_learner(precision="bf16")
    for network in (compiled.model.query, compiled.model.key, compiled.model.discriminator):
        network.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(take_steps(compiled, 2), take_steps(eager, 2), strict=True):
        assert ours == pytest.approx(theirs, rel=3e-2)


def freeze_batch_norm(learner: Learner) -> None:
    """Micro-batches and ranks differ in the statistics that BN takes: with these frozen nothing is left."""
    learner.model.query.eval()
    learner.model.key.eval()


def _states(learner: Learner) -> dict[str, Tensor]:
    return copy.deepcopy(learner.model.state_dict())


def _train_in_float64(accumulate: int) -> dict[str, Any]:
    learner = in_float64(small_settings(accumulate=accumulate))
    freeze_batch_norm(learner)
    views = [Batch(*(view.double() / 255 for view in small_batch(step))) for step in range(3)]
    terms = []
    for batch in views:
        terms.append(distributed.all_reduce_mean(train_step(learner, batch)))
        learner.step += 1
    return {"terms": torch.stack(terms), "state": _states(learner)}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return _train_in_float64(1)


def assert_same_training(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    torch.testing.assert_close(ours["terms"], reference["terms"], rtol=1e-9, atol=0)
    for name, tensor in reference["state"].items():
        torch.testing.assert_close(ours["state"][name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def test_micro_batches_train_as_the_whole_batch_does(alone: dict[str, Any]) -> None:
    assert alone["terms"].dtype == torch.float64
    assert_same_training(_train_in_float64(4), alone)


def _on_a_rank(_: Path) -> dict[str, Any]:
    float64 = {"whole": _train_in_float64(1), "parts": _train_in_float64(2)}
    return {**float64, "with_bn": take_steps(small_learner(key_bn_groups=1), 3), **_count_collectives()}


def _count_collectives() -> dict[str, Any]:
    """Numbers that each kind of collective moves in a step after the first, in which DDP finds its buckets."""
    learner = small_learner()
    take_steps(learner, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        train_step(learner, small_batch(2))
    sizes: dict[str, list[int]] = {}
    for event in profile.events():
        if event.name.startswith("gloo:"):
            sizes.setdefault(event.name, []).append(sum(torch.Size(shape).numel() for shape in event.input_shapes))
    networks = {"query": learner.model.query, "discriminator": learner.model.discriminator}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return {"sizes": sizes, "parameters": counts}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(_on_a_rank, tmp_path_factory.mktemp("ranks"))


def test_ranks_train_as_one_with_the_whole_batch_also_in_micro_batches(
    alone: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    assert len(two_ranks) == RANKS
    for result in two_ranks:
        assert_same_training(result["whole"], alone)
        assert_same_training(result["parts"], alone)


def test_with_bn_on_two_ranks_stay_near_one_rank(two_ranks: list[dict[str, Any]]) -> None:
    """BN sees half as many images on each: the losses of the first steps agree only roughly."""
    one = torch.tensor(take_steps(small_learner(key_bn_groups=1), 3))
    for result in two_ranks:
        torch.testing.assert_close(torch.tensor(result["with_bn"]), one, rtol=0.1, atol=0.02)


def test_a_step_averages_each_gradient_once_and_exchanges_images_and_keys_once(
    two_ranks: list[dict[str, Any]],
) -> None:
    for result in two_ranks:
        sizes, parameters = result["sizes"], result["parameters"]
        assert sum(sizes["gloo:all_reduce"]) == parameters["query"] + parameters["discriminator"]
        assert len(sizes["gloo:all_to_all"]) == 1
        assert len(sizes["gloo:all_gather"]) == 1


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(UsageError, match="--batch-size 8 can't be shared out evenly over 1 ranks of 3 micro-batches"):
        small_learner(accumulate=3)


def test_cuda_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(UsageError, match="--cuda-graphs needs a GPU"):
        GraphedStep(small_learner())
