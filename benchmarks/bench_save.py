"""How long a step waits for a save: written at once, and written beside the training.

    python -m benchmarks.bench_save                       # `dira` with a ResNet-50, 224 px, on the CPU; three minutes
    python -m benchmarks.bench_save --device cuda --batch-size 64
    python -m benchmarks.bench_save --quick               # does everything run?

Training steps on random images; every third saves. `stall_ms` is the median of what the call takes, which is all that
training waits for; `step_ms` a step's median without a save, and `step_after_save_ms` of the steps while the file is
still being written. `at-once` waits until the file is on the disk of --work, as a loop without a thread would.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.report import describe_hardware, make_result, publish
from errors import exits_on_user_error
from pipeline.spec import Batch
from settings import Settings
from training.learner import build_learner
from training.step import train_step
from training.writer import CheckpointWriter

ROWS = ("at-once", "beside")
STEPS_BETWEEN_SAVES = 3


@dataclass(frozen=True)
class SaveBenchmark:
    """Measure what a save costs a step."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the state lies."""
    batch_size: int = 2
    """Images a step: how long steps are decides whether a file is written before the next save."""
    num_saves: int = 5
    """Of each row."""
    work: Path | None = None
    """Where the files go. Default: a temporary folder."""
    quick: bool = False
    """A ResNet-18 and little images: only to see whether everything runs."""


class Training:
    """What is saved in `dira`, and steps that change it."""

    def __init__(self, settings: SaveBenchmark) -> None:
        arch, crop_size_px = ("resnet18", 64) if settings.quick else ("resnet50", 224)
        run = Settings(shards=("none",), mode="dira", arch=arch, crop_size=crop_size_px, batch_size=settings.batch_size)
        device = torch.device(settings.device)
        self._learner = build_learner(run, device)
        shape = (settings.batch_size, 1, crop_size_px, crop_size_px)
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self._batch = Batch(images, images, images)

    def step(self) -> None:
        """Change every weight."""
        train_step(self._learner, self._batch)
        self._learner.step += 1

    def state(self, step: int) -> dict[str, object]:
        """What `training.saving` saves, but for the loader's state, a few KB."""
        learner = self._learner
        optimizers = [optimizer.state_dict() for optimizer in (learner.optimizer, learner.disc_optimizer)]
        return {"step": step, "model": learner.model.state_dict(), "optimizers": optimizers}


def measure(row: str, settings: SaveBenchmark, training: Training, folder: Path) -> dict[str, object]:
    """Take steps and save; look at the clock."""
    writer = CheckpointWriter(folder, torch.device(settings.device))
    stalls_ms, plain_ms, after_ms = [], [], []
    for number in range(settings.num_saves + 1):
        for i in range(STEPS_BETWEEN_SAVES):
            took_ms = _timed_ms(training.step, settings)
            (after_ms if i == 0 and number else plain_ms).append(took_ms)
        if row == "beside":
            writer.wait()  # as with hundreds of steps between saves

        def save(number: int = number) -> None:
            writer.write(training.state(number), is_best=False)
            if row == "at-once":
                writer.wait()

        stalls_ms.append(_timed_ms(save, settings))
    writer.wait()
    return {
        "name": row,
        "stall_ms": statistics.median(stalls_ms[1:]),  # the first takes the memory for the copy
        "stall_spread_ms": [min(stalls_ms[1:]), max(stalls_ms[1:])],
        "first_stall_ms": stalls_ms[0],
        "step_ms": statistics.median(plain_ms[1:]),
        "step_after_save_ms": statistics.median(after_ms),
        "file_mib": (folder / "last.pt").stat().st_size / 2**20,
    }


def _timed_ms(function: object, settings: SaveBenchmark) -> float:
    started = time.perf_counter()
    function()
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


@exits_on_user_error
def main() -> None:
    """Measure, print, keep."""
    settings = tyro.cli(SaveBenchmark, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    hardware = describe_hardware(settings.device)
    torch.manual_seed(0)
    training = Training(settings)
    with tempfile.TemporaryDirectory(dir=settings.work) as work:
        rows = []
        for row in ROWS:
            folder = Path(work) / row
            folder.mkdir()
            rows.append(measure(row, settings, training, folder))
    described = {"batch_size": settings.batch_size, "num_saves": settings.num_saves, "quick": settings.quick}
    publish(make_result("bench_save", hardware, described, rows), None)  # pictures are of images/s


if __name__ == "__main__":
    main()
