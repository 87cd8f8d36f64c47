"""Radiographs and their masks for `segment`: found, checked, fitted to the network, split and augmented."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

# albumentations would ask the network at each start whether there is a newer version of it
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from errors import UserError
from pipeline.packing import Unusable, decode_grey, parse_index
from pipeline.plan import SPLITS, guess_patient
from pipeline.shardset import ShardSet
from pipeline.sources import ImageRef, find_images, read_image


class Pair(NamedTuple):
    """A radiograph and its mask, as the network sees them."""

    name: str
    """The file's, without its ending."""
    patient: str
    image: np.ndarray
    """uint8 grey [S, S]."""
    mask: np.ndarray
    """uint8 [S, S], 1 inside."""
    size_px: tuple[int, int]
    """Width and height of the radiograph as given, before it was fitted to [S, S]."""


Splits = dict[str, list[Pair]]
"""The pairs to train on, to validate on and to test on, by the names of `SPLITS`."""


# --- reading --------------------------------------------------------------------------------------------------------


def read_folders(images: str, masks: Sequence[str], side_px: int, chosen: set[str] | None = None) -> list[Pair]:
    """Every radiograph of a folder with its mask, which has the same name or one with a common suffix more (`_mask`).

    Args:
        images: Folder of PNG or JPEG radiographs, searched all the way down.
        masks: Folders of masks. With several, such as Montgomery's of left and right lungs, a mask is their union.
        side_px: What the pairs are resized to; an image that isn't square is squeezed, as in the published protocols.
        chosen: Names to take; all others are not looked at.

    Raises:
        UserError: A partner is missing, or a pair can't be used.
    """
    image_of = _files_by_stem(images)
    if unknown := sorted((chosen or set()) - image_of.keys()):
        raise UserError(f"{images}: has no image {_some(unknown)}, which the list of splits names")
    mask_of = [_matched(_files_by_stem(folder), image_of) for folder in masks]
    for folder, found in zip(masks, mask_of, strict=True):
        wanted = image_of.keys() if chosen is None else chosen
        if lacking := sorted(wanted - found.keys()):
            raise UserError(f"{folder}: has no mask for {_some(lacking)} of {images}: add it, or leave out the image")
        if chosen is None and (surplus := sorted(found.keys() - image_of.keys())):
            raise UserError(f"{images}: has no image for {_some(surplus)} of {folder}: add it, or leave out the mask")
    names = sorted(image_of if chosen is None else chosen)

    def read(name: str) -> Pair:
        image_file = image_of[name]
        image = _decoded(image_file)
        mask = _union([found[name] for found in mask_of], image.shape, str(image_file))
        return _fitted(name, guess_patient(image_file, name), image, mask, side_px)

    return _in_parallel(read, names)


def read_shards(shards: str, masks: Sequence[str], side_px: int) -> tuple[Splits, int]:
    """The radiographs of a shard set that there are masks for, in its own splits; and how many there are none for.

    Masks are found as in `read_folders`, by the samples' keys, and are of the radiographs' original size: what packing
    did to these is done to the masks.

    Raises:
        UserError: A split is missing or left without any pair, or a pair can't be used.
    """
    shard_set = ShardSet.open(shards)
    keys = [entry.key for shard in shard_set.shards for entry in parse_index(shard_set.read(shard.index))]
    mask_of = [_matched(_files_by_stem(folder), dict.fromkeys(keys)) for folder in masks]
    with_mask = set(keys).intersection(*mask_of)

    def read(key: str, meta: dict[str, Any], data: bytes) -> Pair:
        size_px = meta["stored_size_px"]
        stored = np.frombuffer(data, np.uint8).reshape(size_px[::-1]) if shard_set.store == "raw" else decode_grey(data)
        original_shape = tuple(meta["original_size_px"][::-1])
        mask = _union([found[key] for found in mask_of], original_shape, f"{shards}: {key}")
        return _fitted(key, meta["patient"], stored, pack_mask(mask, meta), side_px)

    splits = {}
    for split in SPLITS:
        splits[split] = [read(*sample) for sample in shard_set.read_samples(split) if sample[0] in with_mask]
        if not splits[split]:
            raise UserError(f"{shards}: no image of its {split} split has a mask in {' and '.join(masks)}")
    return splits, len(keys) - len(with_mask)


