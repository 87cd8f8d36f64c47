import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from downstream.data import EvaluationLoader, LabelledSpec, whole_split
from downstream.probe import Features, Probe, extract_features, knn_scores, linear_scores, pooled_features
from errors import UserError
from model import distributed
from model.unet import UNet, to_unit_range
from pipeline.shardset import ShardSet
from pipeline.spec import LabelledViewSpec
from tests.test_distributed import RANKS, run_on_ranks

CPU = torch.device("cpu")


@pytest.fixture
def encoder() -> torch.nn.Module:
    """An encoder in training mode whose statistics are no longer their defaults, one block frozen in eval mode."""
    torch.manual_seed(0)
    encoder = UNet("resnet18", 8, with_decoder=False).encoder.train()
    encoder(torch.rand(4, 1, 64, 64))
    encoder.layer1.eval()
    return encoder


def features(num: int, seed: int, width: int = 5) -> Features:
    """Features of which the first says something about the first finding."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num, 2)) < 0.4).astype(np.float32)
    found = rng.normal(size=(num, width)).astype(np.float32)
    found[:, 0] += 2 * labels[:, 0]
    return Features(found, labels, [""] * num, [""] * num)


def loader_of(shard_folder: Path, split: str = "val", **changes: Any) -> EvaluationLoader:
    shard_sets = (ShardSet.open(shard_folder),)
    spec = LabelledSpec(shard_sets, LabelledViewSpec(37, 32), 3, 0, CPU, **changes)
    return EvaluationLoader(spec, whole_split(shard_sets, split))


def test_neighbours_are_weighted_by_their_cosine_similarity() -> None:
    train, test = features(300, 0), features(20, 1)
    similarity = test.features @ train.features.T
    similarity /= np.linalg.norm(test.features, axis=1)[:, None] * np.linalg.norm(train.features, axis=1)
    for row, found in zip(similarity, knn_scores(train, test.features), strict=True):
        nearest = np.argsort(-row)[:200]
        weights = np.exp(row[nearest] / 0.07)
        assert found == pytest.approx((weights[:, None] * train.labels[nearest]).sum(axis=0) / weights.sum(), rel=1e-3)


def test_a_linear_probe_is_a_ridge_regression_that_leave_one_out_has_chosen() -> None:
    train, test = features(40, 0), features(20, 1)
    mean, std = train.features.mean(axis=0), train.features.std(axis=0)
    x, x_test = ((f - mean) / std for f in (train.features.astype(float), test.features.astype(float)))
    offset = train.labels.mean(axis=0)
    expected = np.empty((20, 2))
    for i in range(2):
        y, errors, scores = train.labels[:, i] - offset[i], [], []
        for strength in np.logspace(0, 6, 13):
            gram = x.T @ x + strength * np.eye(5)
            hat = x @ np.linalg.solve(gram, x.T) + 1 / 40  # the intercept takes part in leaving one out
            errors.append((((y - hat @ y) / (1 - np.diag(hat))) ** 2).mean())
            scores.append(offset[i] + x_test @ np.linalg.solve(gram, x.T @ y))
        expected[:, i] = scores[int(np.argmin(errors))]
    assert linear_scores(train, test.features) == pytest.approx(expected, abs=1e-4)


def test_both_find_what_the_features_know_and_no_more() -> None:
    train, test = features(2000, 0), features(1000, 1)
    for scores in (knn_scores(train, test.features), linear_scores(train, test.features)):
        assert roc_auc_score(test.labels[:, 0], scores[:, 0]) > 0.85
        assert roc_auc_score(test.labels[:, 1], scores[:, 1]) == pytest.approx(0.5, abs=0.06)


def test_both_work_on_a_handful_of_samples_without_any_positive() -> None:
    train = features(4, 0)
    train.labels[:] = 0
    for scores in (knn_scores(train, features(9, 1).features), linear_scores(train, features(9, 1).features)):
        assert scores.shape == (9, 2)
        assert np.isfinite(scores).all()


def test_features_are_the_encoders_in_eval_mode_of_centre_crops(shard_folder: Path, encoder: torch.nn.Module) -> None:
    found = extract_features(encoder, pooled_features(encoder), loader_of(shard_folder), 32, "fp32")
    encoder.eval()
    images = torch.cat([batch.images for batch in loader_of(shard_folder)])
    with torch.no_grad():
        expected = encoder(to_unit_range(images[:, :, 2:34, 2:34]))[-1].mean(dim=(2, 3))
    assert torch.allclose(torch.from_numpy(found.features), expected, atol=1e-5)
    metas = {key: meta for key, meta, _ in ShardSet.open(shard_folder).read_samples("val")}
    assert found.keys == list(metas)
    assert found.labels.tolist() == [meta["labels"] for meta in metas.values()]


def test_a_probe_leaves_encoder_modes_gradients_and_random_numbers_as_they_were(
    shard_folder: Path, encoder: torch.nn.Module
) -> None:
    encoder(torch.rand(2, 1, 64, 64))[-1].sum().backward()
    state = copy.deepcopy(encoder.state_dict())
    modes = [module.training for module in encoder.modules()]
    gradients = [parameter.grad.clone() for parameter in encoder.parameters()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - what is looked at
    probe = Probe((ShardSet.open(shard_folder),), 32, 4, CPU)
    first, again = probe.run(encoder), probe.run(encoder)
    assert first == again
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(encoder.parameters(), gradients, strict=True))


def test_a_probe_scores_the_validation_split_from_the_training_split(
    shard_folder: Path, encoder: torch.nn.Module
) -> None:
    scores = Probe((ShardSet.open(shard_folder),), 32, 4, CPU).run(encoder)
    train, val = (
        extract_features(encoder, pooled_features(encoder), loader_of(shard_folder, split), 32, "fp32")
        for split in ("train", "val")
    )
    for name, found in (("knn", knn_scores(train, val.features)), ("linear", linear_scores(train, val.features))):
        areas = [
            roc_auc_score(val.labels[:, i], found[:, i]) for i in range(14) if 0 < val.labels[:, i].sum() < len(found)
        ]
        assert scores[f"probe_{name}_auc"] == pytest.approx(np.mean(areas))


def test_a_probe_reads_no_more_of_the_training_split_than_it_may(
    shard_folder: Path, encoder: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("downstream.probe.knn_scores", lambda train, _: seen.append(len(train.keys)) or _[:, :14])
    Probe((ShardSet.open(shard_folder),), 32, 4, CPU, max_train_samples=8).run(encoder)
    num_shards = len(ShardSet.open(shard_folder).split("train").tar_paths)
    assert 8 <= seen[0] <= 8 + num_shards


def test_a_set_without_labels_cannot_be_probed(shard_folder: Path) -> None:
    shard_set = ShardSet.open(shard_folder)
    with pytest.raises(UserError, match="holds no labels"):
        Probe((replace(shard_set, manifest=shard_set.manifest | {"label_names": []}),), 32, 4, CPU)


def _probe(folder: Path) -> dict[str, Any]:
    """On a rank: the same encoder's scores, and the features of this rank's part gathered."""
    shards = Path((folder / "shards.txt").read_text())
    torch.manual_seed(0)
    encoder = UNet("resnet18", 8, with_decoder=False).encoder
    loader = loader_of(shards, rank=distributed.rank(), world_size=RANKS)
    found = extract_features(encoder, pooled_features(encoder), loader, 32, "fp32")
    return {"keys": found and found.keys, "scores": Probe((ShardSet.open(shards),), 32, 4, CPU).run(encoder)}


def test_two_ranks_look_at_every_sample_once_and_get_one_ranks_scores(shard_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards.txt").write_text(str(shard_folder))
    first, second = run_on_ranks(_probe, tmp_path)
    assert first["keys"] == [key for key, _, _ in ShardSet.open(shard_folder).read_samples("val")]
    assert second == {"keys": None, "scores": {}}
    torch.manual_seed(0)
    alone = Probe((ShardSet.open(shard_folder),), 32, 4, CPU).run(UNet("resnet18", 8, with_decoder=False).encoder)
    assert first["scores"] == pytest.approx(alone, abs=0.02)
