from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from downstream.data import (
    EvaluationLoader,
    LabelledSpec,
    TrainLoader,
    common_label_names,
    part_by_patients,
    part_of_size,
    read_metas,
    whole_split,
)
from errors import UserError
from pipeline.shardset import ShardSet
from pipeline.spec import LabelledViewSpec

PLAIN = LabelledViewSpec(resized_size_px=64, crop_size_px=64, flip_probability=0, max_rotation_deg=0)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def spec(shard_folder: Path, request: pytest.FixtureRequest) -> LabelledSpec:
    return LabelledSpec(
        shard_sets=(ShardSet.open(shard_folder),),
        view=PLAIN,
        batch_size_per_rank=4,
        seed=1,
        device=torch.device(request.param),
    )


def metas_of(spec: LabelledSpec, split: str) -> dict[str, dict[str, Any]]:
    """JSON by key, read by the shard set's own reader."""
    return {key: meta for key, meta, _ in spec.shard_sets[0].read_samples(split)}


def images_of(spec: LabelledSpec, split: str) -> dict[str, np.ndarray]:
    """Stored images by key, uint8 [64, 64]."""
    samples = spec.shard_sets[0].read_samples(split)
    return {key: np.frombuffer(image, np.uint8).reshape(64, 64) for key, _, image in samples}


def keys_of_epoch(loader: TrainLoader, number: int) -> list[str]:
    return [key for batch in loader.epoch(number) for key in batch.keys]


def test_every_image_comes_with_its_own_key_patient_and_labels(spec: LabelledSpec) -> None:
    images, metas = images_of(spec, "train"), metas_of(spec, "train")
    part = whole_split(spec.shard_sets, "train")
    for batches in (TrainLoader(spec, part).epoch(0), EvaluationLoader(spec, part)):
        for batch in batches:
            assert batch.images.shape[1:] == (1, 64, 64)
            assert batch.images.dtype == torch.uint8
            for image, labels, key, patient in zip(*batch, strict=True):
                assert np.array_equal(image[0].cpu().numpy(), images[key])
                assert labels.tolist() == metas[key]["labels"]
                assert patient == metas[key]["patient"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 20])
def test_evaluation_sees_every_sample_once_on_any_number_of_ranks(spec: LabelledSpec, num_ranks: int) -> None:
    part = whole_split(spec.shard_sets, "val")
    ranks = [EvaluationLoader(replace(spec, rank=rank, world_size=num_ranks), part) for rank in range(num_ranks)]
    keys = [key for loader in ranks for batch in loader for key in batch.keys]
    assert keys == list(metas_of(spec, "val"))  # in the order of packing


def test_an_epoch_shows_every_sample_once_in_another_order_and_the_same_order_again(spec: LabelledSpec) -> None:
    loader = TrainLoader(replace(spec, batch_size_per_rank=1), whole_split(spec.shard_sets, "train"))
    epochs = [keys_of_epoch(loader, number) for number in (0, 1, 0)]
    assert all(Counter(keys) == Counter(metas_of(spec, "train").keys()) for keys in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] == epochs[2]
    other_seed = TrainLoader(replace(spec, batch_size_per_rank=1, seed=2), whole_split(spec.shard_sets, "train"))
    assert keys_of_epoch(other_seed, 0) != epochs[0]


def test_what_an_epoch_leaves_out_is_different_each_time(spec: LabelledSpec) -> None:
    part = whole_split(spec.shard_sets, "train")
    loader = TrainLoader(replace(spec, batch_size_per_rank=part.num_samples - 1), part)
    assert loader.steps_per_epoch == 1
    assert len({frozenset(metas_of(spec, "train")) - set(keys_of_epoch(loader, i)) for i in range(8)}) > 2


