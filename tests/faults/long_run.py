"""A long run at small size: what grows with time would, over days, end it."""

import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from tests.faults.report import Tally
from tests.faults.runs import CONFIGS, make_shards, read_lines, running, train_command
from tests.faults.training import new_folder

MAX_GROWTH_MIB = 30.0
"""What memory may grow by after warm-up: allocators, and the lines of metrics, which are kept for the curves."""
MAX_BYTES_PER_LINE = 2500
"""Of metrics.jsonl and TensorBoard's events together, for each line of metrics."""


class Sample(NamedTuple):
    """What the process holds after a step."""

    step: int
    memory_mib: float
    num_handles: int


def long_run(count: int, seed: int, work: Path) -> Tally:
    """Take `count` steps: memory and file handles must stay as they are after a third of them, logs in proportion."""
    tally, run_dir, config = Tally("long-run"), new_folder(work / "long-run"), CONFIGS[0]
    pace = ("--epochs", count, "--max-steps", count, "--save-every", 100, "--log-every", 10, "--seed", seed)
    samples: list[Sample] = []
    with running([*train_command(make_shards(work), run_dir, config), *map(str, pace)]) as process:
        this = psutil.Process(process.popen.pid)
        while process.popen.poll() is None:
            step = last_step(run_dir)
            try:
                samples.append(Sample(step, this.memory_info().rss / 2**20, this.num_fds()))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.2)
        status = process.wait()
    tally.count("steps", count)
    if status:
        tally.lose(f"ended with {status}: {process.words()[-500:]}")
        return tally
    warm = [sample for sample in samples if sample.step > count / 3]
    first, last = warm[: len(warm) // 3], warm[-len(warm) // 3 :]
    grown_mib = median(s.memory_mib for s in last) - median(s.memory_mib for s in first)
    num_steps = median(s.step for s in last) - median(s.step for s in first)
    logs = [run_dir / "metrics.jsonl", *(run_dir / "tensorboard").iterdir()]
    num_bytes, num_lines = sum(path.stat().st_size for path in logs), len(read_lines(run_dir))
    tally.figures |= {
        "memory_mib_after_warm_up": round(median(s.memory_mib for s in first)),
        "memory_mib_at_the_end": round(median(s.memory_mib for s in last)),
        "growth_mib_per_1000_steps": round(1000 * grown_mib / num_steps, 2),
        "file_handles_after_warm_up": median(s.num_handles for s in first),
        "file_handles_at_the_end": median(s.num_handles for s in last),
        "log_bytes_per_line": round(num_bytes / num_lines),
        "pictures": len(list((run_dir / "reconstructions").iterdir())),
    }
    if grown_mib > MAX_GROWTH_MIB:
        tally.lose(f"memory grows by {grown_mib:.1f} MiB in {num_steps:.0f} steps")
    if tally.figures["file_handles_at_the_end"] > tally.figures["file_handles_after_warm_up"]:
        tally.lose("file handles grow in number")
    if num_bytes / num_lines > MAX_BYTES_PER_LINE:
        tally.lose(f"{num_bytes / num_lines:.0f} bytes of logs for a line of metrics")
    return tally


def last_step(run_dir: Path) -> int:
    """The last step that is logged."""
    lines = read_lines(run_dir)
    return lines[-1]["step"] if lines else 0
