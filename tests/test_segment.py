import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

from downstream import segment as module
from downstream.segment import SegmentSettings, segment
from errors import UsageError, UserError
from pipeline.phantom import write_phantoms
from tests.commands import run_command

SIZE_PX = 64


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and masks/ of 16 patients."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "out", num_images=16, size_px=SIZE_PX, images_per_patient=(1, 1))
    return folder / "out"


def settings_for(phantoms: Path, run_dir: Path, **changes: Any) -> SegmentSettings:
    small = {"arch": "resnet18", "size": SIZE_PX, "batch_size": 4, "epochs": 2, "precision": "fp32", "device": "cpu"}
    where = {"images": str(phantoms / "images"), "masks": (str(phantoms / "masks"),), "run_dir": str(run_dir)}
    return SegmentSettings(**{"weights": "random", **small, **where, **changes})


def read_grey(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_lungs_are_learnt_and_what_is_written_is_what_is_scored(phantoms: Path, tmp_path: Path) -> None:
    results = segment(settings_for(phantoms, tmp_path, epochs=12))
    (run,) = results["runs"]
    assert run["dice_per_image"] > 0.7
    assert results["mean"]["dice_per_image"] == run["dice_per_image"]
    assert results == json.loads((tmp_path / "results.json").read_text())
    folder = tmp_path / "seed-0"
    dices = []
    for name, scores in run["images"].items():
        mask = read_grey(phantoms / "masks" / f"{name}.png") > 127
        prediction = read_grey(folder / "predictions" / f"{name}.png")
        assert set(np.unique(prediction)) == {0, 255}
        dices.append(2 * (mask & (prediction > 0)).sum() / (mask.sum() + (prediction > 0).sum()))
        assert scores["dice"] == pytest.approx(dices[-1], abs=1e-6)
        assert read_grey(folder / "overlays" / f"{name}.png").ndim == 3
    assert run["dice_per_image"] == pytest.approx(statistics.fmean(dices), abs=1e-6)
    assert len(dices) == 3
    assert 0 < run["hausdorff95_px"] < SIZE_PX


def test_the_weights_written_are_an_smp_unet_and_those_of_the_best_epoch(phantoms: Path, tmp_path: Path) -> None:
    results = segment(settings_for(phantoms, tmp_path, epochs=4, lr=1e-2))
    network = smp.Unet("resnet18", encoder_weights=None)
    network.load_state_dict(torch.load(tmp_path / "seed-0" / "unet.pth"))
    lines = [json.loads(line) for line in (tmp_path / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["phase"] == "val"]
    assert len(losses) == 4
    assert results["runs"][0]["best_epoch"] == int(np.argmin(losses))
    (name, scores), *_ = results["runs"][0]["images"].items()
    image = torch.from_numpy(read_grey(phantoms / "images" / f"{name}.png"))[None, None].repeat(1, 3, 1, 1) / 255
    with torch.no_grad():
        prediction = network.eval()(image)[0, 0].numpy() > 0
    mask = read_grey(phantoms / "masks" / f"{name}.png") > 127
    dice = 2 * (mask & prediction).sum() / (mask.sum() + prediction.sum())
    assert scores["dice"] == pytest.approx(dice, abs=2e-3)  # a grey stem rounds otherwise


def interrupt_validation(monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
    validate: Callable = module._validate
    calls = iter(range(1, 100))

    def interrupted(*arguments: Any) -> dict[str, float]:
        if next(calls) == at_call:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(module, "_validate", interrupted)


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_an_interrupted_run_goes_on_to_the_bit(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = segment(settings_for(phantoms, tmp_path / "whole", epochs=4))
    settings = settings_for(phantoms, tmp_path / "cut", epochs=4)
    with monkeypatch.context() as patch:
        patch.setattr(module, "SECONDS_BETWEEN_SAVES", 0)
        interrupt_validation(patch, at_call=3)
        with pytest.raises(KeyboardInterrupt):
            segment(settings)
    assert torch.load(tmp_path / "cut" / "seed-0" / "last.pt")["epoch"] == 2
    assert segment(settings) == whole
    weights = [torch.load(tmp_path / name / "seed-0" / "unet.pth") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert logged(tmp_path / "cut" / "seed-0") == logged(tmp_path / "whole" / "seed-0")
    assert not (tmp_path / "cut" / "seed-0" / "last.pt").exists()


def test_seeds_are_runs_with_a_mean_and_a_deviation_and_are_not_run_again(phantoms: Path, tmp_path: Path) -> None:
    one = segment(settings_for(phantoms, tmp_path, epochs=1, num_train=4, seed=7))
    assert one["std"]["dice_per_image"] is None
    weights = tmp_path / "seed-7" / "unet.pth"
    written_at = weights.stat().st_mtime_ns
    two = segment(settings_for(phantoms, tmp_path, epochs=1, num_train=4, seed=7, runs=2))
    assert weights.stat().st_mtime_ns == written_at
    assert two["runs"][0] == one["runs"][0]
    assert [(run["seed"], run["num_train"]) for run in two["runs"]] == [(7, 4), (8, 4)]
    dices = [run["dice_per_image"] for run in two["runs"]]
    assert dices[0] != dices[1]
    assert two["std"]["dice_per_image"] == pytest.approx(np.std(dices, ddof=1))


def test_training_stops_when_patience_ends_and_keeps_the_best_weights(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for epochs in (9, 2):
        losses = iter([0.5, 0.4, 0.4, 0.6, 0.1])
        monkeypatch.setattr(module, "_validate", lambda *_, losses=losses: {"loss": next(losses), "dice": 0.0})
        folder = tmp_path / str(epochs)
        results = segment(settings_for(phantoms, folder, epochs=epochs, patience=2, num_train=2))
        assert results["runs"][0]["best_epoch"] == 1
        assert len(logged(folder / "seed-0")) == 2 * min(epochs, 4)
        weights.append(torch.load(folder / "seed-0" / "unet.pth"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_validation_is_the_dice_loss_of_all_pixels_and_leaves_the_network_alone(phantoms: Path, tmp_path: Path) -> None:
    settings = settings_for(phantoms, tmp_path, batch_size=2)
    pairs = module.read_splits(settings)["train"]
    run = module._build(settings, 0, tmp_path, torch.device("cpu"), "fp32")
    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    found = module._validate(run, pairs)
    assert run.network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in run.network.state_dict().items())
    probabilities = torch.sigmoid(module._predict(run, pairs)).double().numpy()[:, 0]
    masks = np.stack([pair.mask for pair in pairs])
    soft_dice = 2 * (probabilities * masks).sum() / (probabilities.sum() + masks.sum())
    assert found["loss"] == pytest.approx(1 - soft_dice, abs=1e-5)


def test_masks_that_teach_nothing_are_refused(phantoms: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    names = sorted(path.name for path in (phantoms / "masks").iterdir())
    for name in names:
        cv2.imwrite(str(masks / name), np.zeros((SIZE_PX, SIZE_PX), np.uint8))
    with pytest.raises(UserError, match="every mask of the train split is empty"):
        segment(settings_for(phantoms, tmp_path / "run", masks=(str(masks),)))
    (tmp_path / "list").write_text(
        "".join(f"{name} {split}\n" for name, split in zip(names, ["val", "test"] + ["train"] * 14, strict=True))
    )
    for name in names[:3]:
        (masks / name).write_bytes((phantoms / "masks" / name).read_bytes())
    where = {"masks": (str(masks),), "split_list": str(tmp_path / "list"), "num_train": 1}
    settings = settings_for(phantoms, tmp_path / "few", **where)
    pairs = module.read_splits(settings)["train"]
    seed = next(seed for seed in range(20) if not module.choose_some(pairs, 1, seed)[0].mask.any())
    with pytest.raises(UserError, match=f"seed {seed}: every mask of the 1 to train on is empty"):
        segment(replace(settings, seed=seed))


def test_settings_that_make_no_sense_are_refused(phantoms: Path, tmp_path: Path) -> None:
    for changes, problem in (
        ({"images": None}, "name a shard set or --images, one of them"),
        ({"shards": "set"}, "name a shard set or --images, one of them"),
        ({"masks": ()}, "--masks: name at least one folder"),
        ({"images": None, "shards": "set", "split_list": "x"}, "--split-list goes with --images"),
        ({"size": 100}, "--size 100: the U-Net needs a multiple of 32"),
        ({"val_fraction": 0.0}, "--val-fraction and --test-fraction: must be more than 0"),
        ({"test_fraction": 0.9}, "--val-fraction and --test-fraction: must be more than 0"),
        ({"num_train": 0}, "--num-train 0: must be more than 0"),
        ({"data_workers": -1}, "--data-workers: must be 0 or more"),
    ):
        with pytest.raises(UsageError, match=problem):
            settings_for(phantoms, tmp_path, **changes)


def test_another_run_in_the_folder_and_several_ranks_are_refused(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--num-train 99: there are only 11 images"):
        segment(settings_for(phantoms, tmp_path, num_train=99))
    with pytest.raises(UserError, match=r"config\.json belongs to a run with other settings \(--lr 0.001 there, 0.5"):
        segment(settings_for(phantoms, tmp_path, num_train=99, lr=0.5))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="start it without torchrun"):
        segment(settings_for(phantoms, tmp_path))


def test_a_shard_sets_images_are_segmented_by_their_masks(shard_folder: Path, tmp_path: Path) -> None:
    masks = (str(shard_folder.parent / "masks"),)
    settings = settings_for(shard_folder, tmp_path, images=None, shards=str(shard_folder), masks=masks, epochs=1)
    tested = (shard_folder.parent / "test_list.txt").read_text().split()
    assert sorted(f"{name}.png" for name in segment(settings)["runs"][0]["images"]) == sorted(tested)


def test_the_command_ends_in_one_line_on_bad_input(tmp_path: Path) -> None:
    where = ("--images", tmp_path / "nowhere", "--masks", tmp_path, "--run-dir", tmp_path / "run")
    done = run_command("finetune.py", "segment", *where, "--weights", "random")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/nowhere: no such folder\n"
