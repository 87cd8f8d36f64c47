import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from downstream.segment_data import (
    Pair,
    TrainBatches,
    _EpochOrder,
    choose_some,
    pack_mask,
    plain_batches,
    read_folders,
    read_shards,
    read_split_list,
    split_by_list,
    split_by_seed,
)
from errors import UserError
from pipeline.packing import pack_image
from pipeline.phantom import draw_phantom
from tests.commands import run_command


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path


def grey(height_px: int = 48, width_px: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px), np.uint8)


def box_mask(height_px: int = 48, width_px: int = 40, inside: int = 255) -> np.ndarray:
    mask = np.zeros((height_px, width_px), np.uint8)
    mask[10:30, 8:20] = inside
    return mask


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of three images and three masks."""
    for number in range(3):
        write(tmp_path / "images" / f"{number}.png", grey(seed=number))
        write(tmp_path / "masks" / f"{number}.png", box_mask())
    return tmp_path / "images", tmp_path / "masks"


def read(folders: tuple[Path, ...], chosen: set[str] | None = None) -> list[Pair]:
    images, *masks = map(str, folders)
    return read_folders(images, masks, 64, chosen)


def test_pairs_are_found_by_name_and_fitted_to_the_network(folders: tuple[Path, Path]) -> None:
    pairs = read(folders)
    assert [pair.name for pair in pairs] == ["0", "1", "2"]
    assert pairs[1].image.shape == pairs[1].mask.shape == (64, 64)
    assert pairs[1].size_px == (40, 48)
    expected = np.zeros((64, 64), bool)
    expected[round(10 / 48 * 64) : round(30 / 48 * 64), round(8 / 40 * 64) : round(20 / 40 * 64)] = True
    assert (pairs[1].mask != expected).mean() < 0.02
    np.testing.assert_array_equal(pairs[1].image, cv2.resize(grey(seed=1), (64, 64), interpolation=cv2.INTER_LINEAR))


def test_masks_may_have_a_common_suffix_and_another_format(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "CHN_1.jpg", grey())
    write(folders[0] / "CHN_10.jpg", grey())
    for stem in ("CHN_1", "CHN_10"):
        write(folders[1] / f"{stem}.png", box_mask())
    for mask in list(folders[1].iterdir()):
        mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    assert [pair.name for pair in read(folders)] == ["0", "1", "2", "CHN_1", "CHN_10"]


def test_a_mask_in_parts_is_their_union(folders: tuple[Path, Path], tmp_path: Path) -> None:
    right = np.zeros((48, 40), np.uint8)
    right[10:30, 30:38] = 255
    for number in range(3):
        write(tmp_path / "right" / f"{number}.png", right)
    both = read((*folders, tmp_path / "right"))[0].mask
    alone, other = read(folders)[0].mask, read((folders[0], tmp_path / "right"))[0].mask
    np.testing.assert_array_equal(both, alone | other)
    assert alone.any()
    assert other.any()


def test_greys_are_thresholded_at_half_and_zero_one_masks_are_understood(folders: tuple[Path, Path]) -> None:
    expected = read(folders)[0].mask
    greys = box_mask(inside=128)
    greys[greys == 0] = 127
    write(folders[1] / "0.png", greys)
    write(folders[1] / "1.png", box_mask(inside=1))
    write(folders[1] / "2.png", np.zeros((48, 40), np.uint8))
    first, second, empty = read(folders)
    np.testing.assert_array_equal(first.mask, expected)
    np.testing.assert_array_equal(second.mask, expected)
    assert not empty.mask.any()


def test_a_pair_that_cannot_be_is_named(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    write(masks / "1.png", box_mask(40, 48))
    with pytest.raises(UserError, match=rf"{images}/1.png has 40 x 48 px, its mask {masks}/1.png 48 x 40 px"):
        read(folders)
    write(masks / "1.png", box_mask(inside=2))
    with pytest.raises(UserError, match=rf"{masks}/1.png: its values go up to 2: a mask has 0 and 255, or 0 and 1"):
        read(folders)
    (masks / "1.png").write_bytes((masks / "0.png").read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{masks}/1.png: can't be used: cut short"):
        read(folders)
    (masks / "1.png").unlink()
    with pytest.raises(UserError, match=rf"{masks}: has no mask for 1 of {images}"):
        read(folders)
    (images / "1.png").unlink()
    (images / "2.png").unlink()
    with pytest.raises(UserError, match=rf"{images}: has no image for 2 of {masks}"):
        read(folders)


def test_names_and_folders_that_cannot_be_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read((folders[0], tmp_path / "nowhere"))
    with pytest.raises(UserError, match=f"{folders[0]}: has no image 7, which the list of splits names"):
        read(folders, {"0", "7"})
    write(folders[0] / "again" / "0.png", grey())
    with pytest.raises(UserError, match=r"0\.png and .*0\.png have the same name"):
        read(folders)


def test_only_what_is_chosen_is_looked_at(folders: tuple[Path, Path]) -> None:
    (folders[1] / "2.png").unlink()
    (folders[0] / "1.png").write_bytes(b"")
    assert [pair.name for pair in read(folders, {"0"})] == ["0"]


def test_a_mask_is_packed_as_its_image_was() -> None:
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (11, 9)), np.ones((9, 9))).astype(np.uint8) * 255
    for store, size_px in (("raw", 64), ("raw", 128), ("png", 50), ("png", 0)):
        packed = pack_image(cv2.imencode(".png", mask)[1].tobytes(), store, size_px, 95)
        meta = json.loads(json.dumps(packed._replace(data=None)._asdict()))
        if store == "raw":
            stored = np.frombuffer(packed.data, np.uint8).reshape(size_px, size_px)
        else:
            stored = cv2.imdecode(np.frombuffer(packed.data, np.uint8), cv2.IMREAD_GRAYSCALE)
        np.testing.assert_array_equal(pack_mask(mask, meta), stored)


def test_a_shard_sets_images_meet_their_masks_in_its_own_splits(shard_folder: Path, tmp_path: Path) -> None:
    masks = shard_folder.parent / "masks"
    splits, num_without = read_shards(str(shard_folder), [str(masks)], 64)
    assert num_without == 0
    assert sum(map(len, splits.values())) == 40
    tested = (shard_folder.parent / "test_list.txt").read_text().split()
    assert {f"{pair.name}.png" for pair in splits["test"]} == set(tested)
    for pair in splits["val"]:
        patient, followup = map(int, pair.name.split("_"))
        phantom = draw_phantom(0, patient, 64, followup)
        np.testing.assert_array_equal(pair.image, phantom.image)
        np.testing.assert_array_equal(pair.mask * 255, phantom.lung_mask)
        assert pair.patient == str(patient)
    some = tmp_path / "some"
    for split, pairs in splits.items():
        for pair in pairs[:2] if split != "val" else pairs[:1]:
            write(some / f"{pair.name}_mask.png", pair.mask)
    few, num_without = read_shards(str(shard_folder), [str(some)], 64)
    assert ({split: len(pairs) for split, pairs in few.items()}, num_without) == ({"train": 2, "val": 1, "test": 2}, 35)
    (some / f"{few['val'][0].name}_mask.png").unlink()
    with pytest.raises(UserError, match=f"{shard_folder}: no image of its val split has a mask in {some}"):
        read_shards(str(shard_folder), [str(some)], 64)


def test_masks_of_padded_and_shrunk_radiographs_stay_on_them(tmp_path: Path) -> None:
    """A mask of a bright square in an image that isn't square, packed smaller, with black borders."""
    for number in range(6):
        image = np.full((150, 100), 40, np.uint8)
        image[20 + 8 * number : 70 + 8 * number, 30:70] = 220
        write(tmp_path / "images" / f"{number}.png", image)
        write(tmp_path / "masks" / f"{number}.png", (image > 100) * np.uint8(255))
    (tmp_path / "test.txt").write_text("0.png\n1.png\n")
    options = ("--out", tmp_path / "shards", "--size", "96", "--test-list", tmp_path / "test.txt")
    run_command("shard_cxr14.py", "pack", tmp_path / "images", *options).check_returncode()
    splits, _ = read_shards(str(tmp_path / "shards"), [str(tmp_path / "masks")], 64)
    for pair in itertools.chain(*splits.values()):
        assert ((pair.image > 130) != pair.mask).mean() < 0.01
        assert pair.mask.mean() == pytest.approx(40 * 50 / 150**2, rel=0.1)  # the square's side is the image's height


