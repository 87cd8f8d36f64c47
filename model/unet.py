"""The network: a U-Net on a ResNet encoder with MoCo's projection on top of the encoder."""

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import decode
from model.device import at_least_fp32

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""The encoders whose tensors have the same names in segmentation_models_pytorch, torchvision and timm."""

SIZE_STEP_PX = 32
"""The encoder halves an image five times: the decoder takes sides that are multiples of this."""


def smp_unet(arch: str) -> smp.Unet:
    """A fresh 3-channel U-Net with one sigmoid output, as segmentation_models_pytorch builds it."""
    return smp.Unet(arch, encoder_weights=None, in_channels=3, classes=1, activation="sigmoid")


def to_unit_range(images: Tensor) -> Tensor:
    """Images as floating point in 0..1: uint8 0..255 become fp32; what is floating point already stays as it is."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class GreyConv2d(nn.Conv2d):
    """A convolution with 3-channel weights for a one-channel image.

    Convolution is linear in its input: applied to a grey image repeated over three channels it equals one with the
    weights summed over these channels. So the weights stay standard, and the image is read once instead of three times.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 1, H, W] to [B, out_channels, H', W']."""
        weight = self.weight.sum(dim=1, keepdim=True)
        if self.weight.is_contiguous(memory_format=torch.channels_last):
            # One channel fits either memory format: without a hint from the weights the stem would fall back to NCHW.
            weight = weight.to(memory_format=torch.channels_last)
        return self._conv_forward(images, weight, self.bias)


def grey_stem(conv: nn.Conv2d, kind: type[GreyConv2d] = GreyConv2d) -> GreyConv2d:
    """The same convolution, with the very same weights, for one-channel images."""
    grey = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None
    )
    grey.weight, grey.bias = conv.weight, conv.bias
    return grey


class UNet(nn.Module):
    """A ResNet encoder with MoCo-v2's projection and, for the query network, a U-Net decoder.

    Its tensors named `encoder.`, `decoder.` and `segmentation_head.` are the state dict of `smp.Unet(arch)`.

    Args:
        arch: One of `ARCHS`.
        embedding_dim: Length of the embedding.
        with_decoder: False for the key network, whose `decoder` and `segmentation_head` are None.
    """

    def __init__(self, arch: str, embedding_dim: int, *, with_decoder: bool) -> None:
        super().__init__()
        unet = smp_unet(arch)
        self.encoder = unet.encoder
        self.encoder.conv1 = grey_stem(self.encoder.conv1)
        self.decoder = unet.decoder if with_decoder else None
        self.segmentation_head = unet.segmentation_head if with_decoder else None
        width = self.encoder.out_channels[-1]
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embedding_dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embed the images and, with a decoder, restore them.

        Args:
            images: [B, 1, H, W], uint8 0..255 or floating point 0..1; H and W multiples of `SIZE_STEP_PX`.

        Returns:
            The embedding, fp32 [B, embedding_dim] of unit length, and the reconstruction, fp32 [B, 1, H, W] in 0..1,
            or None without a decoder. Both end in fp32 under autocast too.
        """
        features = self.encoder(to_unit_range(images))
        embedding = F.normalize(at_least_fp32(self.projection(features[-1].mean(dim=(2, 3)))), dim=1)
        if self.decoder is None:
            return embedding, None
        logits = self.segmentation_head[0](decode(self.decoder, features))  # what follows in the head is its sigmoid
        return embedding, torch.sigmoid(at_least_fp32(logits))
