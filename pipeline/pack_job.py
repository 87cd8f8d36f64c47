"""A whole pack: from the settings to a finished shard set, with all cores busy, resumable at any moment."""

import csv
import hashlib
import io
import json
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2

from errors import UserError
from pipeline.pack_folder import (
    Output,
    RemoteOutput,
    claimed,
    install,
    is_to_do,
    open_output,
    read_json,
    refuse_foreign_files,
)
from pipeline.packing import EXTENSIONS, PackedImage, ShardWriter, Unusable, pack_image, seal_meta, write_whole
from pipeline.plan import LISTS, PackSettings, Plan, Sample, plan_samples
from pipeline.progress import Progress
from pipeline.shardset import FORMAT, REJECTED, VERSION
from pipeline.sources import find_images, read_image, stream_images
from pipeline.storage import STORAGE_ERRORS, reason
from pipeline.time_limit import TimeLimit

T = TypeVar("T")
Packed = PackedImage | Unusable


class ShardPlan(NamedTuple):
    """What goes into one shard."""

    split: str
    name: str
    """Without an ending."""
    samples: list[Sample]


def pack(settings: PackSettings) -> None:
    """Make the shard set that the settings ask for, or go on making it; say so on standard output.

    Raises:
        UserError: If it can't be made. What was there before is then still there.
    """
    cv2.setNumThreads(1)  # the parallelism is over images
    out = open_output(settings.out)
    try:
        refuse_foreign_files(out)
        listings = read_json(out.work / "listings.json") or {}
        images = find_images(settings.images, listings)
        plan = plan_samples(images, settings)
        samples_per_shard = settings.samples_per_shard or _default_samples_per_shard(settings, plan)
        options = _describe(settings, samples_per_shard, plan)
        with claimed(out):
            if is_to_do(out, options, overwrite=settings.overwrite):
                write_whole(out.work / "listings.json", json.dumps(listings).encode())
                _print_plan(settings, plan)
                job = PackJob(settings, plan, samples_per_shard, out.work)
                job.run()
                manifest = job.manifest(options)
                content = json.dumps(manifest, indent=1).encode() + b"\n"
                install(out, _with_progress(job.shards, out), content, job.rejected_csv())
                print(f"packed {manifest['samples']} images into {out.path}")
                if manifest["rejected"]:
                    print(f"{manifest['rejected']} were rejected, see {out.path}/{REJECTED}")
    except STORAGE_ERRORS as error:
        where = getattr(error, "filename", None) or out.path
        raise UserError(f"{where}: {reason(error)}; mend it, the same command carries on") from None


def _default_samples_per_shard(settings: PackSettings, plan: Plan) -> int:
    at_most = max(1, min(256, 2**28 // (settings.size_px or 1024) ** 2))
    return min(at_most, max(16, math.ceil(sum(map(len, plan.splits.values())) / 8)))


def _describe(settings: PackSettings, samples_per_shard: int, plan: Plan) -> dict[str, Any]:
    """All that decides about the shards' bytes; where the images lie does not."""
    samples = [sample for samples in plan.splits.values() for sample in samples]
    images = sorted((sample.key, sample.image.file_name, sample.patient, sample.image.num_bytes) for sample in samples)
    digest = hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]
    files = {"labels": settings.labels, "boxes": settings.boxes}
    files |= {f"{kind}_list": settings.lists.get(kind) for kind in LISTS}
    described = {
        name: f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]})" if path else None
        for name, path in files.items()
    }
    return {
        "images": f"{len(images)} of {sum(image[-1] for image in images)} bytes (names and sizes: sha256 {digest})",
        **described,
        "val_fraction": settings.val_fraction,
        "store": settings.store,
        "size": settings.size_px,
        "quality": settings.quality,
        "samples_per_shard": samples_per_shard,
        "seed": settings.seed,
    }


def _print_plan(settings: PackSettings, plan: Plan) -> None:
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in plan.splits.items())
    size = f"{settings.size_px} px" if settings.size_px else "original size"
    print(f"packing {counts} as {settings.store}, {size}, with {settings.num_workers} workers", flush=True)
    if plan.num_left_out:
        print(f"{plan.num_left_out} images are in none of the lists and are left out", flush=True)
    if settings.val_fraction and "val" not in plan.splits and "train" not in settings.lists:
        print("all images for training are of one patient, so there is no validation split", flush=True)


def _with_progress(shards: list[ShardPlan], out: Output) -> Iterator[tuple[str, str]]:
    """Split and name of each shard; shows how the upload goes on, where it is one."""
    num_samples = sum(len(shard.samples) for shard in shards) if isinstance(out, RemoteOutput) else 0
    with Progress("uploading", num_samples) as progress:
        for shard in shards:
            yield shard.split, shard.name
            if num_samples:
                progress.advance(len(shard.samples))