def test_ranks_train_on_different_samples(spec: LabelledSpec) -> None:
    part = whole_split(spec.shard_sets, "train")
    ranks = [TrainLoader(replace(spec, batch_size_per_rank=2, rank=rank, world_size=2), part) for rank in range(2)]
    keys = [keys_of_epoch(loader, 3) for loader in ranks]
    assert len(keys[0]) == len(keys[1]) == 2 * (part.num_samples // 4)
    assert len(set(keys[0]) | set(keys[1])) == len(keys[0]) + len(keys[1])


def test_a_part_smaller_than_a_batch_trains_in_smaller_batches_and_several_passes(
    spec: LabelledSpec, tmp_path: Path
) -> None:
    part = part_by_patients(spec.shard_sets, "train", tmp_path, num_patients=1, seed=0)
    assert 1 <= part.num_samples <= 3
    loader = TrainLoader(spec, part, min_steps_per_epoch=5)
    assert loader.batch_size_per_rank == part.num_samples
    assert loader.steps_per_epoch == 5
    assert set(Counter(keys_of_epoch(loader, 0)).values()) == {5}
    with pytest.raises(UserError, match="over 20 ranks"):
        TrainLoader(replace(spec, world_size=20), part)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_a_label_fraction_is_a_fraction_of_the_patients_with_all_their_images(
    spec: LabelledSpec, tmp_path: Path, fraction: float
) -> None:
    part = part_by_patients(spec.shard_sets, "train", tmp_path, fraction=fraction, seed=4)
    metas = metas_of(spec, "train")
    images_per_patient = Counter(meta["patient"] for meta in metas.values())
    seen = Counter(patient for batch in EvaluationLoader(spec, part) for patient in batch.patients)
    assert len(seen) == round(fraction * len(images_per_patient))
    assert all(seen[patient] == images_per_patient[patient] for patient in seen)
    assert part.num_samples == seen.total()


def test_a_smaller_fraction_is_within_a_larger_one_and_the_seed_decides_which(
    spec: LabelledSpec, tmp_path: Path
) -> None:
    def keys(**choice: Any) -> set[str]:
        part = part_by_patients(spec.shard_sets, "train", tmp_path, **choice)
        return {key for batch in EvaluationLoader(spec, part) for key in batch.keys}

    assert keys(fraction=0.25, seed=1) < keys(fraction=0.5, seed=1) < keys(fraction=1.0, seed=1)
    assert keys(num_patients=3, seed=1) == keys(num_patients=3, seed=1) != keys(num_patients=3, seed=2)
    with pytest.raises(UserError, match="patients, not 1000"):
        keys(num_patients=1000, seed=1)


def test_a_part_of_a_size_is_taken_from_every_tar(spec: LabelledSpec, tmp_path: Path) -> None:
    whole = whole_split(spec.shard_sets, "train")
    part = part_of_size(spec.shard_sets, "train", tmp_path, 12)
    assert part.tar_paths == whole.tar_paths
    assert 12 <= part.num_samples <= 12 + len(whole.tar_paths)
    assert sum(len(batch.keys) for batch in EvaluationLoader(spec, part)) == part.num_samples
    assert part_of_size(spec.shard_sets, "train", tmp_path, 1000) == whole


def test_metas_are_read_without_the_images(spec: LabelledSpec) -> None:
    (shard_set,) = spec.shard_sets
    metas = [meta for shard in shard_set.shards if shard.split == "train" for meta in read_metas(shard_set, shard)]
    assert [meta.pop("crc32") is not None for meta in metas]
    assert metas == list(metas_of(spec, "train").values())


def change_split(shard_set: ShardSet, split: str, **changes: Any) -> ShardSet:
    splits = shard_set.manifest["splits"]
    return replace(shard_set, manifest=shard_set.manifest | {"splits": splits | {split: splits[split] | changes}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, manifest=s.manifest | {"label_names": []}), "holds no labels: pack it with --labels"),
        (lambda s: change_split(s, "val", labelled=1), "samples of split 'val' have no labels"),
        (lambda s: replace(s, manifest=s.manifest | {"splits": {"train": {}}}), "has no split 'train'"),
    ],
)
def test_sets_without_labels_are_refused(
    spec: LabelledSpec, change: Callable[[ShardSet], ShardSet], message: str
) -> None:
    assert common_label_names(spec.shard_sets, ("train", "val", "test")) == spec.shard_sets[0].label_names
    with pytest.raises(UserError, match=message):
        common_label_names((change(spec.shard_sets[0]),), ("train", "val"))


