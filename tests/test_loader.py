from collections import Counter
from dataclasses import replace
from itertools import chain, islice, pairwise, repeat
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bench_big_set import write_set
from errors import UserError
from pipeline.loader import LoaderSpec, PretrainLoader, ValidationLoader
from pipeline.pack_job import pack
from pipeline.packing import parse_index
from pipeline.plan import PackSettings
from pipeline.shardset import ShardSet
from pipeline.spec import Batch, DistortionSpec, ViewSpec
from tests.commands import run_command

PLAIN = ViewSpec(
    crop_size_px=32,
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    jitter_probability=0,
    blur_probability=0,
    flip_probability=0,
)


@pytest.fixture
def spec(shard_folder: Path) -> LoaderSpec:
    return LoaderSpec(
        shard_sets=(ShardSet.open(shard_folder),),
        view=ViewSpec(crop_size_px=32),
        distortion=DistortionSpec(),
        batch_size_per_rank=4,
        seed=1,
        device=torch.device("cpu"),
    )


def images_seen(batches: list[Batch]) -> Counter[bytes]:
    """Count the radiographs, told apart by their pixels."""
    return Counter(image.numpy().tobytes() for batch in batches for image in batch.target)


def draw(loader: PretrainLoader, num_batches: int) -> list[Batch]:
    """Return batches of as many epochs as it takes."""
    return list(islice(chain.from_iterable(repeat(loader)), num_batches))


