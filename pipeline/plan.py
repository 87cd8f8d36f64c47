"""The plan of a shard set, settled before any image is decoded: who goes where, under which key, in which order."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

import tyro

from errors import UsageError, UserError
from pipeline.packing import Store
from pipeline.sources import NIH_LABELS, Box, ImageRef, LabelTable, read_boxes, read_labels, read_list

SPLITS = ("train", "val", "test")
LISTS = (*SPLITS, "train_val")
_MAX_KEY_BYTES = 95  # a ustar name holds 100, and ".json" is the longest ending
T = TypeVar("T")


@dataclass(frozen=True)
class PackSettings:
    """Pack radiographs into a shard set. Give the same command again after an interruption, and it carries on."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of PNG and JPEG images, searched all the way down, and .tar or .tar.gz archives of them."""
    out: Annotated[str | Path, tyro.conf.arg(metavar="DIR")]
    """The folder to make, or s3://BUCKET/FOLDER: the set is then packed in $TMPDIR, which needs room for all of it,
    and uploaded when it is whole."""
    labels: Path | None = None
    """CSV with NIH's columns "Image Index", "Finding Labels" and, maybe, "Patient ID"."""
    boxes: Path | None = None
    """CSV of bounding boxes: image, finding, x, y, width, height in original pixels."""
    train_list: Path | None = None
    """Images to train on: a file name a line, with 14 labels or nothing after it."""
    val_list: Path | None = None
    """Images to validate on; goes with --train-list."""
    test_list: Path | None = None
    """Images to test on. Given alone, all other images are for training and validation."""
    train_val_list: Path | None = None
    """Images for training and validation; --val-fraction says how many for which."""
    val_fraction: float = 0.1
    """Share of the patients for validation, with --train-val-list or no list of training images."""
    store: Store = "raw"
    """raw: 8-bit pixels, nothing to decode; jpeg: small, decodable by a GPU; png: lossless."""
    size_px: Annotated[int, tyro.conf.arg(name="size")] = 512
    """Short side in px (raw: the side of a square, padded with black); larger images are shrunk to it; 0 keeps
    the original size and, with --store png, the file's own bytes."""
    quality: int = 95
    """Of --store jpeg, 1 to 100."""
    samples_per_shard: int | None = None
    """Default: up to 256, so that the loader's buffer of 1,024 samples mixes several shards; fewer where images are
    large or few, so that no shard is much over 256 MB, and all but the smallest sets have 8 or more."""
    workers: int | None = None
    """Threads. Default: all cores."""
    seed: int = 0
    """Of the order of the samples and the choice of validation patients."""
    max_rejected: int | None = None
    """Fail when more images than this can't be used. Default: 1 in 100, rounded up."""
    overwrite: bool = False
    """Replace the shard set in --out, once the new one is complete; until then both need room."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        lists = self.lists.keys()
        wrong = {
            "name at least one folder or archive of images": not self.images,
            "--store raw needs images of one size: give a --size, 512 for example": self.store == "raw"
            and self.size_px == 0,
            f"--size {self.size_px}: must be 0 or 32 to 8192": self.size_px != 0 and not 32 <= self.size_px <= 8192,
            f"--quality {self.quality}: must be 1 to 100": not 1 <= self.quality <= 100,
            f"--val-fraction {self.val_fraction}: must be at least 0 and less than 1": not 0 <= self.val_fraction < 1,
            "--samples-per-shard: must be more than 0": self.samples_per_shard is not None
            and self.samples_per_shard < 1,
            "--workers: must be more than 0": self.workers is not None and self.workers < 1,
            "--max-rejected: must be 0 or more": self.max_rejected is not None and self.max_rejected < 0,
            "--train-val-list does not go with --train-list or --val-list": "train_val" in lists
            and bool(lists & {"train", "val"}),
            "--val-list needs --train-list": "val" in lists and "train" not in lists,
        }
        for message, applies in wrong.items():
            if applies:
                raise UsageError(message)

    @property
    def lists(self) -> dict[str, Path]:
        """The list files given, by what they list."""
        given = {kind: getattr(self, f"{kind}_list") for kind in LISTS}
        return {kind: path for kind, path in given.items() if path}

    @property
    def num_workers(self) -> int:
        """Threads that decode and encode."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to pack, and all that is known about it."""

    image: ImageRef
    key: str
    patient: str
    split: str
    labels: tuple[int, ...] | None
    """0 or 1 for each of the plan's `label_names`; None where unknown."""
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Plan:
    """What goes where."""

    label_names: tuple[str, ...]
    splits: dict[str, list[Sample]]
    """Samples in the order of packing, for each split that has any."""
    num_left_out: int
    """Images that are in none of the lists given."""