def test_sets_with_different_findings_are_refused(spec: LabelledSpec) -> None:
    (first,) = spec.shard_sets
    other = replace(first, manifest=first.manifest | {"label_names": ["Hernia"]})
    with pytest.raises(UserError, match="its findings are not those of"):
        common_label_names((first, other), ("train",))


def test_evaluation_resamples_as_torchvision_does(spec: LabelledSpec) -> None:
    small = replace(spec, view=LabelledViewSpec(resized_size_px=37, crop_size_px=32))
    images = images_of(spec, "val")
    for batch in EvaluationLoader(small, whole_split(spec.shard_sets, "val")):
        for image, key in zip(batch.images.cpu(), batch.keys, strict=True):
            expected = tv.resize(torch.tensor(images[key])[None].float(), [37, 37], antialias=True)
            difference = (image - expected).abs()
            assert difference[:, 1:-1, 1:-1].max() <= 1
            assert difference.max() < 12, "beyond the border DALI repeats pixels, torchvision leaves them out"


def best_match(view: np.ndarray, candidates: np.ndarray) -> int:
    """The candidate [N, S, S] that differs least from a view, or -1 where none is the same up to rounding."""
    differences = np.abs(candidates.astype(int) - view).mean(axis=(1, 2))
    return int(differences.argmin()) if differences.min() < 1 else -1


def test_training_crops_lie_anywhere_and_half_of_them_are_mirrored(spec: LabelledSpec) -> None:
    view = replace(PLAIN, crop_size_px=62, flip_probability=0.5)
    loader = TrainLoader(replace(spec, view=view), whole_split(spec.shard_sets, "train"), min_steps_per_epoch=60)
    images, found = images_of(spec, "train"), []
    for batch in loader.epoch(0):
        for crop, key in zip(batch.images[:, 0].cpu().numpy(), batch.keys, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(images[key], (62, 62)).reshape(-1, 62, 62)
            found.append(best_match(crop, np.concatenate([windows, windows[:, :, ::-1]])))
    assert -1 not in found
    assert set(found) == set(range(18))  # nine places, as they lie and mirrored
    assert np.mean(np.array(found) >= 9) == pytest.approx(0.5, abs=4 * 0.5 / len(found) ** 0.5)


def test_training_crops_are_turned_by_up_to_seven_degrees_about_their_centre(spec: LabelledSpec) -> None:
    view = LabelledViewSpec(resized_size_px=64, crop_size_px=64, flip_probability=0)
    loader = TrainLoader(replace(spec, view=view), whole_split(spec.shard_sets, "train"), min_steps_per_epoch=30)
    images, angles = images_of(spec, "train"), np.arange(-10, 10.1, 0.5)
    found = []
    for batch in loader.epoch(0):
        for crop, key in zip(batch.images[:, 0].cpu().numpy(), batch.keys, strict=True):
            centre = (31.5, 31.5)  # in OpenCV, whole numbers are the pixels' centres
            turned = [
                cv2.warpAffine(images[key], cv2.getRotationMatrix2D(centre, angle, 1), (64, 64)) for angle in angles
            ]
            differences = np.abs(np.array(turned).astype(int) - crop)[:, 16:48, 16:48].mean(axis=(1, 2))
            found.append(angles[differences.argmin()])
            assert differences.min() < 4
    assert -7.5 <= min(found) < -5
    assert 5 < max(found) <= 7.5
    assert np.std(found) == pytest.approx(14 / 12**0.5, rel=0.2)  # of a uniform distribution
