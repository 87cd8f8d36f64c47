import argparse
import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn

from errors import UserError
from model.checkpoint import (
    FORMAT,
    VERSION,
    export_weights,
    initialise_from,
    load_checkpoint,
    save_checkpoint,
)
from model.dira import DiRA
from tests import test_dira

CPU = torch.device("cpu")


def build(mode: str, *, seed: int = 0, **changes: Any) -> DiRA:
    """A small model whose every tensor, BN statistics too, is its own."""
    model = test_dira.build(mode, seed=seed, **changes)
    for tensor in model.state_dict().values():
        tensor.add_(0.01 * torch.rand_like(tensor) if tensor.is_floating_point() else 3)
    return model


def save(model_state: dict[str, Tensor], path: Path, mode: str = "dir") -> Path:
    """A checkpoint as the training loop writes them."""
    state = {"format": FORMAT, "version": VERSION, "arch": "resnet18", "mode": mode, "model": model_state, "step": 5}
    save_checkpoint(path, state)
    return path


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {"step": 7, "loss": 0.5, "names": ["a", None], "tensor": torch.rand(3), "nested": {"n": torch.tensor(2)}}
    save_checkpoint(tmp_path / "last.pt", state)
    loaded = load_checkpoint(tmp_path / "last.pt", CPU)
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded == state
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_in_place_stays_whole_while_another_is_written(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    seen = []

    class Interruption:
        def __reduce__(self) -> str:
            seen.append(load_checkpoint(path, CPU))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"tensor": torch.rand(1000), "last": Interruption()})
    assert seen == [{"step": 1}]
    assert load_checkpoint(path, CPU) == {"step": 1}
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path, CPU) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


