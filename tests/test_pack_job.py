import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from errors import UserError
from pipeline.pack_job import pack
from pipeline.plan import PackSettings
from pipeline.shardset import ShardSet, verify_shard_set
from tests.commands import ROOT

SIZE_PX = 32


def make_images(folder: Path, num_patients: int = 10, num_followups: int = 2, side_px: int = 48) -> Path:
    """Radiographs of noise, named as NIH names them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(num_patients * num_followups):
        name = f"{i // num_followups:08d}_{i % num_followups:03d}.png"
        cv2.imwrite(str(folder / name), rng.integers(0, 256, (side_px, side_px), dtype=np.uint8))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def run(out: Path, *images: Path, **options: object) -> ShardSet:
    defaults = {"size_px": SIZE_PX, "samples_per_shard": 4, "val_fraction": 0.2}
    pack(PackSettings(images=images, out=out, **defaults | options))
    return ShardSet.open(out)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def all_samples(shard_set: ShardSet) -> dict[str, tuple[dict, bytes]]:
    splits = shard_set.manifest["splits"]
    return {key: (meta, image) for split in splits for key, meta, image in shard_set.read_samples(split)}


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["raw", "jpeg", "png"])
def test_bytes_do_not_depend_on_the_number_of_workers(images: Path, tmp_path: Path, store: str) -> None:
    sets = [tree(Path(run(tmp_path / str(n), images, workers=n, store=store).path)) for n in (1, 2, 7)]
    assert sets[0] == sets[1] == sets[2]
    assert len(sets[0]) == 2 + 2 * 5  # manifest, list of rejected; 16 images for training and 4 for validation


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_give_the_same_bytes_as_the_folder(images: Path, tmp_path: Path, mode: str) -> None:
    archives = [tmp_path / f"images_{i}.tar.gz" for i in range(3)]
    for i, archive in enumerate(archives):
        with tarfile.open(archive, mode) as tar:
            for path in sorted(images.iterdir())[i::3]:
                tar.add(path, arcname=f"images/{path.name}")
    run(tmp_path / "a", images)
    run(tmp_path / "b", *archives)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_mixed_images_in_sub_folders_with_dots_in_their_names_are_packed(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 56), dtype=np.uint8)
    colour = np.dstack([grey, 255 - grey, grey])
    forms = {
        "a.1/grey.v2.png": Image.fromarray(grey),
        "a.1/b/rgb.PNG": Image.fromarray(colour),
        "rgba.png": Image.fromarray(np.dstack([colour, grey])),
        "palette.png": Image.fromarray(colour).quantize(8),
        "c/deep.png": Image.fromarray(grey.astype(np.uint16) * 16),
        "c/photo.JPG": Image.fromarray(colour),
        "c/photo.grey.jpeg": Image.fromarray(grey),
    }
    for name, image in forms.items():
        path = tmp_path / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    samples = all_samples(run(tmp_path / "set", tmp_path / "mixed"))
    keys = {"grey_v2", "rgb", "rgba", "palette", "deep", "photo", "photo_grey"}
    assert samples.keys() == keys
    assert {meta["name"] for meta, _ in samples.values()} == {Path(name).name for name in forms}
    assert all(len(image) == SIZE_PX**2 for _, image in samples.values())


def test_json_holds_what_is_known(images: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in images.iterdir())
    labels, boxes, test_list = tmp_path / "l.csv", tmp_path / "b.csv", tmp_path / "t.txt"
    rows = [f"{name},{'Mass|Edema' if i == 3 else 'No Finding'},{i // 2}" for i, name in enumerate(names)]
    labels.write_text("\n".join(["Image Index,Finding Labels,Patient ID", *rows]))
    boxes.write_text(f"Image Index,Finding Label,Bbox [x,y,w,h],,,\n{names[3]},Infiltrate,1.5,2,3,4")
    test_list.write_text("\n".join(names[2:4]))
    shard_set = run(tmp_path / "set", images, labels=labels, boxes=boxes, test_list=test_list)
    samples = all_samples(shard_set)
    meta, image = samples[names[3].removesuffix(".png")]
    original = cv2.imread(str(images / names[3]), cv2.IMREAD_GRAYSCALE)
    assert image == cv2.resize(original, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA).tobytes()
    assert meta == {
        "key": "00000001_001",
        "name": "00000001_001.png",
        "patient": "1",
        "split": "test",
        "labels": [int(name in ("Mass", "Edema")) for name in shard_set.label_names],
        "boxes": [{"label": "Infiltration", "x": 1.5, "y": 2.0, "w": 3.0, "h": 4.0}],
        "original_size_px": [48, 48],
        "stored_size_px": [32, 32],
        "scale": [32 / 48, 32 / 48],
        "offset_px": [0, 0],
    }
    test = shard_set.manifest["splits"]["test"]
    assert (test["samples"], test["patients"], test["boxes"], test["labelled"]) == (2, 1, 1, 2)
    assert {name: n for name, n in test["labels"].items() if n} == {"Mass": 1, "Edema": 1}


@pytest.mark.parametrize("store", ["raw", "png"])
def test_manifest_counts_what_is_there(tmp_path: Path, store: str) -> None:
    images = make_images(tmp_path / "images")
    rng = np.random.default_rng(1)
    for i in range(3):
        cv2.imwrite(str(images / f"wide{i}.png"), rng.integers(0, 256, (40, 90), dtype=np.uint8))
    shard_set = run(tmp_path / "set", images, store=store)
    manifest = shard_set.manifest
    pixels = []
    for split, info in manifest["splits"].items():
        samples = list(shard_set.read_samples(split))
        assert info["samples"] == len(samples) == sum(shard["samples"] for shard in info["shards"])
        assert info["patients"] == len({meta["patient"] for _, meta, _ in samples})
        assert {meta["split"] for _, meta, _ in samples} == {split}
        if split == "train":
            pixels = [
                np.frombuffer(image, np.uint8) if store == "raw" else np.asarray(Image.open(io.BytesIO(image)))
                for _, _, image in samples
            ]
    values = np.concatenate([image.ravel() for image in pixels]).astype(np.float64) / 255
    assert manifest["pixel_mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert manifest["pixel_std"] == pytest.approx(values.std(), rel=1e-12)
    assert manifest["samples"] == 23
    assert manifest["padded_to_square"] == (3 if store == "raw" else 0)


def test_default_shards_are_neither_few_nor_large(images: Path, tmp_path: Path) -> None:
    small = run(tmp_path / "a", images, samples_per_shard=None).manifest["splits"]
    assert [shard["samples"] for shard in small["train"]["shards"]] == [16]
    wide = make_images(tmp_path / "many", num_patients=200, num_followups=1, side_px=32)
    many = run(tmp_path / "b", wide, samples_per_shard=None, val_fraction=0).manifest["splits"]
    assert [shard["samples"] for shard in many["train"]["shards"]] == [25] * 8


# --- images that can't be used --------------------------------------------------------------------------------------


def damage(images: Path, *positions: int) -> list[Path]:
    paths = [sorted(images.iterdir())[i] for i in positions]
    for path in paths:
        path.write_bytes(path.read_bytes()[:1000])
    return paths


def test_unusable_images_are_listed_with_their_reasons_and_the_others_packed(images: Path, tmp_path: Path) -> None:
    (cut,) = damage(images, 3)
    (images / "gone.png").symlink_to("nowhere.png")
    (images / "page.jpg").write_text("<html>")
    shard_set = run(tmp_path / "set", images, max_rejected=3)
    rows = list(csv.reader((tmp_path / "set" / "rejected.csv").open()))
    assert rows == [
        ["file", "reason"],
        [str(cut), "cut short: no PNG end in its 1000 bytes"],
        [str(images / "gone.png"), "a link to nowhere, or a device"],
        [str(images / "page.jpg"), "neither PNG nor JPEG"],
    ]
    assert all_samples(shard_set).keys() == {path.stem for path in images.iterdir()} - {cut.stem, "gone", "page"}
    assert (shard_set.manifest["rejected"], shard_set.manifest["samples"]) == (3, 19)
    assert verify_shard_set(tmp_path / "set") == []


def test_unusable_member_of_an_archive_is_listed_with_the_archive(images: Path, tmp_path: Path) -> None:
    (cut,) = damage(images, 3)
    for mode in ("w", "w:gz"):
        archive = tmp_path / f"{mode[1:]}.tar.gz"
        with tarfile.open(archive, mode) as tar:
            tar.add(images, arcname="images")
        run(tmp_path / f"set{mode[1:]}", archive)
        rows = list(csv.reader((tmp_path / f"set{mode[1:]}" / "rejected.csv").open()))
        assert rows[1:] == [[f"{archive}:images/{cut.name}", "cut short: no PNG end in its 1000 bytes"]]


def test_one_in_a_hundred_rounded_up_may_be_unusable_by_default(images: Path, tmp_path: Path) -> None:
    damage(images, 3)
    assert run(tmp_path / "set", images).manifest["rejected"] == 1
    damage(images, 4)
    with pytest.raises(
        UserError, match=r"2 images can't be used, and --max-rejected is 1 .*0000000._00.\.png: cut short"
    ):
        run(tmp_path / "other", images)


def test_pack_without_rejections_has_a_list_of_none(images: Path, tmp_path: Path) -> None:
    run(tmp_path / "set", images)
    assert (tmp_path / "set" / "rejected.csv").read_text() == "file,reason\n"


def test_shard_of_unusable_images_alone_is_left_out(images: Path, tmp_path: Path) -> None:
    damage(images, *range(8))
    shard_set = run(tmp_path / "set", images, samples_per_shard=1, max_rejected=8, val_fraction=0)
    assert len(shard_set.shards) == 12
    assert verify_shard_set(tmp_path / "set") == []


def test_split_without_a_usable_image_is_an_error(images: Path, tmp_path: Path) -> None:
    damage(images, 0, 1)
    test_list = tmp_path / "test.txt"
    test_list.write_text("00000000_000.png\n00000000_001.png\n")
    with pytest.raises(UserError, match="none of the 2 images for test can be used"):
        run(tmp_path / "set", images, test_list=test_list, max_rejected=2)
    assert not (tmp_path / "set" / "manifest.json").exists()


# --- carrying on ----------------------------------------------------------------------------------------------------


def test_same_command_carries_on_with_what_is_missing(images: Path, tmp_path: Path) -> None:
    """Too many unusable images stop a pack after some shards; allowing more changes nothing else."""
    damage(images, 5, 15)
    out = tmp_path / "set"
    with pytest.raises(UserError, match="the same command carries on"):
        run(out, images, max_rejected=1, workers=1, samples_per_shard=1)
    assert [path.name for path in out.iterdir()] == [".pack"]
    done = {path.name: path.stat().st_ino for path in (out / ".pack").glob("*.tar")}
    assert 0 < len(done) < 18
    run(out, images, max_rejected=2, samples_per_shard=1)
    assert {path.name: path.stat().st_ino for path in out.glob("*/*.tar") if path.name in done} == done
    run(tmp_path / "fresh", images, max_rejected=2, samples_per_shard=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_archive_that_was_read_whole_is_not_read_again(images: Path, tmp_path: Path) -> None:
    archive, out, loose = tmp_path / "x.tar.gz", tmp_path / "set", tmp_path / "loose"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(images, arcname="images")
    loose.mkdir()
    (loose / "page.png").write_text("<html>")
    run(tmp_path / "fresh", archive, loose)
    with pytest.raises(UserError, match=r"page\.png: neither PNG nor JPEG"):
        run(out, archive, loose, max_rejected=0)
    before = archive.stat()
    archive.write_bytes(b"\x1f\x8b".ljust(before.st_size))
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    run(out, archive, loose)
    assert tree(out) == tree(tmp_path / "fresh")


def test_unusable_images_in_a_stream_stop_the_pack_before_it_ends(images: Path, tmp_path: Path) -> None:
    damage(images, *range(20))
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(images, arcname="images")
    with pytest.raises(UserError, match="2 images can't be used"):
        run(tmp_path / "set", tmp_path / "x.tar.gz")
    assert not list((tmp_path / "set" / ".pack").glob("staged-*.json"))


@pytest.mark.parametrize("as_archive", [False, True])
def test_killed_pack_carries_on_to_the_same_bytes(tmp_path: Path, as_archive: bool) -> None:
    images = make_images(tmp_path / "images", num_patients=300, num_followups=1, side_px=64)
    if as_archive:
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
            tar.add(images, arcname="images")
        images = tmp_path / "x.tar.gz"
    options = ("--size", SIZE_PX, "--samples-per-shard", 2, "--val-fraction", 0.2)
    command = [sys.executable, *map(str, ("shard_cxr14.py", "pack", images, "--out", tmp_path / "set", *options))]
    work = tmp_path / "set" / ".pack"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list(work.glob("train-*.json"))) < 3 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    done = {path.stem: (work / f"{path.stem}.tar").stat().st_ino for path in work.glob("train-*.json")}
    assert 3 <= len(done) < 120
    assert not (tmp_path / "set" / "manifest.json").exists()
    run(tmp_path / "set", images, samples_per_shard=2)
    inodes = {path.stem: path.stat().st_ino for path in (tmp_path / "set").glob("train/*.tar")}
    assert {name: inodes[name] for name in done} == done
    run(tmp_path / "fresh", images, samples_per_shard=2)
    assert tree(tmp_path / "set") == tree(tmp_path / "fresh")


def test_manifest_names_options_but_not_what_leaves_the_bytes_alone(images: Path, tmp_path: Path) -> None:
    options = json.loads((Path(run(tmp_path / "set", images).path) / "manifest.json").read_text())["options"]
    assert options["seed"] == 0
    assert not {"workers", "max_rejected", "overwrite", "out"} & options.keys()
    assert str(tmp_path) not in json.dumps(options)