def plan_samples(images: Sequence[ImageRef], settings: PackSettings) -> Plan:
    """Settle every image's key, patient, split, labels, boxes and place in its split's order.

    `images` are as `find_images` returns them. Lists decide about splits; what they leave open is settled patient by
    patient, by a hash of patient and seed. A hash of key and seed gives the order.

    Raises:
        UserError: If keys clash, a list names unknown images or leaves a split empty, a patient is in two splits, or an
            image to pack has no row in the labels.
    """
    labels, boxes, lists, seed = settings.labels, settings.boxes, settings.lists, settings.seed
    names = _Names(images)
    keys = _keys(images)
    listed = {kind: read_list(path) for kind, path in lists.items()}
    table = read_labels(labels) if labels else LabelTable((), {}, {})
    patient_of = names.resolve(table.patients, labels)
    patients = [_plain_number(patient_of.get(i, "")) or guess_patient(images[i], keys[i]) for i in range(len(images))]
    positions = {kind: names.resolve_all(listed[kind], lists[kind]) for kind in listed}
    _refuse_shared_images(positions, images)
    splits = _assign_splits(positions, patients, settings.val_fraction, seed)
    _refuse_shared_patients(splits, patients)
    if labels:
        label_of = names.resolve(table.labels, labels)
        missing = [images[i].file_name for i in sorted(splits) if i not in label_of]
        if missing:
            raise UserError(f"{labels}: has no labels for {_count(missing, 'image')}")
    else:
        label_of = {i: vector for kind in listed for i, vector in positions[kind].items() if vector}
    box_of = names.resolve(read_boxes(boxes), boxes) if boxes else {}
    planned: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for i, split in splits.items():
        sample = Sample(images[i], keys[i], patients[i], split, label_of.get(i), tuple(box_of.get(i, ())))
        planned[split].append(sample)
    for samples in planned.values():
        samples.sort(key=lambda sample: _hash(seed, "sample", sample.key))
    label_names = table.label_names or (NIH_LABELS if label_of else ())
    return Plan(label_names, {split: s for split, s in planned.items() if s}, len(images) - len(splits))


class _Names:
    """Finds images by the names that lists and tables give them: the file's or, where several have it, the path."""

    def __init__(self, images: Sequence[ImageRef]) -> None:
        self._images = images
        self._positions = defaultdict(list)
        for i, image in enumerate(images):
            for name in {image.file_name, image.path}:
                self._positions[name].append(i)

    def _find(self, name: str) -> list[int]:
        return self._positions.get(name) or self._positions.get(PurePosixPath(name).name, [])

    def resolve(self, by_name: Mapping[str, T], path: Path | None) -> dict[int, T]:
        """Re-key by position among the images; names of no image are passed over."""
        resolved = {}
        for name, value in by_name.items():
            found = self._find(name)
            if len(found) > 1:
                first, second = (self._images[i] for i in found[:2])
                raise UserError(f"{path}: {name} could be {first} or {second}; write the path below the folder given")
            resolved.update(dict.fromkeys(found, value))
        return resolved

    def resolve_all(self, by_name: Mapping[str, T], path: Path) -> dict[int, T]:
        """The same, but every name must be known."""
        unknown = [name for name in by_name if not self._find(name)]
        if unknown:
            raise UserError(f"{path}: names {_count(unknown, 'image')} not found in the input")
        return self.resolve(by_name, path)


