import copy
import io
from pathlib import Path
from urllib.error import URLError

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import Tensor, nn

from downstream.networks import (
    Classifier,
    NormalisedGreyConv2d,
    load_classifier,
    load_unet,
    open_classifier,
    save_classifier,
)
from errors import UserError
from model.checkpoint import FORMAT, VERSION, export_weights, save_checkpoint
from model.dira import DiRA
from model.unet import ARCHS, grey_stem
from tests import test_dira

ARCH = "resnet18"


def pretrained(mode: str = "dir") -> DiRA:
    """A small model whose every tensor, BN statistics too, is its own."""
    model = test_dira.build(mode, seed=0)
    for tensor in model.state_dict().values():
        tensor.add_(0.01 * torch.rand_like(tensor) if tensor.is_floating_point() else 3)
    return model


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resnet18.pth, resnet18.safetensors, unet.pth, unet/, and last.pt, of the same weights."""
    tmp_path, model = tmp_path_factory.mktemp("exports"), pretrained()
    export_weights(model, ARCH, "dir", tmp_path)
    state = {"format": FORMAT, "version": VERSION, "arch": ARCH, "mode": "dir", "model": model.state_dict()}
    save_checkpoint(tmp_path / "last.pt", state)
    return tmp_path


def images() -> Tensor:
    return torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def repeated(*, normalised: bool = False) -> Tensor:
    """The images as torchvision's and smp's networks take them."""
    three = images().repeat(1, 3, 1, 1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as torchvision documents them
    return torchvision.transforms.functional.normalize(three, mean, std) if normalised else three


def plain_resnet(network: Classifier, num_classes: int) -> nn.Module:
    plain = torchvision.models.resnet18(num_classes=num_classes)
    plain.load_state_dict(network.state_dict())
    return plain.double().eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_classifier_is_torchvisions_on_the_repeated_image(exports: Path) -> None:
    network = load_classifier(str(exports / "resnet18.pth"), ARCH, 5).network.double().eval()
    plain = plain_resnet(network, 5)
    close(network(images()), plain(repeated()))
    pooled = nn.Sequential(*list(plain.children())[:-1])(repeated()).flatten(1)
    close(network.features(images()), pooled)


@pytest.mark.parametrize("arch", ARCHS)
def test_classifiers_have_torchvisions_names_and_shapes(arch: str) -> None:
    with torch.device("meta"):
        ours, theirs = Classifier(arch, 3), torchvision.models.get_model(arch, num_classes=3)
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_uint8_images_are_read_as_0_to_1() -> None:
    network = Classifier(ARCH, 2).eval()
    grey = (255 * images()).round().byte()
    torch.testing.assert_close(network(grey), network(grey.double().div(255).float()))


def test_the_unet_is_smps_on_the_repeated_image_without_a_sigmoid(exports: Path) -> None:
    network = load_unet(str(exports / "unet.pth"), ARCH, 2).network.double().eval()
    plain = smp.Unet(ARCH, encoder_weights=None, classes=2)
    plain.load_state_dict(network.state_dict())
    logits = network(images())
    close(logits, plain.double().eval()(repeated()))
    assert logits.shape == (2, 2, 64, 96)
    assert logits.min() < 0


@pytest.mark.parametrize("name", ["resnet18.pth", "resnet18.safetensors", "unet.pth", "unet", "last.pt"])
def test_every_export_and_checkpoint_gives_its_encoder(exports: Path, name: str) -> None:
    given = torch.load(exports / "resnet18.pth")
    network, summary = load_classifier(str(exports / name), ARCH, 3)
    assert all(torch.equal(network.state_dict()[key], tensor) for key, tensor in given.items())
    assert summary.startswith(f"{exports / name} (")
    assert summary.endswith(": encoder taken, final layer fresh")


@pytest.mark.parametrize("name", ["unet.pth", "unet", "last.pt"])
def test_a_unet_takes_encoder_and_decoder_and_a_fresh_head(exports: Path, name: str) -> None:
    given = torch.load(exports / "unet.pth")
    torch.manual_seed(5)
    network, summary = load_unet(str(exports / name), ARCH)
    same = {key for key, tensor in network.state_dict().items() if torch.equal(tensor, given[key])}
    assert network.state_dict().keys() - same == {"segmentation_head.0.weight", "segmentation_head.0.bias"}
    assert summary.endswith(": encoder and decoder taken, segmentation head fresh")


def test_a_unet_from_an_encoder_alone_says_that_its_decoder_is_fresh(exports: Path) -> None:
    network, summary = load_unet(str(exports / "resnet18.pth"), ARCH)
    given = torch.load(exports / "resnet18.pth")
    assert all(torch.equal(network.encoder.state_dict()[key], tensor) for key, tensor in given.items())
    assert summary.endswith(": encoder taken, decoder and segmentation head fresh")


def test_random_weights_follow_the_seed_and_are_torchvisions() -> None:
    torch.manual_seed(3)
    network, summary = load_classifier("random", ARCH, 4)
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=4).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in network.state_dict().items())
    assert summary == "random weights: everything starts fresh"


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_the_normalised_stem_is_the_convolution_of_the_normalised_image_up_to_its_border(kernel_size: int) -> None:
    conv = nn.Conv2d(3, 8, kernel_size, stride=2, padding=kernel_size // 2, bias=False).double()
    grey = grey_stem(conv, NormalisedGreyConv2d)
    ours, theirs = grey(images()), conv(repeated(normalised=True))
    close(ours, theirs)
    ours.square().sum().backward()
    gradient, conv.weight.grad = conv.weight.grad, None  # they share the weight
    conv(repeated(normalised=True)).square().sum().backward()
    close(gradient, conv.weight.grad)


def put_imagenet_weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Place weights where torchvision looks for its own before it downloads them."""
    torch.manual_seed(8)
    weights = torchvision.models.resnet18().state_dict()
    folder = home / "checkpoints"
    folder.mkdir()
    torch.save(weights, folder / "resnet18-f37072fd.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(home))
    return weights


def test_imagenet_weights_see_normalised_images_in_both_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = put_imagenet_weights(tmp_path, monkeypatch)
    classifier, summary = load_classifier("imagenet", ARCH, 1000)
    assert summary == "imagenet (torchvision's supervised ResNet): encoder taken, final layer fresh"
    plain = torchvision.models.resnet18()
    plain.load_state_dict({**weights, "fc.weight": classifier.fc.weight.data, "fc.bias": classifier.fc.bias.data})
    close(classifier.double().eval()(images()), plain.double().eval()(repeated(normalised=True)))
    assert not torch.equal(classifier.fc.weight, weights["fc.weight"])
    unet = load_unet("imagenet", ARCH).network
    theirs = smp.Unet(ARCH, encoder_weights=None)
    theirs.load_state_dict(unet.state_dict())
    assert all(torch.equal(unet.encoder.state_dict()[name], weights[name]) for name in unet.encoder.state_dict())
    close(unet.double().eval()(images()), theirs.double().eval()(repeated(normalised=True)))


def test_imagenet_weights_that_cannot_be_downloaded_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda _: (_ for _ in ()).throw(URLError("no network here")))
    with pytest.raises(UserError, match=r"no network here.*put it at .*checkpoints/resnet18-f37072fd\.pth"):
        load_classifier("imagenet", ARCH, 2)


