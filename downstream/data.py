"""Labelled radiographs from shard sets, read by DALI: batches to train on, exact passes to evaluate on.

Which samples are read is a matter of the index alone: for a part of a split, indexes with fewer lines are written to a
temporary folder, and DALI reads no byte of the others.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from errors import UserError
from pipeline.graph import ReaderSpec, build_labelled_graph
from pipeline.loader import copy_images, num_samples_of, reading_from, refuse_other_stores
from pipeline.packing import IndexEntry, format_index, parse_index
from pipeline.shardset import Shard, ShardSet, Split
from pipeline.spec import LabelledViewSpec
from pipeline.storage import open_storage, reading

SHUFFLE_BUFFER_SAMPLES = 1024


class LabelledBatch(NamedTuple):
    """One rank's share of a step."""

    images: torch.Tensor
    """uint8 grey [B, 1, H, W] on the device."""
    labels: torch.Tensor
    """fp32 0 or 1, [B, number of findings] on the device."""
    keys: list[str]
    patients: list[str]


# --- which samples --------------------------------------------------------------------------------------------------


def common_label_names(shard_sets: tuple[ShardSet, ...], splits: tuple[str, ...]) -> tuple[str, ...]:
    """The findings that every sample of these splits is labelled with.

    Raises:
        UserError: A set has no labels, or other ones than the first; a split is missing or has unlabelled samples.
    """
    names = shard_sets[0].label_names
    for shard_set in shard_sets:
        if not shard_set.label_names:
            raise UserError(f"{shard_set.path}: holds no labels: pack it with --labels CSV")
        if shard_set.label_names != names:
            raise UserError(f"{shard_set.path}: its findings are not those of {shard_sets[0].path}, in the same order")
        for split in splits:
            if not (info := shard_set.manifest["splits"].get(split)):
                has = ", ".join(shard_set.manifest["splits"])
                raise UserError(
                    f"{shard_set.path}: has no split '{split}', only {has}: pack it with --{split}-list"
                    + (" or a --val-fraction over 0" if split == "val" else "")
                )
            if missing := info["samples"] - info["labelled"]:
                raise UserError(
                    f"{shard_set.path}: {missing} of the {info['samples']} samples of split '{split}' have no labels: "
                    "pack it with --labels CSV that names all of them"
                )
    return names


def whole_split(shard_sets: tuple[ShardSet, ...], split: str) -> Split:
    """Every sample of a split, of all the sets."""
    parts = [shard_set.split(split) for shard_set in shard_sets]
    return Split(
        [path for part in parts for path in part.tar_paths],
        [path for part in parts for path in part.index_paths],
        sum(part.num_samples for part in parts),
    )


def part_by_patients(
    shard_sets: tuple[ShardSet, ...],
    split: str,
    folder: Path,
    *,
    fraction: float = 1.0,
    num_patients: int | None = None,
    seed: int,
) -> Split:
    """All samples of some of a split's patients; the indexes that say which are written to `folder`.

    Each patient's place in the order of choice follows from the seed and the patient alone, so that a smaller part of
    the same seed is always within a larger one.

    Args:
        shard_sets: Patients of the same name in two sets are one.
        split: Of all the sets.
        folder: It must live as long as what is returned.
        fraction: Of the patients, rounded, at least one.
        num_patients: How many, instead.
        seed: Of the choice.

    Raises:
        UserError: There are fewer patients than `num_patients`.
    """
    metas = [read_metas(shard_set, shard) for shard_set, shard in _shards(shard_sets, split)]
    patients = {meta["patient"] for of_shard in metas for meta in of_shard}
    num_chosen = num_patients or max(1, round(fraction * len(patients)))
    if num_chosen > len(patients):
        raise UserError(f"{shard_sets[0].path}: split '{split}' has {len(patients)} patients, not {num_chosen}")
    ordered = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
    chosen = set(ordered[:num_chosen])
    masks = [[meta["patient"] in chosen for meta in of_shard] for of_shard in metas]
    return _part(shard_sets, split, folder, lambda i, _: masks[i])


def part_of_size(shard_sets: tuple[ShardSet, ...], split: str, folder: Path, max_samples: int) -> Split:
    """About `max_samples` of a split's samples, the same ones each time, from every tar in proportion."""
    whole = whole_split(shard_sets, split)
    if whole.num_samples <= max_samples:
        return whole
    share = max_samples / whole.num_samples
    return _part(shard_sets, split, folder, lambda _, n: [i < math.ceil(share * n) for i in range(n)])


def _part(
    shard_sets: tuple[ShardSet, ...], split: str, folder: Path, choose: Callable[[int, int], list[bool]]
) -> Split:
    """`choose` says, of a shard's number and its number of samples, which of them to take."""
    tar_paths, index_paths, num_samples = [], [], 0
    for i, (shard_set, shard) in enumerate(_shards(shard_sets, split)):
        entries = parse_index(shard_set.read(shard.index))
        chosen = [entry for entry, is_chosen in zip(entries, choose(i, len(entries)), strict=True) if is_chosen]
        if chosen:
            index_path = folder / f"{i:06d}.idx"
            index_path.write_bytes(format_index(chosen))
            tar_paths.append(f"{shard_set.path}/{shard.tar}")
            index_paths.append(str(index_path))
            num_samples += len(chosen)
    return Split(tar_paths, index_paths, num_samples)


def _shards(shard_sets: tuple[ShardSet, ...], split: str) -> list[tuple[ShardSet, Shard]]:
    return [(shard_set, shard) for shard_set in shard_sets for shard in shard_set.shards if shard.split == split]


