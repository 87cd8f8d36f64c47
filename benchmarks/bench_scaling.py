"""Images/s of the training step on 1, 2, 4, ... ranks of this machine, each with a batch of the same size.

    python -m benchmarks.bench_scaling                   # on GPUs up to as many as there are, over NCCL
    python -m benchmarks.bench_scaling --ranks 1 2 4     # on a CPU over gloo, a thread a rank
    python -m benchmarks.bench_scaling --quick           # does everything run?

`ratio_to_one_rank` is to be read against the number of ranks. `communication_ms` is the exchange of key images and the
gather of keys; what computing does not hide of averaging gradients shows as a longer `backward_ms` and
`discriminator_ms` than on one rank. More ranks than cores say nothing about speed.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.report import RESULTS, describe_hardware, make_result, publish
from benchmarks.timing import Figures, in_fresh_process, measure_in_turn, summarise
from errors import UsageError, exits_on_user_error
from model.device import choose_device, choose_precision
from settings import Settings


@dataclass(frozen=True)
class ScalingBenchmark:
    """Measure the step on growing numbers of ranks."""

    ranks: tuple[int, ...] = ()
    """Numbers of ranks. Default: powers of two up to the number of GPUs, or of CPU cores."""
    modes: tuple[Literal["di", "dir", "dira"], ...] = ("dir", "dira")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch_size_per_rank: int | None = None
    """Images of one rank in a step. Default: 4 on a CPU, 256 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seconds: float | None = None
    """Time to measure a row for, in each round. Default: 10, with --quick 0.2."""
    repeats: int | None = None
    """Rounds. Default: 3, with --quick 1."""
    quick: bool = False
    """A small network, little time: shows that everything runs. Keeps no report unless --out is given."""
    out: Path | None = None
    """Folder for the report. Default: benchmarks/results."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        if any(ranks < 1 for ranks in self.ranks):
            raise UsageError(f"--ranks {' '.join(map(str, self.ranks))}: each must be 1 or more")
        if self.batch_size_per_rank is not None and self.batch_size_per_rank < 2:
            raise UsageError(f"--batch-size-per-rank {self.batch_size_per_rank}: must be 2 or more")


@exits_on_user_error
def main() -> None:
    """Measure, print, keep."""
    asked = tyro.cli(ScalingBenchmark, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    device = choose_device(asked.device, 0)
    on_gpu = device.type == "cuda"
    num_there = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
    numbers = asked.ranks or tuple(2**i for i in range(num_there.bit_length()) if 2**i <= num_there)
    if not on_gpu:
        os.environ["OMP_NUM_THREADS"] = "1"  # a rank is to have as much when it is alone as among others
    precision = choose_precision("auto", device) if asked.precision == "auto" else asked.precision
    batch_size = asked.batch_size_per_rank or (256 if on_gpu and not asked.quick else 4)
    seconds = asked.seconds or (0.2 if asked.quick else 10.0)
    small = {"arch": "resnet18", "crop_size": 32} if asked.quick else {}

    def measure(mode: str, num_ranks: int) -> Figures:
        settings = Settings(
            shards=("synthetic",),
            mode=mode,
            batch_size=batch_size * num_ranks,
            precision=precision,
            device=device.type,
            key_bn_groups=1,  # as on several ranks, so that one rank does the same work
            **small,
        )
        figures = in_fresh_process(
            "benchmarks.step_row:measure", num_ranks=num_ranks, settings=settings.to_dict(), seconds=seconds
        )
        return {"ranks": num_ranks, **figures}

    repeats = asked.repeats or (1 if asked.quick else 3)
    rows = []
    for mode in asked.modes:
        names = {"one-rank" if ranks == 1 else f"{ranks}-ranks": ranks for ranks in numbers}
        rounds = measure_in_turn(list(names), repeats, lambda name, mode=mode, names=names: measure(mode, names[name]))
        rows += [row | {"name": f"{mode}-{precision}-{row['name']}"} for row in summarise(rounds, baseline="one-rank")]
    described = {"batch_size_per_rank": batch_size, "repeats": repeats, "seconds": seconds, "quick": asked.quick}
    out = asked.out or (None if asked.quick else RESULTS)
    publish(make_result("bench_scaling", describe_hardware(device.type), described, rows), out)


if __name__ == "__main__":
    main()