def pairs_of(num_images_of_patients: list[int]) -> list[Pair]:
    """Without pixels: splits look at names and patients alone."""
    return [
        Pair(f"{patient}_{number}", str(patient), None, None, (8, 8))
        for patient, num_images in enumerate(num_images_of_patients)
        for number in range(num_images)
    ]


def test_a_split_keeps_patients_together_and_has_the_sizes_asked_for() -> None:
    pairs = pairs_of([1, 2, 3] * 20)
    splits = split_by_seed(pairs, 0.1, 0.2, seed=3)
    assert sorted(itertools.chain(*splits.values())) == sorted(pairs)
    patients = [{pair.patient for pair in found} for found in splits.values()]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]
    assert not patients[1] & patients[2]
    assert 12 <= len(splits["val"]) <= 14
    assert 24 <= len(splits["test"]) <= 26
    assert set(splits["test"]) == set(split_by_seed(pairs[::-1], 0.1, 0.2, seed=3)["test"])
    assert splits["test"] != split_by_seed(pairs, 0.1, 0.2, seed=4)["test"]


def test_every_split_has_a_patient_where_there_are_three() -> None:
    for fraction in (0.01, 0.49):
        assert all(split_by_seed(pairs_of([1, 1, 1]), fraction, fraction, seed=0).values())
    with pytest.raises(UserError, match="2 patients are too few"):
        split_by_seed(pairs_of([5, 5]), 0.1, 0.2, seed=0)