class _Code:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": _Code(tmp_path / "made by the checkpoint")}, path)
    with pytest.raises(UserError, match=r"evil\.pt: refused, as it asks for posix\.mkdir"):
        load_checkpoint(path, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(UserError, match=r"evil\.pt: refused, as it asks for argparse\.Namespace"):
        load_checkpoint(path, CPU)


def test_a_file_that_is_no_whole_checkpoint_is_named_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.pt"
    save_checkpoint(good, {"tensor": torch.rand(1000)})
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    contents = {
        "empty.pt": b"",
        "text.pt": b"this is text\n",
        "cut.pt": whole[: len(whole) // 2],
        "flipped.pt": bytes(flipped),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.pt").mkdir()
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    for name in [*contents, "folder.pt", "tensor.pt", "absent.pt"]:
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}: .*$"):
            load_checkpoint(tmp_path / name, CPU)


def test_a_dir_checkpoint_starts_a_dira_run_with_all_but_the_discriminator(tmp_path: Path) -> None:
    warm, model = build("dir"), build("dira", seed=1)
    fresh = copy.deepcopy(model.discriminator.state_dict())
    line, _ = initialise_from(model, save(warm.state_dict(), tmp_path / "last.pt"), "resnet18", "dira")
    taken = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("discriminator.")}
    assert_same(taken, warm.state_dict())
    assert_same(model.discriminator.state_dict(), fresh)
    assert line == (
        f"dira starts from {tmp_path / 'last.pt'} (a dir checkpoint): "
        "encoder, projection, decoder, key encoder and queue taken, discriminator and optimizers fresh"
    )


def test_a_dira_checkpoint_starts_a_dira_run_with_everything(tmp_path: Path) -> None:
    other, model = build("dira"), build("dira", seed=1)
    line, _ = initialise_from(model, save(other.state_dict(), tmp_path / "best.pt", "dira"), "resnet18", "dira")
    assert_same(model.state_dict(), other.state_dict())
    assert line.endswith("key encoder, queue and discriminator taken, optimizers fresh")


def test_a_di_checkpoint_leaves_the_decoder_fresh_and_a_di_run_needs_none(tmp_path: Path) -> None:
    other, model = build("di"), build("dir", seed=1)
    decoder = copy.deepcopy(model.query.decoder.state_dict())
    line, _ = initialise_from(model, save(other.state_dict(), tmp_path / "di.pt", "di"), "resnet18", "dir")
    assert_same(model.query.decoder.state_dict(), decoder)
    assert_same(model.query.encoder.state_dict(), other.query.encoder.state_dict())
    assert line.endswith("encoder, projection, key encoder and queue taken, decoder and optimizers fresh")
    line, _ = initialise_from(other, save(model.state_dict(), tmp_path / "dir.pt"), "resnet18", "di")
    assert line.endswith("key encoder and queue taken, optimizers fresh, decoder not needed")


def original_checkpoint(*, dim: int = 16, num_keys: int = 20) -> dict[str, Any]:
    """What the original code saves, every tensor random."""
    torch.manual_seed(7)
    unet = smp.Unet("resnet18", encoder_weights=None, activation="sigmoid").state_dict()
    shapes = {f"module.encoder_{which}.backbone.{name}": t.shape for which in "qk" for name, t in unet.items()}
    for which in "qk":
        linears = {"0.weight": (512, 512), "0.bias": (512,), "2.weight": (dim, 512), "2.bias": (dim,)}
        shapes |= {f"module.encoder_{which}.fc.{name}": shape for name, shape in linears.items()}
    state = {
        name: torch.randint(1, 99, ()) if name.endswith("num_batches_tracked") else torch.randn(shape)
        for name, shape in shapes.items()
    }
    state |= {"module.queue": torch.randn(dim, num_keys), "module.queue_ptr": torch.tensor([num_keys // 2])}
    return {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize("wrapped_in_ddp", [True, False])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "from before torch 1.6"])
def test_every_tensor_of_an_original_checkpoint_is_found_again(
    tmp_path: Path, legacy: bool, wrapped_in_ddp: bool
) -> None:
    original, path, model = original_checkpoint(), tmp_path / "checkpoint.pth", build("dir")
    saved = original if wrapped_in_ddp else {"state_dict": under("module.", original["state_dict"])}
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    line, _ = initialise_from(model, path, "resnet18", "dir")
    assert line.endswith("encoder, projection, decoder, key encoder and queue taken, optimizers fresh")
    theirs, found = original["state_dict"], set()
    for which, network in (("q", model.query), ("k", model.key)):
        for part, name in (("encoder", "backbone.encoder"), ("projection", "fc")):
            ours = getattr(network, part).state_dict()
            assert_same(ours, under(f"module.encoder_{which}.{name}.", theirs))
            found |= {f"module.encoder_{which}.{name}.{tensor}" for tensor in ours}
    for part in ("decoder", "segmentation_head"):
        ours = getattr(model.query, part).state_dict()
        assert_same(ours, under(f"module.encoder_q.backbone.{part}.", theirs))
        found |= {f"module.encoder_q.backbone.{part}.{tensor}" for tensor in ours}
    assert torch.equal(model.queue, theirs["module.queue"].T)
    assert torch.equal(model.queue_ptr, theirs["module.queue_ptr"])
    rest = set(theirs) - found - {"module.queue", "module.queue_ptr"}
    assert all(name.startswith(("module.encoder_k.backbone.decoder", "module.encoder_k.backbone.seg")) for name in rest)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiRA, Path]:
    """A model and the folder of its exports; beside them an encoder with a classifier, as torchvision's own weights."""
    model, folder = build("dira"), tmp_path_factory.mktemp("small")
    export_weights(model, "resnet18", "dira", folder)
    with_fc = {**torch.load(folder / "resnet18.pth"), "fc.weight": torch.ones(9, 512), "fc.bias": torch.ones(9)}
    torch.save(with_fc, folder / "with_fc.pth")
    return model, folder


U_NETS, ENCODERS = (
    ["unet.pth", "unet", "unet/model.safetensors"],
    ["resnet18.pth", "resnet18.safetensors", "with_fc.pth"],
)


@pytest.mark.parametrize("name", U_NETS + ENCODERS)
def test_an_export_starts_the_query_and_the_key_encoder(small: tuple[DiRA, Path], name: str) -> None:
    other, folder = small
    model = build("dira", seed=1)
    before = copy.deepcopy(model)
    line, _ = initialise_from(model, folder / name, "resnet18", "dira")
    decoder = other if name in U_NETS else before
    assert_same(model.query.encoder.state_dict(), other.query.encoder.state_dict())
    assert_same(model.key.encoder.state_dict(), other.query.encoder.state_dict())
    assert_same(model.query.decoder.state_dict(), decoder.query.decoder.state_dict())
    assert_same(model.query.segmentation_head.state_dict(), decoder.query.segmentation_head.state_dict())
    assert_same(model.query.projection.state_dict(), before.query.projection.state_dict())
    assert_same(model.key.projection.state_dict(), before.query.projection.state_dict())
    assert torch.equal(model.queue, before.queue)
    assert "encoder (for the keys too)" in line
    assert "queue, discriminator and optimizers fresh" in line


MISFITS = {
    "K": ({"moco_k": 24}, {}, "its queue holds 24 keys, this run's 20: pass --moco-k 24"),
    "dim": ({"moco_dim": 8}, {}, "its embeddings have 8 numbers, this run's 16: pass --moco-dim 8"),
    "arch": ({"arch": "resnet34"}, {}, "its encoder is resnet34, this run's is resnet18: see --arch"),
    "shape": (
        {},
        {"query.encoder.conv1.weight": torch.ones(64, 1, 7, 7)},
        "its encoder does not fit this run's: query.encoder.conv1.weight is (64, 1, 7, 7), not (64, 3, 7, 7)",
    ),
    "unknown tensor": (
        {},
        {"key.encoder.se.weight": torch.ones(1)},
        "its key encoder does not fit this run's: key.encoder.se.weight is unknown",
    ),
    "missing tensors": (
        {},
        {f"query.encoder.bn1.{name}": None for name in ("weight", "bias", "running_mean", "running_var")},
        "its encoder does not fit this run's: "
        + "; ".join(f"query.encoder.bn1.{name} is missing" for name in ("weight", "bias", "running_mean"))
        + " and 1 more",
    ),
}


@pytest.mark.parametrize(("settings", "edits", "message"), MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, settings: dict[str, Any], edits: dict[str, Tensor | None], message: str
) -> None:
    state = build("dir", **settings).state_dict() | edits
    path = save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "last.pt")
    model = build("dir", seed=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as error:
        initialise_from(model, path, "resnet18", "dir")
    assert str(error.value) == f"{path}: {message}"
    assert_same(model.state_dict(), before)


def test_an_original_checkpoint_with_another_queue_says_which_moco_k_to_pass(tmp_path: Path) -> None:
    torch.save(original_checkpoint(num_keys=32), tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="pass --moco-k 32"):
        initialise_from(build("dir"), tmp_path / "checkpoint.pth", "resnet18", "dir")


@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_the_arch_of_a_plain_resnet_is_told_from_its_tensors(tmp_path: Path, arch: str) -> None:
    with torch.device("meta"):
        names = torchvision.models.get_model(arch).state_dict()
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"its encoder is {arch}, this run's is resnet18"):
        initialise_from(build("di"), tmp_path / "weights.pth", "resnet18", "di")


def test_a_file_without_a_known_network_is_refused(tmp_path: Path) -> None:
    model = build("di")
    torch.save({"classifier.weight": torch.ones(2)}, tmp_path / "other.pth")
    torch.save({"format": FORMAT, "version": VERSION + 1}, tmp_path / "newer.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 50)
    (tmp_path / "folder").mkdir()
    messages = {
        "other.pth": "holds no network known here",
        "newer.pt": f"version {VERSION + 1}; this program reads {VERSION}",
        "damaged.safetensors": "not a safetensors file, or a damaged one",
        "absent.safetensors": "there is no such file",
        "absent.pt": "there is no such file",
        "folder": "a folder without model.safetensors",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            initialise_from(model, tmp_path / name, "resnet18", "di")


@pytest.fixture(scope="module")
def trained() -> DiRA:
    return build("dir", arch="resnet50").to(memory_format=torch.channels_last).eval()


@pytest.fixture(scope="module")
def exports(trained: DiRA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export"
    export_weights(trained, "resnet50", "dir", folder)
    return folder


def follow_recipe(
    model: nn.Module, weight: Path, prefixes: tuple[str, ...], dropped: tuple[str, ...]
) -> list[list[str]]:
    """What both published recipes do, step by step; returns the missing and the unexpected names."""
    state_dict = torch.load(weight, map_location="cpu")
    if "state_dict" in state_dict:
        state_dict = state_dict["state_dict"]
    for prefix in prefixes:
        state_dict = {k.replace(prefix, ""): v for k, v in state_dict.items()}
    for k in list(state_dict):
        if k.startswith(dropped):
            del state_dict[k]
    return list(model.load_state_dict(state_dict, strict=False))


def test_the_published_recipes_work_on_unet_pth_as_they_stand(exports: Path) -> None:
    images = torch.rand(2, 3, 64, 64)
    plain = smp.Unet("resnet50", encoder_weights=None, activation="sigmoid").eval()
    plain.load_state_dict(torch.load(exports / "unet.pth"))
    classifier = torchvision.models.__dict__["resnet50"](num_classes=14).eval()
    prefixes, dropped = ("module.", "backbone.", "encoder."), ("fc", "segmentation_head", "decoder")
    found = follow_recipe(classifier, exports / "unet.pth", prefixes, dropped)
    assert found == [["fc.weight", "fc.bias"], []]
    assert torch.equal(torchvision_features(classifier, images), plain.encoder(images)[-1])
    segmenter = smp.Unet(
        "resnet50", encoder_weights=None
    ).eval()  # the recipe downloads ImageNet's, and overwrites them
    found = follow_recipe(segmenter, exports / "unet.pth", ("module.", "backbone."), ("fc", "segmentation_head"))
    assert found == [["segmentation_head.0.weight", "segmentation_head.0.bias"], []]
    assert torch.equal(segmenter.decoder(segmenter.encoder(images)), plain.decoder(plain.encoder(images)))


def torchvision_features(model: nn.Module, images: Tensor) -> Tensor:
    return nn.Sequential(*list(model.children())[:-2])(images)


@torch.no_grad()
def test_every_export_is_the_trained_network(trained: DiRA, exports: Path) -> None:
    grey = torch.rand(2, 1, 64, 64)
    images = grey.repeat(1, 3, 1, 1)
    packed = exports / "resnet50.safetensors"
    states = [torch.load(exports / "resnet50.pth"), safetensors.torch.load_file(packed)]
    from_torchvision = [torchvision.models.get_model("resnet50").eval() for _ in states]
    for model, state in zip(from_torchvision, states, strict=True):
        assert list(model.load_state_dict(state, strict=False)) == [["fc.weight", "fc.bias"], []]
    from_timm = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(packed)).eval()
    opened = smp.from_pretrained(exports / "unet").eval()
    plain = smp.Unet("resnet50", encoder_weights=None, activation="sigmoid").eval()
    plain.load_state_dict(torch.load(exports / "unet.pth"))
    features = {
        "torchvision, .pth": torchvision_features(from_torchvision[0], images),
        "torchvision, .safetensors": torchvision_features(from_torchvision[1], images),
        "timm": from_timm.forward_features(images),
        "smp.from_pretrained": opened.encoder(images)[-1],
        "smp.Unet": plain.encoder(images)[-1],
    }
    for name, feature in features.items():
        assert torch.equal(feature, features["smp.Unet"]), name
    assert torch.equal(opened(images), plain(images))
    ours = trained.query.encoder(grey)[-1]
    torch.testing.assert_close(ours, features["smp.Unet"], rtol=1e-3, atol=1e-4 * ours.abs().max().item())
    torch.testing.assert_close(trained.query(grey)[1], plain(images), rtol=1e-3, atol=1e-4)


def test_exports_hold_the_networks_very_tensors_in_the_default_memory_format(trained: DiRA, exports: Path) -> None:
    encoder, unet = torch.load(exports / "resnet50.pth"), torch.load(exports / "unet.pth")
    assert_same(encoder, trained.query.encoder.state_dict())
    assert_same(under("encoder.", unet), encoder)
    assert_same(under("decoder.", unet), trained.query.decoder.state_dict())
    assert_same(under("segmentation_head.", unet), trained.query.segmentation_head.state_dict())
    assert all(tensor.is_contiguous() for tensor in unet.values())
    assert not trained.query.encoder.layer1[0].conv2.weight.is_contiguous()


def test_exports_are_these_files(exports: Path) -> None:
    files = sorted(str(path.relative_to(exports)) for path in exports.rglob("*") if path.is_file())
    assert files == ["resnet50.pth", "resnet50.safetensors", "unet.pth", "unet/config.json", "unet/model.safetensors"]


def test_di_exports_the_encoder_alone(tmp_path: Path) -> None:
    model = build("di")
    export_weights(model, "resnet18", "di", tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["resnet18.pth", "resnet18.safetensors"]
    assert_same(torch.load(tmp_path / "export" / "resnet18.pth"), model.query.encoder.state_dict())
