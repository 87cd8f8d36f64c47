import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def

from errors import UserError
from pipeline.pack_job import pack
from pipeline.packing import ShardWriter, seal_meta
from pipeline.plan import PackSettings
from pipeline.shardset import ShardSet, verify_shard_set

NUM_IMAGES = 9
SIZE_PX = 32


def make_set(folder: Path, **options: object) -> Path:
    """Nine radiographs of noise, four a shard: train 4 + 4, val 1; names are not all ASCII."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        cv2.imwrite(str(images / f"ü{i}.png"), rng.integers(0, 256, (48, 40), dtype=np.uint8))
    pack(PackSettings(images=(images,), out=folder / "set", size_px=SIZE_PX, samples_per_shard=4, **options))
    return folder / "set"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def shards(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "set"))


# --- reading --------------------------------------------------------------------------------------------------------


def test_split_lists_tars_indexes_and_samples(pristine: Path) -> None:
    shard_set = ShardSet.open(pristine)
    assert (shard_set.store, shard_set.size_px, shard_set.label_names) == ("raw", SIZE_PX, ())
    train = shard_set.split("train")
    assert train.tar_paths == [str(pristine / "train" / f"train-00000{i}.tar") for i in range(2)]
    assert train.index_paths == [str(pristine / "train" / f"train-00000{i}.idx") for i in range(2)]
    assert (train.num_samples, shard_set.split("val").num_samples) == (8, 1)
    with pytest.raises(UserError, match="no split 'test', only train, val"):
        shard_set.split("test")


def test_samples_are_read_as_tarfile_reads_them(pristine: Path) -> None:
    expected = []
    for path in sorted((pristine / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            expected += [(member.name, tar.extractfile(member).read()) for member in tar]
    samples = list(ShardSet.open(pristine).read_samples("train"))
    assert [(f"{key}.raw", image) for key, _, image in samples] == expected[::2]
    for (key, meta, _), (name, content) in zip(samples, expected[1::2], strict=True):
        assert name == f"{key}.json"
        assert meta == {entry: value for entry, value in json.loads(content).items() if entry != "crc32"}
        assert meta["key"] == key


def test_webdataset_reads_the_tars(pristine: Path) -> None:
    shard_set = ShardSet.open(pristine)
    dataset = webdataset.WebDataset(shard_set.split("train").tar_paths, shardshuffle=False, empty_check=False).decode()
    expected = list(shard_set.read_samples("train"))
    for sample, (key, meta, image) in zip(dataset, expected, strict=True):
        assert (sample["__key__"], sample["raw"]) == (key, image)
        assert sample["json"]["patient"] == meta["patient"]


def test_dali_reads_the_tars_by_their_indexes(pristine: Path) -> None:
    shard_set = ShardSet.open(pristine)
    split = shard_set.split("train")

    @pipeline_def(batch_size=split.num_samples, num_threads=1, device_id=None)
    def graph() -> tuple:
        return tuple(fn.readers.webdataset(paths=split.tar_paths, index_paths=split.index_paths, ext=["raw", "json"]))

    images, metas = graph().run()
    for i, (key, _, image) in enumerate(shard_set.read_samples("train")):
        assert np.array(images[i]).tobytes() == image
        assert json.loads(np.array(metas[i]).tobytes())["key"] == key


def test_set_may_lie_in_object_storage(pristine: Path) -> None:
    """`s3://` goes through fsspec as this memory file system does."""
    fsspec.filesystem("memory").put(f"{pristine}/", "/bucket/set", recursive=True)
    there, here = ShardSet.open("memory://bucket/set/"), ShardSet.open(pristine)
    assert there.split("val").tar_paths == ["memory://bucket/set/val/val-000000.tar"]
    assert list(there.read_samples("train")) == list(here.read_samples("train"))
    assert verify_shard_set("memory://bucket/set") == []


# --- opening what is not right --------------------------------------------------------------------------------------


def test_what_is_no_shard_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such folder"):
        ShardSet.open(tmp_path / "gone")
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        ShardSet.open(tmp_path)
    for content, reason in {
        "{": "damaged",
        "[]": "not the manifest",
        '{"format": "other"}': "not the manifest",
        '{"format": "dira-shard-set", "version": 2}': "version 2, this program reads 1",
        '{"format": "dira-shard-set", "version": 1}': "damaged",
    }.items():
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=f"manifest.json: .*{reason}"):
            ShardSet.open(tmp_path)


def test_missing_surplus_and_short_files_are_told(pristine: Path, tmp_path: Path) -> None:
    tar_bytes = (pristine / "train" / "train-000001.tar").stat().st_size
    damages = {
        "train-000000.tar: missing": lambda train: (train / "train-000000.tar").unlink(),
        "train-000000.idx: missing": lambda train: (train / "train-000000.idx").unlink(),
        "train-000002.tar: not in the manifest": lambda train: (train / "train-000002.tar").touch(),
        f"train-000001.tar: 100 bytes instead of {tar_bytes}": lambda train: os.truncate(
            train / "train-000001.tar", 100
        ),
        "train-000001.idx: ": lambda train: (train / "train-000001.idx").write_text("v1.2 0\n"),
    }
    for i, (reason, damage) in enumerate(damages.items()):
        shards = Path(shutil.copytree(pristine, tmp_path / str(i)))
        damage(shards / "train")
        with pytest.raises(UserError, match=reason):
            ShardSet.open(shards)
        (problem,) = verify_shard_set(shards)
        assert reason in problem


def test_index_that_cannot_be_its_tars_is_told(pristine: Path, tmp_path: Path) -> None:
    good = (pristine / "train" / "train-000001.idx").read_bytes()
    lines = good.splitlines(keepends=True)
    bad_indexes = {
        "empty": b"",
        "cut at a line": b"".join(lines[:-1]),
        "cut in a line": good[:-9],
        "another's header": b"v1.2 7\n" + b"".join(lines[1:]),
        "too long": good + lines[-1],
        "beyond the tar": good.replace(lines[-1], lines[-1].replace(b" json ", b" json 1")),
        "other contents": good.replace(lines[-1], b"nonsense\n"),
    }
    for name, content in bad_indexes.items():
        shards = Path(shutil.copytree(pristine, tmp_path / name))
        (shards / "train" / "train-000001.idx").write_bytes(content)
        with pytest.raises(UserError, match=r"train-000001\.idx: can't be the index of its tar"):
            ShardSet.open(shards)


def test_changed_index_and_another_sets_tar_are_told_at_once(pristine: Path, tmp_path: Path) -> None:
    """No byte of an index may change; a tar of the right length must hold the samples that the index names."""
    content = (pristine / "train" / "train-000001.idx").read_bytes()
    for position in range(0, len(content), 7):
        shards = Path(shutil.copytree(pristine, tmp_path / f"flip-{position}"))
        flip(shards / "train" / "train-000001.idx", position)
        with pytest.raises(UserError, match=r"train-000001\.idx: can't be the index of its tar"):
            ShardSet.open(shards)
    shards = Path(shutil.copytree(pristine, tmp_path / "swapped"))
    first, second = (shards / "train" / f"train-00000{i}.tar" for i in range(2))
    assert first.stat().st_size == second.stat().st_size
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"train-000001\.tar: sample \S+ is not where it was packed"):
        ShardSet.open(shards)


def test_place_that_cannot_be_reached_is_told() -> None:
    with pytest.raises(UserError, match="nowhere://set: cannot be reached"):
        ShardSet.open("nowhere://set")


def test_other_files_beside_the_shards_do_not_hinder_opening_but_verify_names_them(shards: Path) -> None:
    (shards / "notes.txt").touch()
    (shards / "rejected.csv").unlink()
    ShardSet.open(shards)
    assert verify_shard_set(shards) == [f"{shards}/rejected.csv: missing", f"{shards}/notes.txt: not in the manifest"]


# --- verification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["raw", "jpeg", "png"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_good_set_is_good(tmp_path: Path, store: str, num_workers: int) -> None:
    counted = []
    assert verify_shard_set(make_set(tmp_path, store=store), num_workers, counted.append) == []
    assert sum(counted) == NUM_IMAGES


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x04]))


def test_any_flipped_byte_of_a_tar_is_found_with_its_shard_and_key(shards: Path) -> None:
    path = shards / "train" / "train-000001.tar"
    with tarfile.open(path) as tar:
        starts = [(member.offset, member.name.split(".")[0]) for member in tar if member.name.endswith(".raw")]
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in tar)
    for position in range(0, path.stat().st_size, 61):
        flip(path, position)
        (problem,) = verify_shard_set(shards)
        flip(path, position)
        assert problem.startswith(f"{path}: ")
        if position < end:
            key = [key for start, key in starts if start <= position][-1]
            assert f"sample {key}: " in problem
    assert verify_shard_set(shards) == []


def test_any_flipped_byte_of_an_index_is_found_with_its_key(shards: Path) -> None:
    path = shards / "train" / "train-000000.idx"
    content = path.read_bytes()
    keys = [key for key, _, _ in ShardSet.open(shards).read_samples("train")][:4]
    for position in range(len(content)):
        flip(path, position)
        (problem,) = verify_shard_set(shards)
        flip(path, position)
        assert problem.startswith(f"{path}: damaged")
        line = content[:position].count(b"\n")
        assert problem.endswith(keys[line - 1] if line else "at its start")


def test_tar_is_checked_although_its_index_is_missing(shards: Path) -> None:
    key = next(key for key, _, _ in ShardSet.open(shards).read_samples("train"))
    (shards / "train" / "train-000000.idx").unlink()
    flip(shards / "train" / "train-000000.tar", 600)
    missing, damaged = verify_shard_set(shards)
    assert "train-000000.idx: missing" in missing
    assert f"sample {key}: its image or JSON is damaged" in damaged


def test_image_that_does_not_decode_is_named_though_all_checksums_are_right(tmp_path: Path) -> None:
    shards = make_set(tmp_path, store="png")
    ((key, meta, image),) = ShardSet.open(shards).read_samples("val")
    half = image[: len(image) // 2]
    with ShardWriter(shards / "val" / "val-000000") as writer:
        writer.add(key, "png", half, seal_meta(meta, zlib.crc32(half)))
    manifest = json.loads((shards / "manifest.json").read_text())
    described = {"bytes": writer.num_bytes, "sha256": writer.sha256, "index_sha256": writer.index_sha256}
    manifest["splits"]["val"]["shards"][0] |= described
    (shards / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify_shard_set(shards)
    assert f"sample {key}: cut short" in problem
