import pytest
import torch

from training.loss_scale import SkippedSteps

CPU = torch.device("cpu")


def step(scaler: torch.amp.GradScaler, weight: torch.Tensor, optimizer: torch.optim.Optimizer, factor: float) -> None:
    optimizer.zero_grad()
    scaler.scale(weight.sum() * factor).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_whose_gradients_overflow_are_counted_though_the_scale_grows_in_between(fused: bool) -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    skipped = SkippedSteps(scaler, CPU)
    for factor in (1, float("inf"), 1, 1, 1, 1, float("nan"), 1):
        step(scaler, weight, optimizer, factor)
        skipped.add_step()
    assert skipped.line() == {"skipped_steps": 2}
    assert skipped.line() == {"skipped_steps": 0}
    step(scaler, weight, optimizer, float("inf"))
    skipped.add_step()
    assert skipped.line() == {"skipped_steps": 1}


def test_without_scaling_there_is_nothing_to_tell() -> None:
    skipped = SkippedSteps(torch.amp.GradScaler("cpu", enabled=False), CPU)
    skipped.add_step()
    assert skipped.line() == {}
