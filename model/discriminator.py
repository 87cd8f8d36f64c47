"""The adversarial term: a patch discriminator with least-squares losses.

Patches: Isola et al. 2017, https://arxiv.org/abs/1611.07004; losses: Mao et al. 2017, https://arxiv.org/abs/1611.04076.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.device import at_least_fp32
from model.unet import to_unit_range


class PatchDiscriminator(nn.Module):
    """Tells real images from restored ones, patch by patch: [B, 1, H, W] in 0..1 to [B, 1, H / 8, W / 8] (any range).

    3x3 convolutions throughout. InstanceNorm takes no statistics across images, so each is judged on its own.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for num_in, num_out, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [
                nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),  # the norm would take a bias away again
                nn.InstanceNorm2d(num_out),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 3, padding=1))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Score every patch: near 1 where it looks real, near 0 where it looks restored."""
        return self.layers(images)


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's own loss, 0.5 * (mean (D(real) - 1)^2 + mean D(fake)^2), in fp32.

    Args:
        discriminator: A `PatchDiscriminator`, plain or wrapped. It is called once, so that DDP sees one pass.
        real: [B, 1, H, W], uint8 0..255 or floating point 0..1.
        fake: Floating point [B, 1, H, W] in 0..1. No gradient flows back to what made it.
    """
    images = torch.cat((to_unit_range(real), fake.detach()))
    on_real, on_fake = at_least_fp32(discriminator(images)).chunk(2)
    return 0.5 * ((on_real - 1).square().mean() + on_fake.square().mean())


def adversarial_loss(discriminator: PatchDiscriminator, fake: Tensor) -> Tensor:
    """The generator's loss, mean (D(fake) - 1)^2, in fp32, with the discriminator frozen.

    Its backward pass computes no weight gradients. Hand over the plain module: DDP has nothing to do here.
    """
    with _frozen(discriminator):
        return (at_least_fp32(discriminator(fake)) - 1).square().mean()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
