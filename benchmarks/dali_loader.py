"""Our own data path, as train.py opens it, for bench_loader."""

from collections.abc import Iterator
from itertools import chain, repeat

import torch

from benchmarks.loader_row import measure_batches
from benchmarks.timing import Figures
from pipeline.loader import LoaderSpec, PretrainLoader
from pipeline.shardset import ShardSet
from pipeline.spec import Batch, DistortionSpec, ViewSpec


def measure(source: str, batch_size: int, num_workers: int, device: str, seconds: float) -> Figures:
    """Measure the loader on the shard set `source` with `num_workers` threads."""

    def open_batches() -> Iterator[Batch]:
        spec = LoaderSpec(
            shard_sets=(ShardSet.open(source),),
            view=ViewSpec(),
            distortion=DistortionSpec(),
            batch_size_per_rank=batch_size,
            seed=0,
            device=torch.device(device),
            num_threads=num_workers,
        )
        return chain.from_iterable(repeat(PretrainLoader(spec)))

    return measure_batches(open_batches, batch_size, num_workers, device, seconds)