def test_a_handful_is_a_part_of_a_larger_one() -> None:
    pairs = pairs_of([1] * 50)
    names = [[pair.name for pair in choose_some(pairs, num, seed=1)] for num in (4, 16)]
    assert set(names[0]) < set(names[1])
    assert names[0] != [pair.name for pair in choose_some(pairs, 4, seed=2)]
    with pytest.raises(UserError, match="--num-train 51: there are only 50 images"):
        choose_some(pairs, 51, seed=1)


def test_a_list_of_splits_is_followed_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "splits.txt"
    path.write_text("0_0.png train\n\n1_0,val\n2_0 test\n")
    splits = split_by_list(pairs_of([1, 1, 1]), read_split_list(str(path)), str(path))
    assert {split: [pair.name for pair in found] for split, found in splits.items()} == {
        "train": ["0_0"],
        "val": ["1_0"],
        "test": ["2_0"],
    }
    for text, problem in (
        ("a train\nb tset\n", "line 2: has to be an image's name and train, val or test"),
        ("a train\na.png val\n", "line 2: a is in two splits"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=problem):
            read_split_list(str(path))
    with pytest.raises(UserError, match="puts no image into val and test"):
        split_by_list(pairs_of([1]), {"0_0": "train"}, "list")
    with pytest.raises(UserError, match="nowhere: can't be read"):
        read_split_list(str(tmp_path / "nowhere"))


def disc_pairs(num_pairs: int) -> list[Pair]:
    """Images that are bright where their masks are."""
    y, x = np.ogrid[:96, :96]
    masks = [((y - 48) ** 2 + (x - 40) ** 2 < (20 + i) ** 2).astype(np.uint8) for i in range(num_pairs)]
    return [Pair(str(i), str(i), 60 + 120 * mask, mask, (96, 96)) for i, mask in enumerate(masks)]


def epochs(pairs: list[Pair], num_epochs: int, first: int = 0, num_workers: int = 0, min_steps: int = 1) -> list:
    batches = TrainBatches(pairs, 2, min_steps, 5, num_workers, pin_memory=False)
    return [[tuple(part.numpy() for part in batch) for batch in batches.epoch(e)] for e in range(first, num_epochs)]


def test_augmentation_moves_image_and_mask_alike() -> None:
    moved = 0
    for epoch in epochs(pairs := disc_pairs(4), 8):
        for images, masks in epoch:
            assert images.shape == masks.shape == (2, 1, 96, 96)
            assert images.dtype == masks.dtype == np.uint8
            for image, mask in zip(images[:, 0], masks[:, 0], strict=True):
                middle = (float(image[mask == 1].mean()) + float(image[mask == 0].mean())) / 2
                assert ((image > middle) != mask).mean() < 0.03
                moved += all(((mask != pair.mask).mean() > 0.03) for pair in pairs)
    assert moved > 8


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    pairs = disc_pairs(5)
    whole, resumed, by_workers = epochs(pairs, 3), epochs(pairs, 3, first=1), epochs(pairs, 3, num_workers=2)
    for one, other in ((whole[1:], resumed), (whole, by_workers)):
        for ours, theirs in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
            for array, again in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(array, again)
    assert [len(batch[0]) for batch in whole[0]] == [2, 2, 1]
    assert not np.array_equal(whole[0][0][0], whole[1][0][0])


def test_every_pass_takes_all_pairs_once_in_an_order_of_its_own() -> None:
    order = _EpochOrder(num_pairs=20, batch_size=8, num_passes=2, seed=1)
    order.epoch = 3
    places = list(itertools.chain(*order))
    assert [number for number, _ in places] == [6] * 20 + [7] * 20
    first, second = ([index for number, index in places if number == wanted] for wanted in (6, 7))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first not in (second, sorted(first))


def test_a_handful_of_pairs_makes_an_epoch_of_several_passes() -> None:
    pairs = disc_pairs(3)
    many = epochs(pairs, 2, min_steps=5)
    assert [[len(images) for images, _ in epoch] for epoch in many] == [[2, 1] * 3] * 2
    passes = [b"".join(images.tobytes() for images, _ in epoch[i : i + 2]) for epoch in many for i in (0, 2, 4)]
    assert len(set(passes)) == 6


def test_plain_batches_are_the_pairs_themselves() -> None:
    pairs = disc_pairs(3)
    batches = list(plain_batches(pairs, 2))
    images = np.concatenate([batch.images.numpy() for batch in batches])
    masks = np.concatenate([batch.masks.numpy() for batch in batches])
    np.testing.assert_array_equal(images[:, 0], [pair.image for pair in pairs])
    np.testing.assert_array_equal(masks[:, 0], [pair.mask for pair in pairs])
