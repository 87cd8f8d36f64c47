import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.discriminator import PatchDiscriminator, adversarial_loss, discriminator_loss


@pytest.fixture
def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator()


@pytest.fixture
def real() -> Tensor:
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fake() -> Tensor:
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(2))


def score_float64(discriminator: PatchDiscriminator, images: Tensor) -> Tensor:
    """The published network, written out from its description."""
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    x = images.double()
    for number, (layer, stride) in enumerate(zip(convolutions, (2, 2, 2, 1, 1), strict=True)):
        bias = None if layer.bias is None else layer.bias.double()
        x = F.conv2d(x, layer.weight.double(), bias, stride=stride, padding=1)
        if number in (1, 2, 3):
            mean = x.mean((2, 3), keepdim=True)
            variance = (x - mean).square().mean((2, 3), keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt()
        if number < 4:
            x = torch.where(x > 0, x, 0.2 * x)
    return x


def test_geometry_is_as_published(discriminator: PatchDiscriminator) -> None:
    assert discriminator(torch.rand(1, 1, 224, 224)).shape == (1, 1, 28, 28)
    shapes = [tuple(p.shape) for p in discriminator.parameters() if p.dim() == 4]
    assert shapes == [(64, 1, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3), (1, 512, 3, 3)]


def test_weights_start_as_published(discriminator: PatchDiscriminator) -> None:
    weights = torch.cat([p.detach().flatten() for p in discriminator.parameters() if p.dim() == 4]).double()
    assert weights.mean().abs() < 5 * 0.02 / len(weights) ** 0.5
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert all(not p.any() for p in discriminator.parameters() if p.dim() == 1)


def test_scores_follow_the_published_description(discriminator: PatchDiscriminator, real: Tensor) -> None:
    torch.testing.assert_close(discriminator(real).double(), score_float64(discriminator, real), rtol=1e-4, atol=1e-5)


def test_one_pass_for_real_and_fake_is_two_passes(
    discriminator: PatchDiscriminator, real: Tensor, fake: Tensor
) -> None:
    separate = copy.deepcopy(discriminator)
    loss = discriminator_loss(discriminator, real, fake)
    loss.backward()
    expected = 0.5 * (F.mse_loss(separate(real), torch.ones(2, 1, 4, 4)) + separate(fake).square().mean())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for one, two in zip(discriminator.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-7)


def test_losses_are_their_closed_forms(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor) -> None:
    on_real, on_fake = score_float64(discriminator, real), score_float64(discriminator, fake)
    expected = 0.5 * ((on_real - 1) ** 2).mean() + 0.5 * (on_fake**2).mean()
    assert discriminator_loss(discriminator, real, fake).item() == pytest.approx(expected.item(), rel=1e-5)
    assert adversarial_loss(discriminator, fake).item() == pytest.approx(((on_fake - 1) ** 2).mean().item(), rel=1e-5)


def test_losses_stay_in_fp32_under_autocast(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(real).dtype == torch.bfloat16
        assert discriminator_loss(discriminator, real, fake).dtype == torch.float32
        assert adversarial_loss(discriminator, fake).dtype == torch.float32


def test_real_images_may_be_uint8(discriminator: PatchDiscriminator, fake: Tensor) -> None:
    real = torch.randint(0, 256, fake.shape, dtype=torch.uint8)
    loss = discriminator_loss(discriminator, real, fake)
    torch.testing.assert_close(loss, discriminator_loss(discriminator, real.double().div(255).float(), fake))


def test_the_discriminators_loss_gives_the_generator_no_gradient(
    discriminator: PatchDiscriminator, real: Tensor, fake: Tensor
) -> None:
    fake.requires_grad_()
    discriminator_loss(discriminator, real, fake).backward()
    assert fake.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_the_generators_loss_gives_the_discriminator_no_gradient_and_the_generator_all_of_it(
    discriminator: PatchDiscriminator, fake: Tensor
) -> None:
    trained = copy.deepcopy(discriminator)
    ours, theirs = fake.clone().requires_grad_(), fake.clone().requires_grad_()
    adversarial_loss(discriminator, ours).backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())
    (trained(theirs) - 1).square().mean().backward()
    assert theirs.grad.abs().max() > 0
    torch.testing.assert_close(ours.grad, theirs.grad)
