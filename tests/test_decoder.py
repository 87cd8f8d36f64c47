import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from model import decoder


@pytest.mark.parametrize("num_skip", [0, 3])
@pytest.mark.parametrize("many_channels", [0, 10**6])
def test_it_is_the_convolution_of_the_upsampled_image_and_so_are_its_gradients(
    num_skip: int, many_channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "MANY_CHANNELS", many_channels)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, weight = draw(2, 4, 5, 6), draw(7, 4 + num_skip, 3, 3)
    skip = draw(2, num_skip, 10, 12) if num_skip else None
    upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
    plain = F.conv2d(upsampled if skip is None else torch.cat((upsampled, skip), dim=1), weight, padding=1)
    ours = decoder.conv_of_upsampled(x, skip, weight)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    inputs = [tensor for tensor in (x, weight, skip) if tensor is not None]
    gradients = zip(*(torch.autograd.grad(out.sin().sum(), inputs) for out in (ours, plain)), strict=True)
    for our_gradient, their_gradient in gradients:
        torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("many_channels", [0, 10**6])
def test_the_decoder_is_smps(many_channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "MANY_CHANNELS", many_channels)
    torch.manual_seed(0)
    unet = smp.Unet("resnet18", encoder_weights=None).double()
    features = unet.encoder(torch.rand(2, 3, 64, 96, dtype=torch.float64))
    torch.testing.assert_close(decoder.decode(unet.decoder, features), unet.decoder(features), rtol=1e-9, atol=1e-10)
