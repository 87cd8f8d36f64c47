"""The networks that are fine-tuned: torchvision's ResNet and smp's U-Net, for grey images, from any weights."""

from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.error import URLError

import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from errors import UserError
from model.checkpoint import arch_of, check_fit, listed, load_checkpoint, read_source, save_checkpoint
from model.unet import GreyConv2d, grey_stem, to_unit_range

CLASSIFIER_FORMAT = "dira-classifier"
VERSION = 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

N = TypeVar("N", bound=nn.Module)

_LAYERS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
_PREFIXES = {"encoder": "query.encoder.", "decoder": "query.decoder."}
"""What fine-tuning takes of a file, by the first letters of the names in `DiRA.state_dict()`."""


class NormalisedGreyConv2d(GreyConv2d):
    """A 3-channel convolution of a grey image that is repeated and then normalised by ImageNet's mean and deviation.

    sum over c of w_c * (x - mean_c) / std_c = (sum of w_c / std_c) * x - (sum of w_c mean_c / std_c) * 1, with * the
    convolution: it reads the image once, and its border is right too, where zeros stand for the normalised mean.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 1, H, W] in 0..1 to [B, out_channels, H', W']."""
        mean, std = (self.weight.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        of_image = (self.weight / std).sum(dim=1, keepdim=True)
        of_mean = (self.weight * mean / std).sum(dim=1, keepdim=True)
        if self.weight.is_contiguous(memory_format=torch.channels_last):
            of_image, of_mean = (w.to(memory_format=torch.channels_last) for w in (of_image, of_mean))
        ones = torch.ones_like(images[:1])
        return self._conv_forward(images, of_image, self.bias) - self._conv_forward(ones, of_mean, None)


class Classifier(ResNet):
    """torchvision's ResNet, with its state dict, for one-channel images.

    Args:
        arch: One of `model.unet.ARCHS`.
        num_classes: Length of the output.
        is_normalised: Whether its weights were trained on images normalised as ImageNet's are.
    """

    def __init__(self, arch: str, num_classes: int, *, is_normalised: bool = False) -> None:
        super().__init__(*_LAYERS[arch], num_classes=num_classes)
        self.arch = arch
        self.is_normalised = is_normalised
        self.conv1 = grey_stem(self.conv1, NormalisedGreyConv2d if is_normalised else GreyConv2d)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, C], C being 512 or 2048, of images [B, 1, H, W], uint8 or floating point 0..1."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(to_unit_range(images)))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.avgpool(maps).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 1, H, W], uint8 or floating point 0..1."""
        return self.fc(self.features(images))


class Initialised(NamedTuple, Generic[N]):
    """A network, and where its weights come from."""

    network: N
    summary: str
    """One line for the user: what was taken and what starts fresh."""


def load_classifier(weights: str, arch: str, num_classes: int) -> Initialised[Classifier]:
    """A classifier with a fresh final layer on an encoder of `weights`; `torch.manual_seed` decides what is fresh.

    Args:
        weights: `random`, `imagenet` (torchvision's supervised weights, IMAGENET1K_V1), or a file or folder that
            `model.checkpoint.read_source` reads: any checkpoint, any export, a saved classifier.
        arch: One of `model.unet.ARCHS`.
        num_classes: Length of the output.

    Raises:
        UserError: The weights can't be read or downloaded, or are of another arch.
    """
    given = _given_weights(weights, arch)
    network = Classifier(arch, num_classes, is_normalised=given.is_normalised)
    return Initialised(network, _initialise(network, given, "query.encoder.", "final layer"))


def load_unet(weights: str, arch: str, num_classes: int = 1) -> Initialised[smp.Unet]:
    """A U-Net for one-channel images that returns logits, with the encoder and, where there is one, the decoder given.

    Its head starts fresh: the pre-trained one has learnt to draw greys. Its state dict is that of
    `smp.Unet(arch, classes=num_classes)`. It maps [B, 1, H, W], 0..1, sides multiples of 32, to [B, num_classes, H, W].
    Arguments and errors as in `load_classifier`.
    """
    given = _given_weights(weights, arch)
    network = smp.Unet(arch, encoder_weights=None, in_channels=3, classes=num_classes)
    stem = NormalisedGreyConv2d if given.is_normalised else GreyConv2d
    network.encoder.conv1 = grey_stem(network.encoder.conv1, stem)
    return Initialised(network, _initialise(network, given, "query.", "segmentation head"))


