"""How all benchmarks measure: rows in turn, each in a process of its own; medians, CPU time, peak memory.

It imports little, for what it imports counts towards what is measured.
"""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from errors import UserError

ROOT = Path(__file__).parent.parent
Figures = dict[str, float]
"""One measurement of one row: `images_per_second` and whatever else, named with its unit."""


def measure_in_turn(names: Sequence[str], repeats: int, measure: Callable[[str], Figures]) -> list[dict[str, Figures]]:
    """Measure every row `repeats` times: a, b, c, a, b, c, so that the machine's drift hits all rows alike.

    Returns:
        A list of rounds, each with the figures of every row by name.
    """
    rounds: list[dict[str, Figures]] = []
    for i in range(repeats):
        rounds.append({})
        for name in names:
            rounds[i][name] = measure(name)
            say(f"round {i + 1} of {repeats}: {name}: {rounds[i][name]['images_per_second']:.1f} images/s")
    return rounds


def say(line: str) -> None:
    """Tell on standard error how far things are; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def summarise(rounds: list[dict[str, Figures]], baseline: str) -> list[dict[str, Any]]:
    """Turn rounds into rows: the median of every figure, and `spread`, lowest and highest images/s.

    Where there is a row `baseline`, `ratio_to_BASELINE` is the median of the ratios within each round.
    """
    rows = []
    for name in rounds[0]:
        of_row = [figures[name] for figures in rounds]
        speeds = [figures["images_per_second"] for figures in of_row]
        row: dict[str, Any] = {"name": name, "images_per_second": statistics.median(speeds)}
        row["spread"] = [min(speeds), max(speeds)]
        if baseline in rounds[0]:
            baseline_speeds = [figures[baseline]["images_per_second"] for figures in rounds]
            ratios = [speed / reference for speed, reference in zip(speeds, baseline_speeds, strict=True)]
            row[f"ratio_to_{baseline.replace('-', '_')}"] = statistics.median(ratios)
        medians = {figure: statistics.median(figures[figure] for figures in of_row) for figure in of_row[0]}
        rows.append(row | {figure: value for figure, value in medians.items() if figure not in row})
    return rows


def in_fresh_process(function: str, num_ranks: int = 1, **arguments: Any) -> Figures:
    """Call a function, named `module:function`, in a Python process whose imports and memory are its own.

    Arguments and result travel as JSON. With several ranks, torchrun calls it in as many processes, which must agree.

    Raises:
        UserError: As it does; if it fails otherwise, with the last line that it wrote to standard error.
    """
    module, name = function.split(":")
    # In one write, end of line and all: several ranks share the pipe, and Python may be unbuffered.
    code = f"import json, sys; from {module} import {name} as f; result = json.dumps(f(**json.loads(sys.argv[1])))"
    code += "; sys.stdout.write(result + chr(10))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    if num_ranks > 1:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "--no-python")
        command = [sys.executable, *torchrun, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        users = [match[1] for line in lines if (match := re.search(r"errors\.U\w+Error: (.*)", line))]
        raise UserError(users[0] if users else f"{function}, called with {json.dumps(arguments)}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def cpu_seconds() -> float:
    """Return the CPU time, user and system, that this process and its children have used so far (10 ms ticks)."""
    return sum(sum(process.cpu_times()[:4]) for process in _process_tree())


def peak_memory_mib() -> float:
    """Return the peak resident memory of this process and its living children; pages that they share count once.

    It adds up, over the processes, what each holds now and how far that is below its own peak: exact for one process,
    and for several as if all had their peaks at once.
    """
    total_bytes = 0
    for process in _process_tree():
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak_kib, now_kib = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmHWM", "VmRSS"))
        total_bytes += process.memory_full_info().pss + 1024 * (peak_kib - now_kib)
    return total_bytes / 2**20


def _process_tree() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]
