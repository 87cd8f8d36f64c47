"""smp's U-Net decoder, without upsampled and concatenated images: they are only ever convolved."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY_CHANNELS = 512
"""From so many on, fewer multiplications pay for more additions; narrower inputs gained nothing on a CPU."""


def decode(decoder: nn.Module, features: list[Tensor]) -> Tensor:
    """The same as `decoder(features)` of `smp.Unet`, for sides that each level of the encoder halves exactly.

    Args:
        decoder: Of `smp.Unet`, without attention.
        features: What its encoder gives, the image first.
    """
    *skips, x = features[1:]
    for block, skip in zip(decoder.blocks, [*reversed(skips), None], strict=True):
        conv, norm, activation = block.conv1
        x = block.conv2(activation(norm(conv_of_upsampled(x, skip, conv.weight))))
    return x


def conv_of_upsampled(x: Tensor, skip: Tensor | None, weight: Tensor) -> Tensor:
    """A 3x3 convolution, padding 1, of x at twice its size (nearest) with the skip's channels after its own.

    Every pixel of x is there four times over, so 36 multiplications a pixel are more than are needed. The convolution
    of the skip is added to what is left of them.

    Args:
        x: [B, C, H, W].
        skip: [B, S, 2H, 2W], or None.
        weight: [out_channels, C + S, 3, 3].
    """
    num_channels = x.shape[1]
    upsample_and_convolve = convolve_then_add if num_channels >= MANY_CHANNELS else convolve_with_sums
    out = upsample_and_convolve(x, weight[:, :num_channels])
    return out if skip is None else out + F.conv2d(skip, weight[:, num_channels:], padding=1)


def convolve_with_sums(x: Tensor, weight: Tensor) -> Tensor:
    """With 16 multiplications a pixel of x [B, C, H, W]: weights that meet the same one are added up beforehand.

    Their sums make a 4x4 transposed convolution of stride 2.
    """
    padded = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))  # transposed kernels run backwards
    summed = padded[:, :, 1:, 1:] + padded[:, :, :-1, 1:] + padded[:, :, 1:, :-1] + padded[:, :, :-1, :-1]
    if x.is_contiguous(memory_format=torch.channels_last):
        summed = summed.contiguous(memory_format=torch.channels_last)
    return F.conv_transpose2d(x, summed, stride=2, padding=1)


def convolve_then_add(x: Tensor, weight: Tensor) -> Tensor:
    """With 9 multiplications a pixel of x [B, C, H, W]: each weight meets each pixel once, and the products are added.

    That pays where there are many input channels for an output channel: the additions don't see the former.
    """
    num_out, num_channels = weight.shape[:2]
    taps = weight.permute(2, 3, 0, 1).reshape(9 * num_out, num_channels, 1, 1)
    products = F.conv2d(x, taps).permute(0, 2, 3, 1).unflatten(3, (3, 3, num_out))  # [B, H, W, 3, 3, out_channels]
    rows = add_taps(products, dim=1)  # [B, 2H, W, 3, out_channels]
    return add_taps(rows, dim=2).permute(0, 3, 1, 2)


def add_taps(products: Tensor, dim: int) -> Tensor:
    """Along one axis, where it is upsampled, add up what the kernel's three weights made of x.

    The upsampled positions 2i and 2i + 1 both hold x[i]. So around 2i the kernel meets x[i - 1], x[i] and x[i], and
    around 2i + 1 it meets x[i], x[i] and x[i + 1]; beyond the border there are zeros.

    Args:
        products: The axis has number `dim`, the three weights number 3.
        dim: Its length doubles, and the axis of the weights goes.
    """
    before, here, after = products.unbind(3)
    last = products.shape[dim] - 1
    even, odd = here + after, before + here
    even = torch.cat((even.narrow(dim, 0, 1), even.narrow(dim, 1, last) + before.narrow(dim, 0, last)), dim)
    odd = torch.cat((odd.narrow(dim, 0, last) + after.narrow(dim, 1, last), odd.narrow(dim, last, 1)), dim)
    return torch.stack((even, odd), dim + 1).flatten(dim, dim + 1)
