"""smp's U-Net decoder, without upsampled and concatenated images: they are only ever convolved."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_POSITIONS = 1024
"""Of a batch's pixels before upsampling: with fewer, combining the weights costs more than it saves."""


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

    Every pixel of x is there four times over, so that of the nine weights that meet a pixel of the upsampled image
    several meet one pixel of x. Their sums, taken beforehand, make a 4x4 transposed convolution of stride 2: 16
    multiplications for a pixel of x instead of 4 x 9. The convolution of the skip is added to that.

    Args:
        x: [B, C, H, W].
        skip: [B, S, 2H, 2W], or None.
        weight: [out_channels, C + S, 3, 3].
    """
    if x.shape[0] * x.shape[2] * x.shape[3] < MIN_POSITIONS:
        upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(upsampled if skip is None else torch.cat((upsampled, skip), dim=1), weight, padding=1)
    num_channels = x.shape[1]
    padded = F.pad(
        weight[:, :num_channels].flip(2, 3).transpose(0, 1), (1, 1, 1, 1)
    )  # transposed kernels run backwards
    summed = padded[:, :, 1:, 1:] + padded[:, :, :-1, 1:] + padded[:, :, 1:, :-1] + padded[:, :, :-1, :-1]
    if weight.is_contiguous(memory_format=torch.channels_last):
        summed = summed.contiguous(memory_format=torch.channels_last)
    out = F.conv_transpose2d(x, summed, stride=2, padding=1)
    return out if skip is None else out + F.conv2d(skip, weight[:, num_channels:], padding=1)
