import csv
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision.transforms import CenterCrop, TenCrop

from downstream import classify as module
from downstream.classify import classify
from downstream.classify_settings import ClassifySettings
from downstream.data import EvaluationLoader, LabelledSpec, whole_split
from downstream.networks import Classifier, open_classifier, save_classifier
from downstream.predictions import (
    Predictions,
    centre_crop,
    gather,
    mean_cross_entropy,
    predict,
    ten_crops,
    write_predictions,
)
from errors import UsageError, UserError
from model import distributed
from model.unet import to_unit_range
from pipeline.shardset import ShardSet
from pipeline.spec import LabelledViewSpec
from tests.commands import run_command
from tests.test_distributed import RANKS, run_on_ranks

CPU = torch.device("cpu")


def small(shard_folder: Path, run_dir: Path, **changes: Any) -> ClassifySettings:
    """Settings of a run that takes seconds."""
    values = {"arch": "resnet18", "crop_size": 32, "batch_size": 8, "epochs": 3, "precision": "fp32", "device": "cpu"}
    values |= {"weights": "random", "data_threads": 1}
    return ClassifySettings((str(shard_folder),), run_dir=str(run_dir), **values | changes)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run_dir(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two seeds."""
    folder = tmp_path_factory.mktemp("classify") / "run"
    classify(small(shard_folder, folder, runs=2))
    return folder


def test_a_run_leaves_predictions_curves_metrics_and_a_classifier_for_each_seed(run_dir: Path) -> None:
    for seed in (0, 1):
        files = {path.name for path in (run_dir / f"seed-{seed}").iterdir()}
        assert files >= {"classifier.pt", "metrics.jsonl", "predictions.csv", "results.json", "roc.png", "tensorboard"}
    config = json.loads((run_dir / "config.json").read_text())
    assert ClassifySettings.from_dict(config["settings"], "config.json").runs == 2
    lines = [json.loads(line) for line in (run_dir / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["epoch"]) for line in lines] == [(p, e) for e in range(3) for p in ("train", "val")]


def test_results_are_what_the_predictions_give(run_dir: Path, shard_folder: Path) -> None:
    results = json.loads((run_dir / "results.json").read_text())
    metas = {key: meta for key, meta, _ in ShardSet.open(shard_folder).read_samples("test")}
    names = ShardSet.open(shard_folder).label_names
    for run in results["runs"]:
        rows = read_csv(run_dir / f"seed-{run['seed']}" / "predictions.csv")
        assert [row["key"] for row in rows] == list(metas)
        assert [row["patient"] for row in rows] == [meta["patient"] for meta in metas.values()]
        labels = np.array([[int(row[f"{name} label"]) for name in names] for row in rows])
        assert labels.tolist() == [meta["labels"] for meta in metas.values()]
        for i, name in enumerate(names):
            if labels[:, i].min() == labels[:, i].max():
                assert name in run["left_out"]
            else:
                scores = [float(row[f"{name} probability"]) for row in rows]
                assert run["auc"][name] == pytest.approx(roc_auc_score(labels[:, i], scores), abs=1e-9)
        assert run["mean_auc"] == pytest.approx(np.mean(list(run["auc"].values())))
    both = [run["mean_auc"] for run in results["runs"]]
    assert results["mean"]["mean_auc"] == pytest.approx(np.mean(both))
    assert results["std"]["mean_auc"] == pytest.approx(np.std(both, ddof=1))


def test_a_finished_run_is_not_done_again_and_further_seeds_are_added(
    run_dir: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_dir / "seed-0" / "classifier.pt").stat().st_mtime_ns
    results = classify(small(shard_folder, run_dir, runs=3))
    assert (run_dir / "seed-0" / "classifier.pt").stat().st_mtime_ns == before
    assert [run["seed"] for run in results["runs"]] == [0, 1, 2]
    assert "seed-1 is finished" in capsys.readouterr().out


def test_a_run_of_other_settings_is_refused_and_they_are_named(run_dir: Path, shard_folder: Path) -> None:
    with pytest.raises(UserError, match=r"--lr 0\.0002 there, 0\.1 here"):
        classify(small(shard_folder, run_dir, lr=0.1))


@pytest.mark.parametrize("killed_in_epoch", [1, 2])
def test_a_run_that_was_killed_ends_with_the_same_weights_and_results(
    run_dir: Path, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in_epoch: int
) -> None:
    finish_epoch = module.finish_epoch

    def dies(run: module.FineTuning, *others: Any) -> None:
        if run.epoch == killed_in_epoch:
            raise KeyboardInterrupt
        finish_epoch(run, *others)

    settings = small(shard_folder, tmp_path / "run")
    monkeypatch.setattr(module, "finish_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        classify(settings)
    monkeypatch.undo()
    classify(settings)
    ours, theirs = (folder / "seed-0" for folder in (tmp_path / "run", run_dir))
    for name in ("results.json", "predictions.csv", "metrics.jsonl"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    states = [open_classifier(folder / "classifier.pt").network.state_dict() for folder in (ours, theirs)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_the_best_epoch_is_tested_and_training_stops_when_patience_is_at_its_end(
    shard_folder: Path, tmp_path: Path
) -> None:
    # a learning rate at which the validation loss soon only rises
    (run,) = classify(small(shard_folder, tmp_path / "run", lr=0.1, epochs=30, patience=2))["runs"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["phase"] == "val"]
    assert run["best_epoch"] - 1 == int(np.argmin(losses))
    assert run["num_epochs"] == len(losses) == run["best_epoch"] + 2 < 30
    assert run["val_loss"] == min(losses)


def test_the_learning_rate_is_halved_after_epochs_in_vain(shard_folder: Path, tmp_path: Path) -> None:
    classify(small(shard_folder, tmp_path / "run", lr=0.1, epochs=8, patience=8, lr_patience=1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["phase"] == "val"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    expected = [0.1]
    for loss in losses[:-1]:
        scheduler.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    assert [line["lr"] for line in lines if line["phase"] == "train"] == expected
    assert min(expected) <= 0.05


def test_few_patients_train_few_images_in_epochs_of_several_passes(shard_folder: Path, tmp_path: Path) -> None:
    settings = small(shard_folder, tmp_path / "run", num_patients=2, epochs=1, min_steps_per_epoch=4)
    (run,) = classify(settings)["runs"]
    assert 2 <= run["num_train"] <= 6
    (train_line, _) = (tmp_path / "run" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(train_line)["step"] == 4


def test_weights_of_a_file_are_what_fine_tuning_starts_from(shard_folder: Path, tmp_path: Path) -> None:
    given = Classifier("resnet18", 3)
    save_classifier(tmp_path / "given.pt", given, ("a", "b", "c"))
    settings = small(shard_folder, tmp_path / "run", weights=str(tmp_path / "given.pt"))
    run = module.build(settings, CPU, "fp32", tmp_path)
    ours = run.network.state_dict()
    assert all(torch.equal(ours[name], t) for name, t in given.state_dict().items() if not name.startswith("fc."))
    with pytest.raises(UserError, match="its encoder is resnet18, not resnet34"):
        module.build(replace(settings, arch="resnet34"), CPU, "fp32", tmp_path)


def test_frozen_features_are_scored_by_neighbours_and_a_linear_probe(shard_folder: Path, tmp_path: Path) -> None:
    results = classify(small(shard_folder, tmp_path / "run", knn=True, linear_probe=True))
    assert results["mean"].keys() == {"knn_mean_auc", "linear_mean_auc"}
    assert {path.name for path in (tmp_path / "run" / "seed-0").iterdir()} >= {"knn_predictions.csv", "linear_roc.png"}


def test_the_published_protocol_is_the_default() -> None:
    settings = ClassifySettings(("shards",), weights="random")
    assert settings.view == LabelledViewSpec(256, 224, flip_probability=0.5, max_rotation_deg=7)
    published = {
        "lr": 2e-4,
        "batch_size": 32,
        "patience": 10,
        "lr_patience": 5,
        "arch": "resnet50",
        "label_fraction": 1,
    }
    assert {name: getattr(settings, name) for name in published} == published


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": ()},
        {"label_fraction": 0.0},
        {"label_fraction": 1.5},
        {"num_patients": 0},
        {"num_patients": 4, "label_fraction": 0.5},
        {"resized_size": 200},
        {"lr": 0.0},
        {"lr_patience": -1},
    ],
)
def test_settings_that_cannot_be_meant_are_bad_usage(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ClassifySettings(**{"shards": ("shards",), "weights": "random"} | changes)


def test_unknown_settings_and_wrong_types_are_refused_and_named() -> None:
    values = ClassifySettings(("shards",), weights="random").to_dict()
    assert set(values) == {field.name for field in fields(ClassifySettings)}
    with pytest.raises(UserError, match=r"config\.json.*colour"):
        ClassifySettings.from_dict(values | {"colour": 1}, "config.json")
    with pytest.raises(UserError, match="setting lr"):
        ClassifySettings.from_dict(values | {"lr": "fast"}, "config.json")


@pytest.mark.parametrize(("size_px", "crop_size_px"), [(37, 32), (256, 224), (64, 64)])
def test_crops_are_torchvisions(size_px: int, crop_size_px: int) -> None:
    images = torch.randint(0, 256, (3, 1, size_px, size_px), dtype=torch.uint8)
    expected = [torch.stack(crops) for crops in zip(*map(TenCrop(crop_size_px), images), strict=True)]
    assert len(ten_crops(images, crop_size_px)) == 10
    assert all(torch.equal(a, b) for a, b in zip(ten_crops(images, crop_size_px), expected, strict=True))
    assert torch.equal(centre_crop(images, crop_size_px)[0], CenterCrop(crop_size_px)(images))


class Brightness(nn.Module):
    """Logits [B, 14] that can be told by hand: the means of a crop's left and right halves, by turns."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        halves = to_unit_range(images).flatten(1, 2).chunk(2, dim=2)
        return torch.stack([half.mean(dim=(1, 2)) for half in halves * 7], dim=1)


def loader_of(shard_folder: Path, **changes: Any) -> EvaluationLoader:
    shard_sets = (ShardSet.open(shard_folder),)
    spec = LabelledSpec(shard_sets, LabelledViewSpec(64, 56), 3, 0, CPU, **changes)
    return EvaluationLoader(spec, whole_split(shard_sets, "val"))


def test_a_probability_is_the_mean_over_ten_crops_in_eval_mode(shard_folder: Path) -> None:
    network = nn.Sequential(Brightness(), nn.Dropout(0.5)).train()
    predictions = predict(network, loader_of(shard_folder), ten_crops, 56, "fp32", 14)
    for (_, _, image), found in zip(
        ShardSet.open(shard_folder).read_samples("val"), predictions.probabilities, strict=True
    ):
        grey = np.frombuffer(image, np.uint8).reshape(64, 64) / 255
        crops = [grey[y : y + 56, x : x + 56] for y, x in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))]
        means = [crop[:, half].mean() for crop in crops for half in (slice(28), slice(28, None))]
        # a crop's left half is the right half of its mirror image, so both outputs have the same mean
        assert found == pytest.approx(np.mean([1 / (1 + np.exp(-mean)) for mean in means]), abs=1e-5)


