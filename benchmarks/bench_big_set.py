"""How fast the loader starts on big sets, and how much memory it takes.

    python -m benchmarks.bench_big_set                          # writes 3.9 GB to a temporary folder; five minutes
    python -m benchmarks.bench_big_set --work /nvme/benchmark   # keeps the sets there for the next run
    python -m benchmarks.bench_big_set --quick                  # does everything run?

Sets of noise: of 32 px, 2.5 KB a sample, for the number of samples to tell; and of 512 px, as packed by default. Each
row is measured in a process of its own, imports done, with the set in the page cache; figures are medians:

    open_seconds            ShardSet.open: manifest, files and indexes looked at
    build_seconds           PretrainLoader: DALI reads the indexes and builds the graph
    first_batch_seconds     both, and what it then takes to have a batch in hand
    loader_memory_mib       memory of the process's own that all this and 50 batches added to what imports took
    mapped_memory_mib       pages of the tars that are mapped, which the kernel takes back when it needs them
"""

import json
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
import tyro

from benchmarks.report import RESULTS, describe_hardware, make_result, publish
from benchmarks.timing import Figures, in_fresh_process, measure_in_turn, summarise
from errors import UsageError, exits_on_user_error
from pipeline.loader import LoaderSpec, PretrainLoader
from pipeline.packing import ShardWriter, seal_meta
from pipeline.shardset import FORMAT, MANIFEST, REJECTED, VERSION, ShardSet
from pipeline.spec import Batch, DistortionSpec, ViewSpec

ROWS = {
    "raw-32-10k": (32, 10_000),
    "raw-32-100k": (32, 100_000),
    "raw-32-1m": (32, 1_000_000),
    "raw-512-4k": (512, 4096),
}
"""By name: side of the images in px, number of samples."""
BATCH_SIZE = 64
NUM_BATCHES = 50


@dataclass(frozen=True)
class BigSetBenchmark:
    """Measure the loader's start and its memory."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where batches have to arrive."""
    rows: tuple[str, ...] | None = None
    """What to measure. Default: all; with --quick the first."""
    repeats: int | None = None
    """Rounds, in each of which every row is measured once. Default: 3, with --quick 1."""
    quick: bool = False
    """Show that everything runs. Keeps no report unless --out is given."""
    work: Path | None = None
    """Folder for the sets, which the next run finds there. Default: a temporary one."""
    out: Path | None = None
    """Folder for the report. Default: benchmarks/results."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        if unknown := sorted(set(self.rows or ()) - ROWS.keys()):
            raise UsageError(f"--rows {' '.join(unknown)}: there are {', '.join(ROWS)}")
        if self.repeats is not None and self.repeats < 1:
            raise UsageError(f"--repeats {self.repeats}: must be 1 or more")


def write_set(folder: Path, size_px: int, num_samples: int, samples_per_shard: int = 256, seed: int = 0) -> None:
    """Write a shard set of noise, all of it for training, as `pack --store raw` would."""
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shards = []
    for start in range(0, num_samples, samples_per_shard):
        path = folder / "train" / f"train-{start // samples_per_shard:06d}"
        with ShardWriter(path) as writer:
            for i in range(start, min(start + samples_per_shard, num_samples)):
                image = rng.bytes(size_px**2)
                meta = {"key": f"{i:08d}", "labels": None, "stored_size_px": [size_px, size_px]}
                writer.add(meta["key"], "raw", image, seal_meta(meta, zlib.crc32(image)))
        shards.append(
            {
                "name": f"{path.name}.tar",
                "samples": writer.num_samples,
                "bytes": writer.num_bytes,
                "sha256": writer.sha256,
                "index_sha256": writer.index_sha256,
            }
        )
    manifest = {"format": FORMAT, "version": VERSION, "store": "raw", "size_px": size_px, "label_names": []}
    manifest |= {"samples": num_samples, "splits": {"train": {"shards": shards}}}
    (folder / REJECTED).write_text("file,reason\n")
    (folder / MANIFEST).write_text(json.dumps(manifest))


def measure(source: str, num_threads: int, device: str) -> Figures:
    """Start a loader on the set `source`, draw from it, and look at the clock and the memory."""
    if device == "cuda":
        torch.ones(1, device=device)  # CUDA's own start is no loader's
    own_before, mapped_before = _memory_mib("RssAnon"), _memory_mib("RssFile")
    started = time.perf_counter()
    shard_set = ShardSet.open(source)
    opened = time.perf_counter()
    spec = LoaderSpec(
        shard_sets=(shard_set,),
        view=ViewSpec(),
        distortion=DistortionSpec(),
        batch_size_per_rank=BATCH_SIZE,
        seed=0,
        device=torch.device(device),
        num_threads=num_threads,
    )
    loader = PretrainLoader(spec)
    built = time.perf_counter()
    batches = chain.from_iterable(repeat(loader))
    _draw(batches, 1, device)
    drawn = time.perf_counter()
    _draw(batches, NUM_BATCHES, device)
    ended = time.perf_counter()
    return {
        "images_per_second": NUM_BATCHES * BATCH_SIZE / (ended - drawn),
        "samples": shard_set.manifest["samples"],
        "shards": len(shard_set.shards),
        "open_seconds": opened - started,
        "build_seconds": built - opened,
        "first_batch_seconds": drawn - started,
        "loader_memory_mib": _memory_mib("RssAnon") - own_before,
        "mapped_memory_mib": _memory_mib("RssFile") - mapped_before,
    }


def _draw(batches: Iterator[Batch], number: int, device: str) -> None:
    for _ in islice(batches, number):
        pass
    if device == "cuda":
        torch.cuda.synchronize()


def _memory_mib(kind: str) -> float:
    """Resident memory of this process: RssAnon, its own, or RssFile, pages of files that it has mapped."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@exits_on_user_error
def main() -> None:
    """Write, measure, print, keep."""
    settings = tyro.cli(BigSetBenchmark, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    hardware = describe_hardware(settings.device)
    names = settings.rows or (("raw-32-10k",) if settings.quick else tuple(ROWS))
    repeats = settings.repeats or (1 if settings.quick else 3)
    with nullcontext(settings.work) if settings.work else TemporaryDirectory(prefix="dira-benchmark-") as folder:
        work = Path(folder).resolve()
        for name in names:
            if not (work / name / MANIFEST).exists():
                shutil.rmtree(work / name, ignore_errors=True)
                write_set(work / name, *ROWS[name])

        def measure_row(name: str) -> Figures:
            return in_fresh_process(
                "benchmarks.bench_big_set:measure",
                source=str(work / name),
                num_threads=hardware["cores"],
                device=settings.device,
            )

        rows = summarise(measure_in_turn(names, repeats, measure_row), baseline=names[0])
    described = {"device": settings.device, "rows": list(names), "repeats": repeats, "batch_size": BATCH_SIZE}
    result = make_result("bench_big_set", hardware, described, rows)
    publish(result, settings.out or (None if settings.quick else RESULTS))


if __name__ == "__main__":
    main()
