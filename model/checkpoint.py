"""Checkpoints: written whole or not at all, read without running code, taken from elsewhere, and given away as exports.

A checkpoint of ours is `{"format": FORMAT, "version": VERSION, "arch": ..., "mode": ..., "model": DiRA.state_dict()}`
and whatever else the training loop needs to go on.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from errors import UserError
from model.dira import DiRA
from model.unet import smp_unet

FORMAT = "dira-checkpoint"
VERSION = 1

_PARTS = {
    "encoder": ("query.encoder.",),
    "projection": ("query.projection.",),
    "decoder": ("query.decoder.", "query.segmentation_head."),
    "key encoder": ("key.",),
    "queue": ("queue",),
    "discriminator": ("discriminator.",),
}
"""What a checkpoint can start a run with, by the first letters of the names in `DiRA.state_dict()`."""

_BLOCKS = {
    (False, 2, 2): "resnet18",
    (False, 4, 6): "resnet34",
    (True, 4, 6): "resnet50",
    (True, 4, 23): "resnet101",
    (True, 8, 36): "resnet152",
}
"""Architectures by: has bottleneck blocks, how many blocks in layer2, how many in layer3."""


def save_checkpoint(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Save tensors and plain values so that `path` holds the old file or the whole new one, whatever happens.

    The old file gets the name `previous`, once the new one is whole and on the disk.

    Raises:
        OSError: It can't be written.
    """
    _write_atomically(path, lambda file: _save(state, file), previous)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Everything in a file of `torch.save`, its tensors on the device. No code in it is run.

    Raises:
        UserError: The file isn't there, is damaged or no checkpoint, or holds what only code could rebuild.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        _verify_checksums(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # noqa: BLE001 - bytes that are no checkpoint can fail in any way at all
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: refused, as it asks for {refused[1]} and that could run code: if you trust the file, "
                "load it once with weights_only=False and save its tensors alone"
            ) from None
        raise UserError(f"{path}: not a checkpoint, or damaged ({type(error).__name__}): take another copy") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint: it holds a {type(state).__name__}, not a dict")
    return state


def is_whole(path: Path) -> bool:
    """Whether a file that `save_checkpoint` wrote is there to its last byte, and none of them has changed."""
    try:
        return zipfile.is_zipfile(path) and not _first_damaged(path)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError):
        return False


class Source(NamedTuple):
    """What a file of weights holds."""

    kind: str
    """For the user: what sort of file it is."""
    tensors: dict[str, Tensor]
    """By their names in `DiRA.state_dict()`."""
    is_normalised: bool = False
    """Whether its encoder takes images normalised by ImageNet's mean and deviation, as it has said when saved."""


class Start(NamedTuple):
    """What a run has started from."""

    line: str
    """For the user: what was taken and what starts fresh."""
    has_queue: bool
    """Whether the queue was taken, too."""


def initialise_from(model: DiRA, path: Path, arch: str, mode: str) -> Start:
    """Start a run from what a file holds: a checkpoint of ours, an export, or a checkpoint of the original code.

    Every part that both have is taken; without a key encoder the query's is copied; other parts start fresh.

    Args:
        model: Of `arch` and `mode`; changed in place, or not at all when an error is raised.
        path: `.pt`, `.pth`, `.safetensors`, or the folder that smp's `save_pretrained` wrote.
        arch: The run's encoder.
        mode: The run's mode.

    Raises:
        UserError: The file can't be read, or what it holds doesn't fit the run.
    """
    source = read_source(path)
    if (found := arch_of(source.tensors)) != arch:
        raise UserError(f"{path}: its encoder is {found or 'none known here'}, this run's is {arch}: see --arch")
    own = model.state_dict()
    _check_sizes(path, source.tensors, own)
    state, taken, fresh, unused = dict(own), [], [], []
    for part, prefixes in _PARTS.items():
        given = {name: tensor for name, tensor in source.tensors.items() if name.startswith(prefixes)}
        wanted = {name: tensor for name, tensor in own.items() if name.startswith(prefixes)}
        if given and wanted:
            check_fit(path, part, given, wanted)
            state |= given
            taken.append(part)
        elif wanted:
            fresh.append(part)
        elif given:
            unused.append(part)
    if "key encoder" in fresh:
        fresh.remove("key encoder")
        state |= {name: state[name.replace("key.", "query.", 1)] for name in own if name.startswith("key.")}
        taken[taken.index("encoder")] = "encoder (for the keys too)"
    model.load_state_dict(state)
    line = f"{mode} starts from {path} ({source.kind}): {listed(taken)} taken, {listed([*fresh, 'optimizers'])} fresh"
    return Start(f"{line}, {listed(unused)} not needed" if unused else line, has_queue="queue" in taken)