def pack_mask(mask: np.ndarray, meta: dict[str, Any]) -> np.ndarray:
    """What packing did to a sample's radiograph, done to its mask: uint8 0 or 255, original to stored size."""
    height_px, width_px = mask.shape
    scaled_px = round(width_px * meta["scale"][0]), round(height_px * meta["scale"][1])
    left_px, top_px = meta["offset_px"]
    stored = np.zeros(meta["stored_size_px"][::-1], np.uint8)
    stored[top_px : top_px + scaled_px[1], left_px : left_px + scaled_px[0]] = _resized(mask, scaled_px)
    return stored


def _files_by_stem(folder: str) -> dict[str, ImageRef]:
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    files: dict[str, ImageRef] = {}
    for file in find_images([Path(folder)]):
        stem = re.sub(r"[^\w-]", "_", PurePosixPath(file.path).stem)  # as a shard set's keys are made
        if stem in files:
            raise UserError(f"{files[stem]} and {file} have the same name: rename or leave out one of them")
        files[stem] = file
    return files


def _matched(masks: dict[str, ImageRef], images: dict[str, Any]) -> dict[str, ImageRef]:
    """The masks by their images' names; the suffix that most of them have in common is dropped."""
    suffixes: Counter[str] = Counter()
    for stem in masks:
        longest = next((stem[:end] for end in range(len(stem), 0, -1) if stem[:end] in images), None)
        if longest is not None:
            suffixes[stem.removeprefix(longest)] += 1
    suffix = suffixes.most_common(1)[0][0] if suffixes else ""
    return {stem.removesuffix(suffix): file for stem, file in masks.items()}


def _decoded(file: ImageRef) -> np.ndarray:
    try:
        return decode_grey(read_image(file))
    except (OSError, Unusable) as error:
        raise UserError(f"{file}: can't be used: {error}") from None


def _union(files: list[ImageRef], shape: tuple[int, ...], image: str) -> np.ndarray:
    """The union of masks, uint8 0 or 255; they must have the shape of their image."""
    masks = [_binary(_decoded(file), file) for file in files]
    for file, mask in zip(files, masks, strict=True):
        if mask.shape != shape:
            sizes = [f"{width_px} x {height_px} px" for height_px, width_px in (shape, mask.shape)]
            raise UserError(f"{image} has {sizes[0]}, its mask {file} {sizes[1]}: give masks of the images' size")
    return np.maximum.reduce(masks)


def _binary(mask: np.ndarray, file: ImageRef) -> np.ndarray:
    """uint8 0 or 255. Interpolated greys are thresholded at half; some write masks as 0 and 1."""
    brightest = int(mask.max())
    if 1 < brightest <= 127:
        raise UserError(f"{file}: its values go up to {brightest}: a mask has 0 and 255, or 0 and 1")
    return np.where(mask > (127 if brightest > 1 else 0), np.uint8(255), np.uint8(0))


