import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from errors import UserError
from model import optim
from model.unet import GreyConv2d

CPU, GPU = torch.device("cpu"), torch.device("cuda")

HAS_APEX = torch.cuda.is_available() and importlib.util.find_spec("amp_C") is not None

KINDS = [
    pytest.param("auto", CPU, id="auto"),
    pytest.param("torch", CPU, id="torch"),
    pytest.param(
        "apex", GPU, id="apex", marks=pytest.mark.skipif(not HAS_APEX, reason="needs a GPU and NVIDIA's apex")
    ),
]


def gradients(num_steps: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_steps, 4, 3)).astype(np.float32)


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, num_steps: int) -> np.ndarray:
    for gradient in gradients(num_steps):
        optimizer.zero_grad()
        (parameter * torch.tensor(gradient, device=parameter.device)).sum().backward()
        optimizer.step()
    return parameter.detach().cpu().numpy()


@pytest.mark.parametrize(("fused", "device"), KINDS)
def test_sgd_follows_its_definition(fused: str, device: torch.device) -> None:
    parameter = nn.Parameter(torch.linspace(-1, 1, 12, device=device).reshape(4, 3))
    expected, velocity = parameter.detach().double().cpu().numpy(), np.zeros((4, 3))
    sgd = optim.make_sgd([parameter], lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused, device=device)
    for gradient in gradients(6):
        velocity = 0.9 * velocity + gradient + 0.01 * expected
        expected = expected - 0.1 * velocity
    np.testing.assert_allclose(run(sgd, parameter, 6), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("fused", "device"), KINDS)
def test_adam_follows_its_definition(fused: str, device: torch.device) -> None:
    parameter = nn.Parameter(torch.linspace(-1, 1, 12, device=device).reshape(4, 3))
    expected, mean, square = parameter.detach().double().cpu().numpy(), np.zeros((4, 3)), np.zeros((4, 3))
    adam = optim.make_adam([parameter], lr=0.01, betas=(0.5, 0.999), fused=fused, device=device)
    for step, gradient in enumerate(gradients(6), start=1):
        mean = 0.5 * mean + 0.5 * gradient
        square = 0.999 * square + 0.001 * gradient.astype(np.float64) ** 2
        expected -= 0.01 * (mean / (1 - 0.5**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(run(adam, parameter, 6), expected, rtol=1e-5, atol=1e-6)


def test_fused_sgd_steps_a_channels_last_grey_stem_like_the_plain_loop() -> None:
    # Fused kernels walk through memory: a gradient in another memory format than its weights would be misread.
    stem, plain = (GreyConv2d(3, 8, 7).to(memory_format=torch.channels_last) for _ in range(2))
    plain.load_state_dict(stem.state_dict())
    ours = optim.make_sgd(stem.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused="auto", device=CPU)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=False)
    for image in torch.rand(3, 2, 1, 16, 16):
        for conv, optimizer in ((stem, ours), (plain, theirs)):
            optimizer.zero_grad()
            conv(image).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(stem.weight, plain.weight)


@pytest.fixture
def unrelated_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that is called apex and has no optimizers, as the one on the index."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("apex", None)


@pytest.mark.usefixtures("unrelated_apex")
def test_an_unrelated_apex_is_not_taken_for_nvidias() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    sgd = optim.make_sgd(parameters, lr=0.1, momentum=0.9, weight_decay=0.0, fused="auto", device=GPU)
    assert type(sgd) is torch.optim.SGD
    assert sgd.defaults["fused"] is True
    adam = optim.make_adam(parameters, lr=0.1, betas=(0.5, 0.999), fused="auto", device=GPU)
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["fused"] is True
    with pytest.raises(UserError, match=r"NVIDIA/apex.*container.*another one.*--fused torch"):
        optim.make_adam(parameters, lr=0.1, betas=(0.5, 0.999), fused="apex", device=GPU)


def test_apex_is_refused_on_the_cpu() -> None:
    with pytest.raises(UserError, match=r"--fused apex runs on GPUs only"):
        optim.make_sgd([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, weight_decay=0, fused="apex", device=CPU)


def test_cosine_goes_from_the_base_to_0() -> None:
    rates = [optim.learning_rate(0.03, "cosine", epoch, 40) for epoch in range(41)]
    assert rates[0] == 0.03
    assert rates[10] == pytest.approx(0.03 * (1 + math.sqrt(0.5)) / 2)
    assert rates[20] == pytest.approx(0.015)
    assert rates[40] == pytest.approx(0, abs=1e-12)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_schedules_are_torchs(schedule: str) -> None:
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.03)
    schedulers = {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=20),
        "step": torch.optim.lr_scheduler.MultiStepLR(reference, milestones=[12, 16], gamma=0.1),
    }
    for group in reference.param_groups:
        group["lr"] = 0.03
    for epoch in range(20):
        rate = optim.learning_rate(0.03, schedule, epoch, 20, drop_epochs=(12, 16))
        assert rate == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)
        reference.step()
        schedulers[schedule].step()


def test_momentum_is_clean_when_loss_scaling_skips_the_first_step() -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    sgd = optim.make_sgd([parameter], lr=1.0, momentum=0.9, weight_decay=0.0, fused="torch", device=CPU)
    scaler = torch.amp.GradScaler("cpu")
    stray = [torch.full((1000,), 7.0) for _ in range(50)]
    del stray  # what torch would take for the momentum
    for gradient in (math.inf, 1.0, 1.0):
        sgd.zero_grad()
        scaler.scale((parameter * gradient).sum()).backward()
        scaler.step(sgd)
        scaler.update()
    torch.testing.assert_close(parameter.detach(), torch.full((1000,), -1 - 1.9))


def test_a_learning_rate_is_set_in_place_where_it_is_a_tensor() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    sgd = optim.make_sgd([parameter], lr=0.1, momentum=0.9, weight_decay=0.0, fused="auto", device=CPU)
    optim.set_learning_rate(sgd, 0.2)
    assert sgd.param_groups[0]["lr"] == 0.2
    optim.learning_rate_in_tensor(sgd, CPU)
    tensor = sgd.param_groups[0]["lr"]
    assert tensor.item() == pytest.approx(0.2)
    optim.set_learning_rate(sgd, 0.05)
    assert sgd.param_groups[0]["lr"] is tensor
    parameter.sum().backward()
    sgd.step()
    assert parameter.item() == pytest.approx(-0.05)