def same(ours: Batch, theirs: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_batches_are_grey_bytes_of_the_asked_size(spec: LoaderSpec) -> None:
    batch = next(iter(PretrainLoader(spec)))
    for images in batch:
        assert images.shape == (4, 1, 32, 32)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()


def test_an_epoch_has_as_many_steps_as_full_global_batches(spec: LoaderSpec) -> None:
    num_samples = spec.num_samples("train")
    loader = PretrainLoader(spec)
    assert loader.steps_per_epoch == num_samples // 4
    assert [len(list(loader)) for _ in range(3)] == [num_samples // 4] * 3
    ranks = [PretrainLoader(replace(spec, rank=rank, world_size=3)) for rank in range(3)]
    assert {loader.steps_per_epoch for loader in ranks} == {num_samples // 12}


def test_each_epoch_gives_every_sample_once_in_another_order(spec: LoaderSpec) -> None:
    loader = PretrainLoader(replace(spec, view=PLAIN, distortion=None, batch_size_per_rank=1))
    epochs = [list(loader) for _ in range(3)]
    for batches in epochs:
        seen = images_seen(batches)
        assert set(seen.values()) == {1}
        assert len(seen) == spec.num_samples("train")
    for first, second in pairwise(epochs):
        assert not all(same(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_the_samples_out_without_overlap(spec: LoaderSpec, num_ranks: int) -> None:
    num_samples = spec.num_samples("train")
    plain = replace(spec, view=PLAIN, distortion=None, batch_size_per_rank=1, world_size=num_ranks)
    batches = []
    for rank in range(num_ranks):
        share = num_samples * (rank + 1) // num_ranks - num_samples * rank // num_ranks
        batches += draw(PretrainLoader(replace(plain, rank=rank)), share)
    seen = images_seen(batches)
    assert set(seen.values()) == {1}
    assert len(seen) == num_samples


def test_ranks_augment_differently(spec: LoaderSpec) -> None:
    batches = [next(iter(PretrainLoader(replace(spec, rank=rank, world_size=2)))) for rank in range(2)]
    assert not any(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_the_seed_decides_everything(spec: LoaderSpec) -> None:
    first, again, other = (next(iter(PretrainLoader(replace(spec, seed=seed)))) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("num_drawn", [0, 3, 9])
def test_a_restored_loader_goes_on_with_the_very_same_batches(spec: LoaderSpec, num_drawn: int) -> None:
    loader = PretrainLoader(spec)

    draw(loader, num_drawn)
    state = loader.state_dict()
    expected = draw(loader, 2 * loader.steps_per_epoch)
    restored = PretrainLoader(replace(spec, seed=5))
    next(iter(restored))
    restored.load_state_dict(state)
    assert restored.num_batches_drawn == num_drawn
    assert all(same(a, b) for a, b in zip(draw(restored, 2 * loader.steps_per_epoch), expected, strict=True))


def test_a_restored_loader_gives_the_rest_of_the_epoch(spec: LoaderSpec) -> None:
    loader = PretrainLoader(spec)
    next(iter(loader))
    assert len(list(loader)) == loader.steps_per_epoch - 1
    assert len(list(loader)) == loader.steps_per_epoch


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 20])
def test_validation_sees_every_sample_once_on_any_number_of_ranks(spec: LoaderSpec, num_ranks: int) -> None:
    plain = replace(spec, view=PLAIN, distortion=None, world_size=num_ranks)
    batches = [batch for rank in range(num_ranks) for batch in ValidationLoader(replace(plain, rank=rank))]
    seen = images_seen(batches)
    assert set(seen.values()) == {1}
    assert len(seen) == spec.num_samples("val")


def test_validation_is_the_same_every_time(spec: LoaderSpec) -> None:
    loader = ValidationLoader(spec)
    assert all(same(a, b) for a, b in zip(loader, loader, strict=True))


def test_several_sets_are_read_as_one(spec: LoaderSpec) -> None:
    double = replace(spec, shard_sets=spec.shard_sets * 2, view=PLAIN, distortion=None)
    assert double.num_samples("train") == 2 * spec.num_samples("train")
    assert set(images_seen(list(ValidationLoader(double))).values()) == {2}


def test_several_sets_are_mixed_in_proportion_from_the_first_epoch_on(tmp_path: Path) -> None:
    sets = []
    for i, num_samples in enumerate((3000, 1000)):  # more than the reader's buffer of 1,024
        write_set(tmp_path / str(i), 32, num_samples, samples_per_shard=100, seed=i)
        sets.append(ShardSet.open(tmp_path / str(i)))
    of_second = {image for _, _, image in sets[1].read_samples("train")}
    positions = []
    for seed in range(6):
        spec = LoaderSpec(tuple(sets), PLAIN, None, 50, seed, torch.device("cpu"))
        batches = list(PretrainLoader(spec))
        assert set(images_seen(batches).values()) == {1}
        is_of_second = np.array([[image.numpy().tobytes() in of_second for image in batch.target] for batch in batches])
        assert is_of_second.sum() == 1000
        shares = is_of_second.mean(axis=1)
        assert ((shares > 0) & (shares < 1)).mean() > 0.95
        assert shares.std() < 0.25
        positions.append(np.nonzero(is_of_second.ravel())[0].mean() / is_of_second.size)
    # 10 of 40 tars in random places: a standard deviation of 0.08, over six seeds 0.032
    assert np.mean(positions) == pytest.approx(0.5, abs=0.12)


def test_what_cannot_be_read_together_is_refused(spec: LoaderSpec) -> None:
    (shards,) = spec.shard_sets
    other = replace(shards, path="elsewhere", manifest=shards.manifest | {"store": "png"})
    with pytest.raises(UserError, match="elsewhere is packed as png"):
        PretrainLoader(replace(spec, shard_sets=(shards, other)))
    with pytest.raises(UserError, match=f"more than the {spec.num_samples('train')} samples"):
        PretrainLoader(replace(spec, batch_size_per_rank=64))
    with pytest.raises(UserError, match="nonsense"):
        ValidationLoader(spec, "nonsense")


def test_views_hold_what_the_shards_hold(spec: LoaderSpec) -> None:
    plain = replace(spec, view=replace(PLAIN, crop_size_px=64), distortion=None)
    packed = {np.frombuffer(image, np.uint8).tobytes() for _, _, image in spec.shard_sets[0].read_samples("val")}
    assert set(images_seen(list(ValidationLoader(plain)))) == packed


def test_a_sample_that_does_not_decode_is_named_with_its_shard(tmp_path: Path) -> None:
    run_command("-m", "pipeline.phantom", tmp_path, "--num-images", "6", "--size-px", "64").check_returncode()
    pack(PackSettings(images=(tmp_path / "images",), out=tmp_path / "set", store="png", size_px=64, val_fraction=0))
    opened = ShardSet.open(tmp_path / "set")
    (tar,) = (tmp_path / "set" / "train").glob("*.tar")
    entry = parse_index(tar.with_suffix(".idx").read_bytes())[3]
    with tar.open("r+b") as file:
        file.seek(entry.image_offset + 50)
        file.write(bytes(200))
    spec = LoaderSpec((opened,), ViewSpec(crop_size_px=32), None, 2, seed=0, device=torch.device("cpu"))
    with pytest.raises(UserError, match=f"{tar}: sample {entry.key}: damaged .*; run shard_cxr14.py verify"):
        list(ValidationLoader(spec, "train"))
