"""What the commands of fine-tuning share: what may change in a run, scores over several runs, files written whole."""

import json
import statistics
from pathlib import Path
from typing import Any

FREE_TO_CHANGE = frozenset({"run_dir", "device", "data_threads", "runs"})
"""Settings that do not make it another run."""


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (of a sample) of every score, over the runs; one run alone has no deviation.

    Scores are the entries whose names end in `mean_auc`.
    """
    values = {name: [run[name] for run in runs] for name in runs[0] if name.endswith("mean_auc")}
    return {
        "mean": {name: statistics.fmean(found) for name, found in values.items()},
        "std": {name: statistics.stdev(found) if len(found) > 1 else None for name, found in values.items()},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is, whatever happens, either the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