def _resized(pixels: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Averaged where it shrinks, interpolated where it grows."""
    shrinks = pixels.shape[1] > size_px[0] or pixels.shape[0] > size_px[1]
    return cv2.resize(pixels, size_px, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _fitted(name: str, patient: str, image: np.ndarray, mask: np.ndarray, side_px: int) -> Pair:
    height_px, width_px = image.shape
    image, mask = (_resized(pixels, (side_px, side_px)) for pixels in (image, mask))
    return Pair(name, patient, image, (mask > 127).astype(np.uint8), (width_px, height_px))


def _in_parallel(read: Callable[[Any], Pair], items: list[Any]) -> list[Pair]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV decodes without the interpreter
        return list(pool.map(read, items))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- splits ---------------------------------------------------------------------------------------------------------


def read_split_list(path: str) -> dict[str, str]:
    """Names and their splits from a file of lines such as `MCUCXR_0001_0 train`; an image's file ending is dropped.

    Raises:
        UserError: It can't be read, or a line says something else.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    split_of: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in SPLITS:
            raise UserError(f"{path}, line {number}: has to be an image's name and train, val or test")
        name = words[0].removesuffix(".png").removesuffix(".jpg").removesuffix(".jpeg")
        if split_of.setdefault(name, words[1]) != words[1]:
            raise UserError(f"{path}, line {number}: {name} is in two splits")
    return split_of


def split_by_list(pairs: list[Pair], split_of: dict[str, str], path: str) -> Splits:
    """Each pair where the list puts it. Raise UserError where a split is left without any."""
    splits = {split: [pair for pair in pairs if split_of[pair.name] == split] for split in SPLITS}
    if empty := [split for split, found in splits.items() if not found]:
        raise UserError(f"{path}: puts no image into {' and '.join(empty)}")
    return splits


def split_by_seed(pairs: list[Pair], val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Split by patients, at least one each; sizes are right to within a patient's images.

    Raises:
        UserError: There are too few patients.
    """
    patients = sorted({pair.patient for pair in pairs})
    if len(patients) < 3:
        raise UserError(f"{len(patients)} patients are too few to train, validate and test")
    num_of = Counter(pair.patient for pair in pairs)
    order = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    split_of: dict[str, str] = {}
    for split, fraction, num_left in (("test", test_fraction, 2), ("val", val_fraction, 1)):
        wanted, num_images = max(1, round(fraction * len(pairs))), 0
        while num_images < wanted and len(order) > num_left:
            split_of[patient := order.pop()] = split
            num_images += num_of[patient]
    return {split: [p for p in pairs if split_of.get(p.patient, "train") == split] for split in SPLITS}


def choose_some(pairs: list[Pair], num_pairs: int, seed: int) -> list[Pair]:
    """A handful by seed; of the same seed's choices, the smaller is a part of the larger."""
    if num_pairs > len(pairs):
        raise UserError(f"--num-train {num_pairs}: there are only {len(pairs)} images to train on")
    return [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:num_pairs]]


# --- batches --------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a step takes."""

    images: Tensor
    """uint8 [B, 1, S, S]."""
    masks: Tensor
    """uint8 [B, 1, S, S], 1 inside."""


def augmentation() -> albumentations.Compose:
    """What the field does to radiographs and their masks: flip, contrast, gamma, elastic and affine distortion."""
    return albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.5),
            albumentations.OneOf(
                [albumentations.RandomBrightnessContrast(p=1), albumentations.RandomGamma(p=1)], p=0.3
            ),
            albumentations.OneOf(
                [
                    albumentations.ElasticTransform(alpha=120, sigma=6, p=1),
                    albumentations.GridDistortion(p=1),
                    albumentations.OpticalDistortion(p=1),
                ],
                p=0.3,
            ),
            albumentations.Affine(scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), rotate=(-10, 10), p=0.5),
        ]
    )


class _AugmentedPairs(Dataset):
    """Pairs whose augmentation follows from seed, pass and place alone, so that a resumed run sees the same ones."""

    def __init__(self, pairs: list[Pair], seed: int) -> None:
        self._pairs, self._seed = pairs, seed
        self._augment = augmentation()

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        number, index = place
        pair = self._pairs[index]
        self._augment.set_random_seed(int(np.random.SeedSequence([self._seed, number, index]).generate_state(1)[0]))
        both = self._augment(image=pair.image[..., None], mask=pair.mask)
        return Batch(torch.from_numpy(both["image"]).permute(2, 0, 1), torch.from_numpy(both["mask"])[None])


class _EpochOrder(Sampler):
    """Batches of (pass, index) in an order that follows from seed and pass alone; an epoch is one pass or several."""

    def __init__(self, num_pairs: int, batch_size: int, num_passes: int, seed: int) -> None:
        self._num_pairs, self._batch_size, self._num_passes, self._seed = num_pairs, batch_size, num_passes, seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self._num_pairs / self._batch_size) * self._num_passes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.epoch * self._num_passes, (self.epoch + 1) * self._num_passes):
            order = np.random.default_rng([self._seed, number]).permutation(self._num_pairs).tolist()
            for start in range(0, self._num_pairs, self._batch_size):
                yield [(number, index) for index in order[start : start + self._batch_size]]


class TrainBatches:
    """Epochs of augmented batches; the last one of a pass may be smaller.

    Args:
        pairs: What to train on.
        batch_size: Pairs in a batch.
        min_steps: An epoch has as many passes over the pairs as it takes for so many batches.
        seed: Of order and augmentation.
        num_workers: Processes that augment, or 0.
        pin_memory: For a GPU.
    """

    def __init__(
        self, pairs: list[Pair], batch_size: int, min_steps: int, seed: int, num_workers: int, *, pin_memory: bool
    ) -> None:
        num_passes = math.ceil(min_steps / math.ceil(len(pairs) / batch_size))
        self._order = _EpochOrder(len(pairs), batch_size, num_passes, seed)
        self._loader = DataLoader(
            _AugmentedPairs(pairs, seed),
            batch_sampler=self._order,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0."""
        self._order.epoch = epoch
        return iter(self._loader)


def plain_batches(pairs: list[Pair], batch_size: int) -> Iterator[Batch]:
    """All pairs in their order, as they are."""
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        yield Batch(
            *(torch.from_numpy(np.stack(p))[:, None] for p in ([s.image for s in some], [s.mask for s in some]))
        )
