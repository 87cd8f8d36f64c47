import copy

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn

from model.unet import ARCHS, GreyConv2d, UNet


def network(*, with_decoder: bool = True) -> UNet:
    torch.manual_seed(0)
    return UNet("resnet18", 16, with_decoder=with_decoder)


def images(size_px: int = 64) -> torch.Tensor:
    return torch.randint(
        0, 256, (2, 1, size_px, size_px), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def plain_smp_unet(unet: UNet) -> smp.Unet:
    """The 3-channel network of smp with the same weights."""
    plain = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1, activation="sigmoid")
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith("projection.")})
    return plain


@pytest.mark.parametrize("bias", [False, True])
def test_grey_convolution_is_the_3_channel_one_on_the_repeated_image(bias: bool) -> None:
    grey = GreyConv2d(3, 8, kernel_size=7, stride=2, padding=3, bias=bias).double()
    plain = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3, bias=bias).double()
    plain.load_state_dict(grey.state_dict())
    image = torch.rand(2, 1, 33, 40, dtype=torch.float64)
    ours, theirs = grey(image), plain(image.repeat(1, 3, 1, 1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(grey.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)


def test_encoder_is_smps_on_the_repeated_image() -> None:
    unet = network().double()
    plain = plain_smp_unet(unet).double()
    image = torch.rand(2, 1, 64, 64, dtype=torch.float64)
    for ours, theirs in zip(unet.encoder(image)[1:], plain.encoder(image.repeat(1, 3, 1, 1))[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_reconstruction_is_smps_on_the_repeated_image_and_the_embedding_follows_its_definition() -> None:
    unet = network().eval()
    plain = plain_smp_unet(unet).eval()
    image = images().repeat(1, 3, 1, 1) / 255
    embedding, reconstruction = unet(images())
    torch.testing.assert_close(reconstruction, plain(image), rtol=1e-4, atol=1e-5)
    pooled = plain.encoder(image)[-1].double().flatten(2).mean(2)
    first, _, last = unet.projection
    hidden = (pooled @ first.weight.double().T + first.bias).clamp(min=0)
    projected = hidden @ last.weight.double().T + last.bias
    expected = projected / projected.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(embedding.double(), expected, rtol=1e-4, atol=1e-5)


def test_encoder_decoder_and_head_are_an_smp_state_dict_in_its_order() -> None:
    names = [name for name in network().state_dict() if name.startswith(("encoder.", "decoder.", "segmentation_head."))]
    assert names == list(smp.Unet("resnet18", encoder_weights=None).state_dict())


@pytest.mark.parametrize("arch", ARCHS)
def test_encoders_have_torchvisions_and_timms_names_and_shapes(arch: str) -> None:
    with torch.device("meta"):
        encoder = UNet(arch, 8, with_decoder=False).encoder
        others = [torchvision.models.get_model(arch), timm.create_model(arch)]
    ours = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    for other in others:
        assert ours == {name: t.shape for name, t in other.state_dict().items() if not name.startswith("fc.")}


def test_uint8_images_are_read_as_0_to_1() -> None:
    unet = network().eval()
    for from_bytes, from_floats in zip(unet(images()), unet(images().double().div(255).float()), strict=True):
        torch.testing.assert_close(from_bytes, from_floats)


def test_without_decoder_the_embedding_is_the_same_and_nothing_else_is_there() -> None:
    whole, key = network(), network(with_decoder=False)
    key.load_state_dict({name: whole.state_dict()[name] for name in key.state_dict()})
    assert {name.split(".")[0] for name in key.state_dict()} == {"encoder", "projection"}
    embedding, reconstruction = key(images())
    assert reconstruction is None
    assert torch.equal(embedding, whole(images())[0])


def test_under_bf16_autocast_the_stem_runs_in_bf16_and_outputs_end_in_fp32() -> None:
    unet = network()
    seen = {}
    unet.encoder.bn1.register_forward_pre_hook(lambda _, args: seen.update(stem=args[0].dtype))
    unet.segmentation_head[0].register_forward_hook(lambda *call: seen.update(logits=call[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        embedding, reconstruction = unet(images())
    assert seen["stem"] == torch.bfloat16
    assert embedding.dtype == reconstruction.dtype == torch.float32
    lengths = embedding.double().square().sum(1).sqrt()
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0)  # bf16 would be off by 1e-3
    torch.testing.assert_close(reconstruction.double(), torch.sigmoid(seen["logits"].double()), rtol=1e-6, atol=0)
    assert reconstruction.min() >= 0
    assert reconstruction.max() <= 1


def test_channels_last_weights_make_every_feature_channels_last() -> None:
    unet = network().to(memory_format=torch.channels_last)
    features = unet.encoder(images().float())[1:]
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)
    plain = copy.deepcopy(unet).to(memory_format=torch.contiguous_format).encoder(images().float())[1:]
    assert plain[0].is_contiguous()
    for one, other in zip(features, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_compiles_as_one_graph() -> None:
    unet = network()
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    embedding, reconstruction = compiled(images())
    (embedding.sum() + reconstruction.sum()).backward()
    expected = copy.deepcopy(unet)(images())
    torch.testing.assert_close((embedding, reconstruction), expected, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is not None for parameter in unet.parameters())