class PackJob:
    """Packs a plan's samples into shards in the work folder; what is finished there is not done again."""

    def __init__(self, settings: PackSettings, plan: Plan, samples_per_shard: int, work: Path) -> None:
        self.shards = [
            ShardPlan(split, f"{split}-{start // samples_per_shard:06d}", samples[start : start + samples_per_shard])
            for split, samples in plan.splits.items()
            for start in range(0, len(samples), samples_per_shard)
        ]
        self._settings, self._plan = settings, plan
        self._work = work
        self._samples = [sample for shard in self.shards for sample in shard.samples]
        self._max_rejected = settings.max_rejected
        if self._max_rejected is None:
            self._max_rejected = math.ceil(len(self._samples) / 100)
        self._rejected: dict[str, str] = {}  # reasons by key
        self._records: dict[str, dict[str, Any]] = {}  # by shard
        self._staged: dict[Path, tuple[Path, dict[str, Any]]] = {}  # by archive
        self._lock = threading.Lock()
        self._time_limit = TimeLimit(work / "too-slow.json")

    def run(self) -> None:
        """Do the work, and leave it in the work folder.

        Raises:
            UserError: If more images than allowed can't be used.
        """
        for shard in self.shards:
            record = read_json(self._work / f"{shard.name}.json")
            if record:
                self._records[shard.name] = record
                for key, reason in record["rejected"].items():
                    self._reject(key, reason)
        to_write = [shard for shard in self.shards if shard.name not in self._records]
        if self._records:
            print(f"{len(self._records)} of {len(self.shards)} shards are there already", flush=True)
        to_stage = self._find_unstaged() if to_write else []
        with self._time_limit, ThreadPoolExecutor(self._settings.num_workers) as self._pool:
            num_streamed = sum(len(keys) for _, _, keys in to_stage)
            with Progress("reading archives", num_streamed) as self._progress:
                self._for_all(self._stage, to_stage)
            num_done = len(self._samples) - sum(len(shard.samples) for shard in to_write)
            with Progress("packing", len(self._samples), num_done) as self._progress:
                self._for_all(self._write_shard, to_write)

    def _for_all(self, function: Callable[[T], None], items: Iterable[T]) -> None:
        """Call for a few items at a time, so that one can wait for the disk; the worker threads serve them all."""
        with ThreadPoolExecutor(max(2, self._settings.num_workers // 8)) as pool:
            calls = [pool.submit(function, item) for item in items]
            try:
                for call in as_completed(calls):
                    call.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _in_order(self, function: Callable[[T], Packed], items: Iterable[T]) -> Iterator[tuple[T, Packed]]:
        """Each item with its result, computed on the worker threads, with only a few ahead of the caller."""
        pending: deque[tuple[T, Future[Packed]]] = deque()
        for item in items:
            pending.append((item, self._pool.submit(function, item)))
            if len(pending) > 2 * self._settings.num_workers:
                first, result = pending.popleft()
                yield first, result.result()
        for item, result in pending:
            yield item, result.result()

    def _pack(self, name: str, data: bytes) -> Packed:
        if name in self._time_limit.exceeded:
            return Unusable("takes too long to decode")
        try:
            with self._time_limit.watching(name):
                return pack_image(data, self._settings.store, self._settings.size_px, self._settings.quality)
        except Unusable as reason:
            return reason

    def _find_unstaged(self) -> list[tuple[Path, Path, dict[str, str]]]:
        """Compressed archives that have yet to be read: the archive, where to stage it, keys by path in it."""
        wanted: dict[Path, dict[str, str]] = {}
        for sample in self._samples:
            if sample.image.is_streamed and not sample.image.refusal:
                wanted.setdefault(sample.image.root, {})[sample.image.path] = sample.key
        unstaged = []
        for number, (archive, keys) in enumerate(wanted.items()):
            staging = self._work / f"staged-{number}.bin"
            index = read_json(staging.with_suffix(".json"))
            if index is None:
                unstaged.append((archive, staging, keys))
            else:
                self._staged[archive] = staging, index
        return unstaged

    def _stage(self, task: tuple[Path, Path, dict[str, str]]) -> None:
        """Pack the images of a compressed archive in its own order into one file; its index tells what is where."""
        archive, staging, keys = task
        index: dict[str, Any] = {}
        with staging.open("wb") as file:
            for (path, _), packed in self._in_order(
                lambda item: self._pack(f"{archive}:{item[0]}", item[1]), stream_images(archive, keys.keys())
            ):
                if isinstance(packed, Unusable):
                    index[path] = str(packed)
                    self._reject(keys[path], str(packed))
                else:
                    index[path] = [file.tell(), len(packed.data), *packed[1:]]
                    file.write(packed.data)
                self._progress.advance()
            file.flush()
            os.fsync(file.fileno())
        if index.keys() != keys.keys():
            raise UserError(f"{archive}: has changed while it was being read")
        write_whole(staging.with_suffix(".json"), json.dumps(index).encode())
        self._staged[archive] = staging, index

    def _fetch(self, sample: Sample) -> Packed:
        """A sample's image, packed: from staging if its archive is a stream, or else from its source."""
        image = sample.image
        if image.refusal:
            return Unusable(image.refusal)
        if image.is_streamed:
            staging, index = self._staged[image.root]
            if isinstance(index[image.path], str):
                return Unusable(index[image.path])
            offset, size, *rest = index[image.path]
            with staging.open("rb") as file:
                file.seek(offset)
                return PackedImage(file.read(size), *rest)
        try:
            return self._pack(str(image), read_image(image))
        except OSError as error:
            return Unusable(f"cannot be read: {error.strerror}")

    def _write_shard(self, shard: ShardPlan) -> None:
        totals = Counter(pixels=0, pixel_sum=0, pixel_sum_of_squares=0, padded=0)
        rejected = {}
        with ShardWriter(self._work / shard.name) as writer:
            for sample, packed in self._in_order(self._fetch, shard.samples):
                if isinstance(packed, Unusable):
                    rejected[sample.key] = str(packed)
                    self._reject(sample.key, str(packed))
                else:
                    meta = seal_meta(_meta(sample, packed), packed.crc32)
                    writer.add(sample.key, EXTENSIONS[self._settings.store], packed.data, meta)
                    totals["pixels"] += math.prod(packed.stored_size_px)
                    totals["pixel_sum"] += packed.pixel_sum
                    totals["pixel_sum_of_squares"] += packed.pixel_sum_of_squares
                    totals["padded"] += packed.is_padded
                self._progress.advance()
        record = {
            "files": {
                "name": f"{shard.name}.tar",
                "samples": writer.num_samples,
                "bytes": writer.num_bytes,
                "sha256": writer.sha256,
                "index_sha256": writer.index_sha256,
            },
            "totals": totals,
            "rejected": rejected,
        }
        write_whole(self._work / f"{shard.name}.json", json.dumps(record).encode())
        self._records[shard.name] = record

    def _reject(self, key: str, reason: str) -> None:
        with self._lock:
            self._rejected[key] = reason
            num_rejected = len(self._rejected)
        if num_rejected > self._max_rejected:
            some = [f"{s.image}: {self._rejected[s.key]}" for s in self._samples if s.key in self._rejected][:3]
            raise UserError(
                f"{num_rejected} images can't be used, and --max-rejected is {self._max_rejected} "
                f"({'; '.join(some)}); mend them, or allow more and the same command carries on"
            )

    def manifest(self, options: dict[str, Any]) -> dict[str, Any]:
        """The manifest of the finished shards.

        Raises:
            UserError: If all the images of a split were rejected.
        """
        splits = {}
        for split, samples in self._plan.splits.items():
            packed = [sample for sample in samples if sample.key not in self._rejected]
            if not packed:
                raise UserError(f"none of the {len(samples)} images for {split} can be used")
            labels = [sample.labels for sample in packed if sample.labels is not None]
            counts = map(sum, zip(*labels, strict=True))
            files = [self._records[shard.name]["files"] for shard in self.shards if shard.split == split]
            splits[split] = {
                "samples": len(packed),
                "patients": len({sample.patient for sample in packed}),
                "boxes": sum(len(sample.boxes) for sample in packed),
                "labelled": len(labels),
                "labels": dict(zip(self._plan.label_names, counts, strict=bool(labels))),
                "shards": [shard for shard in files if shard["samples"]],
            }
        totals = {shard.name: self._records[shard.name]["totals"] for shard in self.shards}
        of_train = [totals[shard.name] for shard in self.shards if shard.split == "train"]
        pixels, total, squares = (sum(t[n] for t in of_train) for n in ("pixels", "pixel_sum", "pixel_sum_of_squares"))
        mean = total / pixels
        return {
            "format": FORMAT,
            "version": VERSION,
            "store": self._settings.store,
            "size_px": self._settings.size_px,
            "label_names": self._plan.label_names,
            "pixel_mean": mean / 255,
            "pixel_std": math.sqrt(max(squares / pixels - mean**2, 0.0)) / 255,
            "samples": len(self._samples) - len(self._rejected),
            "rejected": len(self._rejected),
            "padded_to_square": sum(t["padded"] for t in totals.values()),
            "splits": splits,
            "options": options,
        }

    def rejected_csv(self) -> bytes:
        """The images that can't be used, as given, and why."""
        rows = sorted((str(s.image), self._rejected[s.key]) for s in self._samples if s.key in self._rejected)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("file", "reason"), *rows])
        return text.getvalue().encode(errors="backslashreplace")


def _meta(sample: Sample, packed: PackedImage) -> dict[str, Any]:
    """A sample's JSON."""
    return {
        "key": sample.key,
        "name": sample.image.file_name,
        "patient": sample.patient,
        "split": sample.split,
        "labels": sample.labels,
        "boxes": [box._asdict() for box in sample.boxes],
        "original_size_px": packed.original_size_px,
        "stored_size_px": packed.stored_size_px,
        "scale": packed.scale,
        "offset_px": packed.offset_px,
    }