def read_metas(shard_set: ShardSet, shard: Shard) -> list[dict[str, Any]]:
    """The JSON of each of a shard's samples, in order, without reading the images."""
    entries: list[IndexEntry] = parse_index(shard_set.read(shard.index))
    filesystem, root = open_storage(shard_set.path)
    starts = [entry.meta_offset for entry in entries]
    ends = [entry.meta_offset + entry.meta_size for entry in entries]
    with reading(f"{shard_set.path}/{shard.tar}"):
        contents = filesystem.cat_ranges([f"{root}/{shard.tar}"] * len(entries), starts, ends, on_error="raise")
    return [json.loads(content) for content in contents]


# --- loaders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledSpec:
    """What one rank loads, and how."""

    shard_sets: tuple[ShardSet, ...]
    view: LabelledViewSpec
    batch_size_per_rank: int
    seed: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
    num_threads: int = 2

    def build_pipeline(self, part: Split, *, augment: bool, batch_size: int) -> Pipeline:
        """Build the graph that reads this rank's share; raise UserError where the sets don't go together."""
        refuse_other_stores(self.shard_sets)
        reader = ReaderSpec(
            tar_paths=tuple(part.tar_paths),
            index_paths=tuple(part.index_paths),
            store=self.shard_sets[0].store,
            size_px=self.shard_sets[0].size_px,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
            shuffle=augment,
            shuffle_buffer_samples=min(SHUFFLE_BUFFER_SAMPLES, part.num_samples),
        )
        with reading_from(self.shard_sets):
            return build_labelled_graph(
                reader,
                self.view,
                augment=augment,
                batch_size=batch_size,
                device_id=None if self.device.type == "cpu" else self.device.index or 0,
                num_threads=self.num_threads,
            )


class TrainLoader:
    """Augmented batches in random order. An epoch follows from the seed and its number alone: that is how it resumes.

    Every rank takes floor(samples / global batch) steps an epoch; what is left out is different each time.
    """

    def __init__(self, spec: LabelledSpec, part: Split, min_steps_per_epoch: int = 1) -> None:
        """Read `part`; where it is smaller than a global batch, batches are as small as it is.

        Epochs of fewer than `min_steps_per_epoch` steps are several passes over the samples.

        Raises:
            UserError: There are fewer samples than ranks.
        """
        if part.num_samples < spec.world_size:
            raise UserError(f"{part.num_samples} labelled samples can't be shared out over {spec.world_size} ranks")
        self._spec, self._part = spec, part
        self.num_samples = part.num_samples
        self.batch_size_per_rank = min(spec.batch_size_per_rank, part.num_samples // spec.world_size)
        self._steps_per_pass = part.num_samples // (self.batch_size_per_rank * spec.world_size)
        self._num_passes = math.ceil(min_steps_per_epoch / self._steps_per_pass)
        self.steps_per_epoch = self._steps_per_pass * self._num_passes

    def epoch(self, number: int) -> Iterator[LabelledBatch]:
        """Yield the batches of an epoch, counted from 0; images have the side `crop_size_px`."""
        for i in range(number * self._num_passes, (number + 1) * self._num_passes):
            rng = np.random.default_rng([self._spec.seed, i])
            order = rng.permutation(len(self._part.tar_paths))  # the same on all ranks, which split up what it gives
            part = self._part._replace(
                tar_paths=[self._part.tar_paths[j] for j in order],
                index_paths=[self._part.index_paths[j] for j in order],
            )
            spec = replace(self._spec, seed=int(rng.integers(2**31)))
            pipeline = spec.build_pipeline(part, augment=True, batch_size=self.batch_size_per_rank)
            for _ in range(self._steps_per_pass):
                yield _next_batch(pipeline, self.batch_size_per_rank, spec)


class EvaluationLoader:
    """One pass each time it is iterated: every sample once over all ranks, in the order of packing.

    Ranks may get different numbers of batches, or none: nothing inside a pass may wait for another rank.
    """

    def __init__(self, spec: LabelledSpec, part: Split) -> None:
        """Read `part`."""
        num_readers = min(spec.world_size, part.num_samples)  # DALI has no empty readers
        self._spec, self._part = replace(spec, world_size=num_readers), part
        self.num_samples = num_samples_of(spec.rank, num_readers, part.num_samples)

    def __iter__(self) -> Iterator[LabelledBatch]:
        """Yield this rank's share, images of the side `resized_size_px`; the last batch may be smaller."""
        if self.num_samples == 0:
            return
        batch_size = min(self._spec.batch_size_per_rank, self.num_samples)
        pipeline = self._spec.build_pipeline(self._part, augment=False, batch_size=batch_size)
        for start in range(0, self.num_samples, batch_size):
            yield _next_batch(pipeline, min(batch_size, self.num_samples - start), self._spec)


def _next_batch(pipeline: Pipeline, num_samples: int, spec: LabelledSpec) -> LabelledBatch:
    with reading_from(spec.shard_sets):
        images, encoded_metas = pipeline.run()
    metas = [json.loads(bytes(np.asarray(encoded_metas[i]))) for i in range(num_samples)]
    return LabelledBatch(
        images=copy_images(images, spec.device)[:num_samples],
        labels=torch.tensor([meta["labels"] for meta in metas], dtype=torch.float32).to(spec.device),
        keys=[meta["key"] for meta in metas],
        patients=[meta["patient"] for meta in metas],
    )
