"""What only a GPU can show: no wait between log intervals, and CUDA graphs that train as the eager step does."""

from collections.abc import Iterator

import pytest
import torch

from tests.test_step import small_batch, small_learner
from training.graphs import NUM_EAGER_STEPS, GraphedStep
from training.run import Meter
from training.step import train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
PRECISIONS = ["fp32", "fp16", "bf16"]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """CUDA raises wherever the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def skip_without(precision: str) -> None:
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bf16")


@pytest.mark.parametrize("mode", ["di", "dir", "dira"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_host_never_waits_for_the_device_in_a_step(
    mode: str, precision: str, request: pytest.FixtureRequest
) -> None:
    skip_without(precision)
    learner, batch, meter = small_learner(mode, GPU, precision=precision), small_batch(0, GPU), Meter()
    meter.add(train_step(learner, batch), 0.0)
    request.getfixturevalue("waiting_is_an_error")
    for _ in range(3):
        meter.add(train_step(learner, batch), 0.0)
        learner.step += 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graphed_step_trains_as_the_eager_step_does(precision: str) -> None:
    skip_without(precision)
    eager, graphed = (small_learner("dira", GPU, precision=precision) for _ in range(2))
    replay = GraphedStep(graphed)
    for step in range(NUM_EAGER_STEPS + 5):
        expected, terms = train_step(eager, small_batch(step, GPU)), replay(graphed, small_batch(step, GPU))
        torch.testing.assert_close(terms, expected, rtol=0.05, atol=5e-3)
        eager.step += 1
        graphed.step += 1
    assert torch.equal(graphed.model.queue_ptr, eager.model.queue_ptr)
    torch.testing.assert_close(graphed.model.queue, eager.model.queue, rtol=0.1, atol=0.05)