def save_classifier(path: Path, network: Classifier, label_names: tuple[str, ...], resized_size_px: int = 256) -> None:
    """Save what `open_classifier` opens; its `state_dict` is torchvision's.

    Args:
        path: Where to.
        network: Which.
        label_names: What its outputs stand for.
        resized_size_px: Side that whole radiographs were scaled to, in training, before they were cropped.
    """
    state = {
        "format": CLASSIFIER_FORMAT,
        "version": VERSION,
        "arch": network.arch,
        "label_names": list(label_names),
        "resized_size_px": resized_size_px,
        "is_normalised": network.is_normalised,
        "state_dict": network.state_dict(),
    }
    save_checkpoint(path, state)


class SavedClassifier(NamedTuple):
    """A fine-tuned classifier, and what its outputs stand for."""

    network: Classifier
    label_names: tuple[str, ...]
    resized_size_px: int
    """Side that whole radiographs have to be scaled to, for findings to have the size that it has learnt them in."""


def open_classifier(path: Path) -> SavedClassifier:
    """A classifier as `save_classifier` has saved it, on the CPU.

    Raises:
        UserError: The file can't be read, or is no such classifier.
    """
    state = load_checkpoint(path, torch.device("cpu"))
    if state.get("format") != CLASSIFIER_FORMAT:
        raise UserError(f"{path}: no fine-tuned classifier: make one with finetune.py classify")
    if state["version"] != VERSION:
        raise UserError(f"{path}: a classifier of version {state['version']}; this program reads {VERSION}")
    label_names = tuple(state["label_names"])
    network = Classifier(state["arch"], len(label_names), is_normalised=state["is_normalised"])
    network.load_state_dict(state["state_dict"])
    return SavedClassifier(network, label_names, state["resized_size_px"])


class _Weights(NamedTuple):
    name: str
    """As the user gave it."""
    kind: str
    tensors: dict[str, Tensor] | None
    """By their names in `DiRA.state_dict()`; None for random ones."""
    is_normalised: bool = False


def _given_weights(weights: str, arch: str) -> _Weights:
    if weights == "random":
        return _Weights(weights, "random", None)
    if weights == "imagenet":
        tensors = {f"query.encoder.{name}": tensor for name, tensor in _imagenet_weights(arch).items()}
        return _Weights(weights, "torchvision's supervised ResNet", _without(tensors, "query.encoder.fc."), True)
    source = read_source(Path(weights))
    if (found := arch_of(source.tensors)) != arch:
        raise UserError(f"{weights}: its encoder is {found or 'none known here'}, not {arch}: see --arch")
    return _Weights(weights, source.kind, source.tensors, source.is_normalised)


def _imagenet_weights(arch: str) -> dict[str, Any]:
    """IMAGENET1K_V1: the weights that published baselines start from."""
    weights = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise UserError(
            f"--weights imagenet: {weights.url} can't be had ({error}): fetch it elsewhere and put it at {place}"
        ) from None


def _initialise(network: nn.Module, given: _Weights, prefix: str, head: str) -> str:
    """Put in every part that both have; `prefix` makes the network's names those of `DiRA.state_dict()`."""
    if given.tensors is None:
        return "random weights: everything starts fresh"
    wanted_all = {prefix + name: tensor for name, tensor in _without(network.state_dict(), "fc.").items()}
    state, taken, fresh = {}, [], []
    for part, letters in _PREFIXES.items():
        offered, wanted = (
            {name: tensor for name, tensor in tensors.items() if name.startswith(letters)}
            for tensors in (given.tensors, wanted_all)
        )
        if offered and wanted:
            check_fit(Path(given.name), part, offered, wanted)
            state |= {name.removeprefix(prefix): tensor for name, tensor in offered.items()}
            taken.append(part)
        elif wanted:
            fresh.append(part)
    network.load_state_dict(state, strict=False)  # strict where it matters: each part has been checked
    return f"{given.name} ({given.kind}): {listed(taken)} taken, {listed([*fresh, head])} fresh"


def _without(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
