"""What the commands of fine-tuning share: what may change in a run, scores over several runs, files written whole."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.packing import write_whole

FREE_TO_CHANGE = frozenset({"run_dir", "device", "data_threads", "runs"})
"""Settings that do not make it another run."""


def summarise(runs: list[dict[str, Any]], names: Iterable[str]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (of a sample) of these scores, over the runs that have them.

    One run alone has no deviation; a score that no run has is left out.
    """
    values = {name: [run[name] for run in runs if run[name] is not None] for name in names}
    values = {name: found for name, found in values.items() if found}
    return {
        "mean": {name: statistics.fmean(found) for name, found in values.items()},
        "std": {name: statistics.stdev(found) if len(found) > 1 else None for name, found in values.items()},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is, whatever happens, either the old one or the new one."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