@pytest.mark.parametrize("from_imagenet", [False, True])
def test_a_saved_classifier_opens_as_it_was_and_starts_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_imagenet: bool
) -> None:
    put_imagenet_weights(tmp_path, monkeypatch)
    network = load_classifier("imagenet" if from_imagenet else "random", ARCH, 2).network
    save_classifier(tmp_path / "classifier.pt", network, ("Mass", "Nodule"), 73)
    opened = open_classifier(tmp_path / "classifier.pt")
    assert (opened.label_names, opened.resized_size_px) == (("Mass", "Nodule"), 73)
    close(opened.network.double().eval()(images()), copy.deepcopy(network).double().eval()(images()))
    other = load_classifier(str(tmp_path / "classifier.pt"), ARCH, 7).network
    close(other.double().eval().features(images()), network.double().eval().features(images()))
    close(
        load_unet(str(tmp_path / "classifier.pt"), ARCH).network.double().eval().encoder(images())[-1].mean((2, 3)),
        network.features(images()),
    )


def test_weights_that_do_not_fit_are_refused_and_named(exports: Path, tmp_path: Path) -> None:
    path = exports / "resnet18.pth"
    with pytest.raises(UserError, match=rf"{path}: its encoder is resnet18, not resnet50"):
        load_classifier(str(path), "resnet50", 2)
    weights = torch.load(path)
    del weights["layer1.0.bn1.weight"]
    torch.save(weights, path := tmp_path / "damaged.pth")
    with pytest.raises(UserError, match=rf"{path}: its encoder does not fit .*layer1.0.bn1.weight is missing"):
        load_unet(str(path), ARCH)
    with pytest.raises(UserError, match=r"nowhere\.pt: there is no such file"):
        load_unet(str(exports / "nowhere.pt"), ARCH)
    with pytest.raises(UserError, match=r"last\.pt: no fine-tuned classifier"):
        open_classifier(exports / "last.pt")


def test_a_saved_classifiers_weights_are_a_torchvision_state_dict(tmp_path: Path) -> None:
    network = Classifier(ARCH, 3)
    save_classifier(tmp_path / "classifier.pt", network, ("a", "b", "c"), 256)
    weights = torch.load(io.BytesIO((tmp_path / "classifier.pt").read_bytes()), weights_only=True)["state_dict"]
    torchvision.models.resnet18(num_classes=3).load_state_dict(weights)


def test_channels_last_weights_make_the_stems_output_channels_last() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    output = grey_stem(conv, NormalisedGreyConv2d)(images().float())
    assert output.is_contiguous(memory_format=torch.channels_last)