def test_the_loss_is_binary_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, 2, (7, 3)).astype(np.float32), rng.random((7, 3)).astype(np.float32)
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()
    assert mean_cross_entropy(Predictions([""] * 7, [""] * 7, labels, p), CPU) == pytest.approx(expected, rel=1e-5)


def test_predictions_are_written_in_full(tmp_path: Path) -> None:
    labels, probabilities = np.array([[1.0, 0.0]]), np.array([[0.25, 0.123456789]])
    write_predictions(tmp_path / "p.csv", Predictions(["k"], ["7"], labels, probabilities), ("Mass", "Nodule"))
    assert (tmp_path / "p.csv").read_text().splitlines() == [
        "key,patient,Mass label,Mass probability,Nodule label,Nodule probability",
        "k,7,1,0.250000,0,0.123457",
    ]


def _evaluate_and_train(folder: Path) -> dict[str, Any]:
    """On a rank: predict a split, and run a whole classify."""
    shards = Path((folder / "shards.txt").read_text())
    loader = loader_of(shards, rank=distributed.rank(), world_size=RANKS)
    ours = predict(Brightness(), loader, ten_crops, 56, "fp32", 14)
    whole = gather(ours)
    loss = mean_cross_entropy(ours, CPU)
    results = classify(small(shards, folder / "run", epochs=1))
    run = module.build(small(shards, folder / "other"), CPU, "fp32", folder)
    batch = next(run.loader.epoch(0))
    nn.functional.binary_cross_entropy_with_logits(run.averaged(batch.images), batch.labels).backward()
    return {"whole": whole, "loss": loss, "results": results, "grad": run.network.fc.weight.grad, "keys": batch.keys}