def export_weights(model: DiRA, arch: str, mode: str, folder: Path) -> None:
    """Write the query network for others to use, in their own formats.

    `<arch>.pth` and `<arch>.safetensors`: the encoder by torchvision's and timm's names, without `fc`. Modes with a
    decoder also: `unet.pth`, a state dict of `smp.Unet`, and `unet/`, which `smp.from_pretrained` opens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Copies on the CPU in the default memory format: who loads them needs neither our device nor our format.
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.query.state_dict().items()}
    encoder = {name.removeprefix("encoder."): tensors[name] for name in tensors if name.startswith("encoder.")}
    save_checkpoint(folder / f"{arch}.pth", encoder)
    packed = safetensors.torch.save(encoder, metadata={"format": "pt"})
    _write_atomically(folder / f"{arch}.safetensors", lambda file: file.write(packed))
    if mode == "di":
        return
    unet = {name: tensor for name, tensor in tensors.items() if not name.startswith("projection.")}
    save_checkpoint(folder / "unet.pth", unet)
    network = smp_unet(arch)
    network.load_state_dict(unet)
    network.save_pretrained(folder / "unet")
    (folder / "unet" / "README.md").unlink()  # a model card that puts smp's own licence on the user's weights


def _write_atomically(path: Path, write: Callable[[BinaryIO], object], previous: Path | None = None) -> None:
    """Fill a file beside `path`, get it onto the disk, and only then give it the name; leave nothing if that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if previous and path.exists():
        link(path, previous)
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def link(path: Path, other: Path) -> None:
    """Make `other` the same file as `path`, which may be replaced later but never written over."""
    temporary = other.with_name(other.name + ".tmp")
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    temporary.replace(other)
    temporary.unlink(missing_ok=True)  # renaming does nothing where both are one file already


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    """Torch goes on after a failed write, to close its archive, and reports only that it couldn't."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _verify_checksums(path: Path) -> None:
    """What torch has saved since 1.6 is a zip archive, but it doesn't look at the checksums when it loads one."""
    if zipfile.is_zipfile(path) and (damaged := _first_damaged(path)):
        raise zipfile.BadZipFile(damaged)


def _first_damaged(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def read_source(path: Path) -> Source:
    """What a run can start from, whichever of the formats of `initialise_from` it comes in.

    Raises:
        UserError: The file can't be read, or holds no network known here.
    """
    if path.is_dir():
        return _read_smp_folder(path)
    if path.suffix == ".safetensors":
        return _from_export(path, _load_safetensors(path))
    contents = load_checkpoint(path, torch.device("cpu"))
    if contents.get("format") == FORMAT:
        if contents["version"] != VERSION:
            raise UserError(f"{path}: a checkpoint of version {contents['version']}; this program reads {VERSION}")
        return Source(f"a {contents['mode']} checkpoint", contents["model"])
    named = contents.get("state_dict", contents)
    tensors = {str(name).removeprefix("module."): t for name, t in named.items() if isinstance(t, Tensor)}
    if any(name.startswith("encoder_q.") for name in tensors):
        return _from_original(tensors)
    return _from_export(path, tensors)._replace(is_normalised=contents.get("is_normalised") is True)


def _read_smp_folder(path: Path) -> Source:
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{path}: a folder without model.safetensors, so none that smp's save_pretrained wrote")
    return _from_export(path, _load_safetensors(weights))


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or a damaged one ({error})") from None


def _from_export(path: Path, tensors: dict[str, Tensor]) -> Source:
    """Plain state dicts: of `smp.Unet`, or of torchvision's or timm's ResNet, with or without `fc`."""
    if "encoder.conv1.weight" in tensors:
        prefix, kind = "query.", "an smp.Unet"
    elif "conv1.weight" in tensors:
        prefix, kind = "query.encoder.", "an encoder"
    else:
        raise UserError(f"{path}: holds no network known here: neither a DiRA checkpoint nor an smp.Unet nor a ResNet")
    named = {prefix + name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    return Source(kind, named)


def _from_original(tensors: dict[str, Tensor]) -> Source:
    """The original code's names. Its queue is [dim, K], and its key network may hold a decoder, which has no use."""
    named = {}
    for name, tensor in tensors.items():
        if name == "queue":
            named[name] = tensor.T
        elif name == "queue_ptr":
            named[name] = tensor
        else:
            ours = name.replace("encoder_q.", "query.", 1).replace("encoder_k.", "key.", 1)
            ours = ours.replace(".backbone.", ".", 1).replace(".fc.", ".projection.", 1)
            if not ours.startswith(("key.decoder.", "key.segmentation_head.")):
                named[ours] = tensor
    return Source("a checkpoint of the original code", named)


def arch_of(tensors: dict[str, Tensor]) -> str | None:
    """Which ResNet these tensors are, told from its blocks."""
    layer = "query.encoder.layer"
    num_blocks = [len({name.split(".")[3] for name in tensors if name.startswith(f"{layer}{i}.")}) for i in (2, 3)]
    return _BLOCKS.get((f"{layer}1.0.conv3.weight" in tensors, *num_blocks))


def _check_sizes(path: Path, given: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """What the user chose with --moco-k and --moco-dim has to be what the file was made with."""
    last = "query.projection.2.weight"
    if last in given and (dim := len(given[last])) != len(own[last]):
        raise UserError(
            f"{path}: its embeddings have {dim} numbers, this run's {len(own[last])}: pass --moco-dim {dim}"
        )
    if "queue" in given and (k := len(given["queue"])) != len(own["queue"]):
        raise UserError(f"{path}: its queue holds {k} keys, this run's {len(own['queue'])}: pass --moco-k {k}")


def check_fit(path: Path, part: str, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise UserError unless every tensor of a part is there, in its shape, and no other."""
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    problems += [
        f"{name} is {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: its {part} does not fit this run's: {'; '.join(problems[:3])}{more}")


def listed(words: list[str]) -> str:
    """One or more words as a sentence has them: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