def _keys(images: Sequence[ImageRef]) -> list[str]:
    """Unique names without dots: the file's stem where only one file has it, else the path."""
    stems = Counter(PurePosixPath(image.path).stem for image in images)
    taken: dict[str, ImageRef] = {}
    for image in images:
        path = PurePosixPath(image.path)
        key = path.stem if stems[path.stem] == 1 else str(path.with_suffix("")).replace("/", "__")
        key = re.sub(r"[^\w-]", "_", key)  # dots would end the key; the index is split at spaces
        if len(key.encode()) > _MAX_KEY_BYTES:
            digest = hashlib.sha256(key.encode()).hexdigest()[:16]
            key = key.encode()[: _MAX_KEY_BYTES - 17].decode(errors="ignore") + "-" + digest
        if key in taken:
            raise UserError(f"{taken[key]} and {image} would share the key {key}; rename or leave out one of them")
        taken[key] = image
    return list(taken)


def guess_patient(image: ImageRef, key: str) -> str:
    """Tell whose image it is by its name, or give it a patient of its own.

    Known are NIH's `PATIENT_FOLLOWUP.png` and folders such as CheXpert's `patient12345` and MIMIC-CXR's `p10000032`.
    """
    path = PurePosixPath(image.root.name) / image.path
    nih = re.fullmatch(r"(\d+)_\d+", path.stem)
    if nih:
        return _plain_number(nih[1])
    folders = [part for part in path.parts[:-1] if re.fullmatch(r"patient\d+|p\d{8}", part)]
    return folders[-1] if folders else key


def _plain_number(patient: str) -> str:
    """NIH writes patient 4 as `4` in its table and as `00000004` in file names."""
    return str(int(patient)) if patient.isascii() and patient.isdigit() else patient


def _assign_splits(
    positions: Mapping[str, Mapping[int, object]], patients: Sequence[str], val_fraction: float, seed: int
) -> dict[int, str]:
    splits = {i: split for split in SPLITS for i in positions.get(split, ())}
    pool = positions.get("train_val", ())
    if not {"train", "train_val"} & positions.keys():
        pool = [i for i in range(len(patients)) if i not in splits]
    pooled = sorted({patients[i] for i in pool}, key=lambda patient: _hash(seed, "patient", patient))
    num_val = min(round(val_fraction * len(pooled)) or int(val_fraction > 0), max(len(pooled) - 1, 0))
    in_val = set(pooled[:num_val])
    splits |= {i: "val" if patients[i] in in_val else "train" for i in pool}
    if "train" not in splits.values():
        raise UserError("the lists leave no image to train on")
    return dict(sorted(splits.items()))


def _refuse_shared_images(positions: Mapping[str, Mapping[int, object]], images: Sequence[ImageRef]) -> None:
    listings = Counter(i for listed in positions.values() for i in listed)
    shared = [images[i].file_name for i, count in listings.items() if count > 1]
    if shared:
        raise UserError(f"{_count(shared, 'image')} in more than one list; mend the lists")


def _refuse_shared_patients(splits: Mapping[int, str], patients: Sequence[str]) -> None:
    split_of: dict[str, set[str]] = defaultdict(set)
    for i, split in splits.items():
        split_of[patients[i]].add(split)
    shared = [f"{patient} ({', '.join(sorted(found))})" for patient, found in split_of.items() if len(found) > 1]
    if shared:
        raise UserError(f"the lists put {_count(shared, 'patient')} in more than one split; mend the lists")


def _hash(seed: int, what: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{what}:{name}".encode(errors="surrogateescape")).digest()


def _count(names: Iterable[str], noun: str) -> str:
    names = list(names)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({shown})"
