"""Epochs of `Batch` from shard sets: endless and resumable for training, one exact pass for validation."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali.backend import TensorListCPU, TensorListGPU
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray

from errors import UserError
from pipeline.graph import ReaderSpec, build_graph
from pipeline.shardset import ShardSet
from pipeline.spec import Batch, DistortionSpec, ViewSpec


@dataclass(frozen=True)
class LoaderSpec:
    """What one rank loads, and how."""

    shard_sets: tuple[ShardSet, ...]
    view: ViewSpec
    distortion: DistortionSpec | None
    batch_size_per_rank: int
    seed: int
    device: torch.device
    target: Literal["aligned", "unflipped"] = "aligned"
    rank: int = 0
    world_size: int = 1
    num_threads: int = 2

    def num_samples(self, split: str) -> int:
        """Samples in `split` over all sets and ranks."""
        return sum(shard_set.split(split).num_samples for shard_set in self.shard_sets)

    def build_pipeline(
        self, split: str, *, shuffle: bool, batch_size: int, seed: int, checkpoint: bytes | None = None
    ) -> Pipeline:
        """Build the graph that reads this rank's share of `split`; raise UserError where the sets don't go together."""
        first = self.shard_sets[0]
        refuse_other_stores(self.shard_sets)
        splits = [shard_set.split(split) for shard_set in self.shard_sets]
        reader = ReaderSpec(
            tar_paths=tuple(path for part in splits for path in part.tar_paths),
            index_paths=tuple(path for part in splits for path in part.index_paths),
            store=first.store,
            size_px=first.size_px,
            rank=self.rank,
            world_size=self.world_size,
            seed=seed,
            shuffle=shuffle,
            shuffle_buffer_samples=min(1024, self.num_samples(split)),
        )
        with reading_from(self.shard_sets):
            return build_graph(
                reader,
                self.view,
                self.distortion,
                target=self.target,
                batch_size=batch_size,
                device_id=None if self.device.type == "cpu" else self.device.index or 0,
                num_threads=self.num_threads,
                checkpoint=checkpoint,
            )


class PretrainLoader:
    """Training batches. Each `iter()` gives what is left of the current epoch, or all of the next one.

    Every rank takes floor(samples / global batch) steps an epoch, off a reader that never ends: no rank waits for a
    batch that another does not have, and what an epoch leaves out comes first in the next.
    """

    def __init__(self, spec: LoaderSpec, split: str = "train") -> None:
        """Open `split`; raise UserError where it can't fill one global batch."""
        self._spec = spec
        self._split = split
        global_batch_size = spec.batch_size_per_rank * spec.world_size
        num_samples = spec.num_samples(split)
        if num_samples < global_batch_size:
            raise UserError(
                f"a batch of {global_batch_size} is more than the {num_samples} samples of split '{split}': "
                "use a smaller --batch-size"
            )
        self.steps_per_epoch = num_samples // global_batch_size
        self.num_batches_drawn = 0
        self._pipeline = self._build_pipeline()

    def __iter__(self) -> Iterator[Batch]:
        """Yield [batch_size_per_rank, 1, crop_size_px, crop_size_px] batches up to the end of the epoch."""
        for _ in range(self.steps_per_epoch - self.num_batches_drawn % self.steps_per_epoch):
            batch = _next_batch(self._pipeline, self._spec.batch_size_per_rank, self._spec)
            self.num_batches_drawn += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's place in the data, random generators included."""
        state = torch.frombuffer(bytearray(self._pipeline.checkpoint()), dtype=torch.uint8)
        return {"num_batches_drawn": self.num_batches_drawn, "seed": self._spec.seed, "pipeline": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the next batch is, byte for byte, the one that came next then."""
        self._spec = replace(self._spec, seed=state["seed"])
        self._pipeline = self._build_pipeline(state["pipeline"].cpu().numpy().tobytes())
        self.num_batches_drawn = state["num_batches_drawn"]

    def begin_here(self) -> None:
        """Make the next batch the first of the first epoch; the data stays in its order."""
        self.num_batches_drawn = 0

    def start_anew(self, num_batches_drawn: int) -> None:
        """Count on from `num_batches_drawn` with data in a new order: the number of ranks has changed."""
        seed = int(np.random.default_rng([self._spec.seed, num_batches_drawn]).integers(2**31))
        self._spec = replace(self._spec, seed=seed)
        self._pipeline = self._build_pipeline()
        self.num_batches_drawn = num_batches_drawn

    def _build_pipeline(self, checkpoint: bytes | None = None) -> Pipeline:
        spec = self._spec
        return spec.build_pipeline(
            self._split, shuffle=True, batch_size=spec.batch_size_per_rank, seed=spec.seed, checkpoint=checkpoint
        )


class ValidationLoader:
    """One pass over a split each time it is iterated: every sample once over all ranks, with the same views every time.

    Ranks may get different numbers of batches, or none: nothing inside a pass may wait for another rank.
    """

    def __init__(self, spec: LoaderSpec, split: str = "val") -> None:
        """Open `split`."""
        self._split = split
        total = spec.num_samples(split)
        num_readers = min(spec.world_size, total)  # DALI has no empty readers
        self._spec = replace(spec, world_size=num_readers)
        self.num_samples = num_samples_of(spec.rank, num_readers, total)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's share; its last batch may be smaller than the others."""
        if self.num_samples == 0:
            return
        batch_size = min(self._spec.batch_size_per_rank, self.num_samples)
        seed = self._spec.seed + 1  # not the views of training
        pipeline = self._spec.build_pipeline(self._split, shuffle=False, batch_size=batch_size, seed=seed)
        for start in range(0, self.num_samples, batch_size):
            yield _next_batch(pipeline, min(batch_size, self.num_samples - start), self._spec)


def _next_batch(pipeline: Pipeline, num_samples: int, spec: LoaderSpec) -> Batch:
    with reading_from(spec.shard_sets):
        outputs = pipeline.run()
    return Batch(*(copy_images(output, spec.device)[:num_samples] for output in outputs))


def copy_images(output: TensorListCPU | TensorListGPU, device: torch.device) -> torch.Tensor:
    """Copy what a graph gives, for DALI writes over its buffers in the next run: uint8 [B, 1, H, W] on the device."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    dali_tensor = output.as_tensor()
    images = torch.empty(dali_tensor.shape(), dtype=torch.uint8, device=device)  # [B, H, W, 1]
    feed_ndarray(dali_tensor, images, cuda_stream=stream)
    return images.squeeze(3).unsqueeze(1)


def num_samples_of(rank: int, num_readers: int, num_samples: int) -> int:
    """How many samples of one pass DALI deals out to a rank; none where there are fewer readers than ranks."""
    if rank >= num_readers:
        return 0
    return num_samples * (rank + 1) // num_readers - num_samples * rank // num_readers


def refuse_other_stores(shard_sets: tuple[ShardSet, ...]) -> None:
    """Raise UserError where the sets can't be read together."""
    first = shard_sets[0]
    for other in shard_sets[1:]:
        if (other.store, other.size_px) != (first.store, first.size_px):
            raise UserError(
                f"{other.path} is packed as {other.store} at {other.size_px} px and {first.path} as {first.store} "
                f"at {first.size_px} px: sets that are read together need the same --store and --size"
            )


@contextmanager
def reading_from(shard_sets: tuple[ShardSet, ...]) -> Iterator[None]:
    """Raise what keeps DALI from reading the sets as a UserError: damaged files and failing networks are no bugs."""
    try:
        yield
    except RuntimeError as error:
        what = (
            str(error).rpartition("encountered:")[2].replace("Current pipeline object is no longer valid.", "").strip()
        )
        remote = [shard_set.path for shard_set in shard_sets if "://" in shard_set.path]
        if remote:
            raise UserError(
                f"{', '.join(remote)}: DALI cannot read on ({what}); it takes credentials, region and endpoint "
                "from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"
            ) from error
        for shard_set in shard_sets:
            if found := re.search(re.escape(shard_set.path) + r"/\w+/[\w-]+\.(?:tar(?::\d+:(\S+))?|idx)", what):
                file, key = found[0].partition(":")[0], found[1] and found[1].partition(".")[0]
                where = f"{file}: sample {key}" if key else file
                reason = what.splitlines()[0]
                raise UserError(f"{where}: damaged ({reason}); run shard_cxr14.py verify {shard_set.path}") from error
        raise
