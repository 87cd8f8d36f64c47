"""Images/s of training end to end, loader and step together, against the same step on a batch that is already there.

    python -m benchmarks.bench_train                     # phantoms of 1024 px, packed raw at 512; on 2 cores 10 minutes
    python -m benchmarks.bench_train --images ChestX-ray14/images --store jpeg-512 --device cuda
    python -m benchmarks.bench_train --quick             # does everything run?

`ratio_to_step_alone` compares with training's own step on one batch again and again, in the same process. The data wait
is what train.py logs: the share of the time in which the loop stood at the loader.
"""

import time
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Literal

import tyro

from benchmarks.inputs import STORES, ImageBenchmark, pack_images
from benchmarks.report import describe_hardware, make_result, publish
from benchmarks.timing import Figures, in_fresh_process, measure_in_turn, peak_memory_mib, summarise
from errors import UsageError, exits_on_user_error
from model.device import choose_device, choose_precision, wait_for
from pipeline.loader import PretrainLoader
from pipeline.spec import Batch
from settings import Settings
from training.graphs import GraphedStep
from training.learner import build_learner
from training.run import loader_spec
from training.step import train_step

NUM_WARM_UP_STEPS = {"cpu": 1, "cuda": 10}


@dataclass(frozen=True)
class TrainBenchmark(ImageBenchmark):
    """Measure training end to end."""

    modes: tuple[Literal["di", "dir", "dira"], ...] = ("dir", "dira")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    store: str = "raw-512"
    """Which shards to read: raw-512, jpeg-512, png-512 or png-original."""
    batch_size: int | None = None
    """Default: 8 on a CPU, 256 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    """As in train.py, as is cuda_graphs."""
    cuda_graphs: bool = False
    seconds: float | None = None
    """Time to measure a row for, in each round. Default: 20, with --quick 0.5."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        super().__post_init__()
        if self.store not in STORES:
            raise UsageError(f"--store {self.store}: there are {', '.join(STORES)}")


def measure(settings: dict[str, Any], seconds: float) -> Figures:
    """Train on real batches for `seconds`, then on one of them for half as long."""
    chosen = Settings.from_dict(settings, "benchmark")
    device = choose_device(chosen.device, 0)
    loader, learner = PretrainLoader(loader_spec(chosen, device)), build_learner(chosen, device)
    take_step = GraphedStep(learner) if chosen.cuda_graphs else train_step
    batches = chain.from_iterable(repeat(loader))
    batch = next(batches)

    def train_on(batch: Batch) -> None:
        take_step(learner, batch)
        learner.step += 1

    for _ in range(NUM_WARM_UP_STEPS[device.type]):
        train_on(batch)
    for _ in range(2):
        train_on(next(batches))
    wait_for(device)
    num_steps, waited_s, started = 0, 0.0, time.perf_counter()
    while num_steps < 3 or time.perf_counter() < started + seconds:
        asked_at = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - asked_at
        train_on(batch)
        num_steps += 1
    wait_for(device)
    elapsed_s = time.perf_counter() - started
    num_alone, started = 0, time.perf_counter()
    while num_alone < max(2, num_steps // 2):
        train_on(batch)
        num_alone += 1
    wait_for(device)
    alone = num_alone * chosen.batch_size / (time.perf_counter() - started)
    rate = num_steps * chosen.batch_size / elapsed_s
    return {
        "images_per_second": rate,
        "step_alone_images_per_second": alone,
        "ratio_to_step_alone": rate / alone,
        "data_wait_fraction": waited_s / elapsed_s,
        "peak_memory_mib": peak_memory_mib(),
    }


@exits_on_user_error
def main() -> None:
    """Measure, print, keep."""
    asked = tyro.cli(TrainBenchmark, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    num_cores = asked.use_cores()
    device = choose_device(asked.device, 0)
    precision = choose_precision(asked.precision, device)
    batch_size = asked.batch_size or (256 if device.type == "cuda" and not asked.quick else 8)
    if batch_size > asked.num_images_used:
        raise UsageError(f"--batch-size {batch_size}: more than --num-images")
    seconds = asked.seconds or (0.5 if asked.quick else 20.0)
    small = {"arch": "resnet18", "crop_size": 32} if asked.quick else {}
    with asked.work_folder() as work:
        shards = work / asked.store
        pack_images(asked.find_images(work), asked.store, shards, num_cores)
        names = {f"{mode}-{precision}": mode for mode in asked.modes}

        def measure_row(name: str) -> Figures:
            settings = Settings(
                shards=(str(shards),),
                mode=names[name],
                batch_size=batch_size,
                precision=precision,
                device=device.type,
                compile=asked.compile,
                cuda_graphs=asked.cuda_graphs,
                data_threads=num_cores,
                **small,
            )
            return in_fresh_process("benchmarks.bench_train:measure", settings=settings.to_dict(), seconds=seconds)

        rows = summarise(measure_in_turn(list(names), asked.num_rounds, measure_row), baseline="")
    described = asked.describe() | {"batch_size": batch_size, "precision": precision, "seconds": seconds}
    publish(make_result("bench_train", describe_hardware(device.type), described, rows), asked.report_folder)


if __name__ == "__main__":
    main()