def test_two_ranks_evaluate_every_sample_once_and_train_together(shard_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards.txt").write_text(str(shard_folder))
    first, second = run_on_ranks(_evaluate_and_train, tmp_path)
    expected = predict(Brightness(), loader_of(shard_folder), ten_crops, 56, "fp32", 14)
    assert second["whole"] is None
    assert first["whole"].keys == expected.keys == [k for k, _, _ in ShardSet.open(shard_folder).read_samples("val")]
    assert np.allclose(first["whole"].probabilities, expected.probabilities)
    loss = mean_cross_entropy(expected, CPU)
    assert first["loss"] == second["loss"] == pytest.approx(loss)
    assert second["results"] == {}
    assert first["results"]["runs"][0]["num_test"] == len(read_csv(tmp_path / "run" / "seed-0" / "predictions.csv"))
    assert torch.equal(first["grad"], second["grad"])
    assert not set(first["keys"]) & set(second["keys"])


def test_a_test_split_without_any_finding_is_refused(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_set = ShardSet.open(shard_folder)
    shard_set.manifest["splits"]["test"]["labels"] = dict.fromkeys(shard_set.label_names, 0)
    monkeypatch.setattr(ShardSet, "open", lambda _: shard_set)
    with pytest.raises(UserError, match="no finding has positives and negatives in the test split"):
        module.open_labelled(small(shard_folder, Path("run")))


def test_the_command_line_classifies_and_a_users_mistake_is_one_line(shard_folder: Path, tmp_path: Path) -> None:
    options = ("--arch", "resnet18", "--crop-size", "32", "--run-dir", tmp_path / "run", "--device", "cpu", "--knn")
    done = run_command("finetune.py", "classify", shard_folder, "--weights", "random", *options)
    assert done.returncode == 0, done.stderr
    assert "knn_mean_auc" in done.stdout
    failed = run_command("finetune.py", "classify", shard_folder, "--weights", "random", "--epochs", "0")
    assert (failed.returncode, failed.stderr) == (2, "error: --epochs 0: must be more than 0\n")
