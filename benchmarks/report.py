"""What a benchmark leaves, and pictures of it: images/s over the kept results, by benchmark, machine, row and date.

python -m benchmarks.report
python -m benchmarks.report --results benchmarks/results --out images_per_second.png
"""

import datetime as dt
import io
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from errors import UserError, exits_on_user_error
from pipeline.packing import write_whole
from provenance import find_commit, find_versions

RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]
"""`benchmark`, `date`, `hardware`, `versions`, `commit`, `settings` and `rows`, as JSON."""


# --- what a benchmark leaves ----------------------------------------------------------------------------------------


def make_result(
    benchmark: str, hardware: dict[str, Any], settings: dict[str, Any], rows: list[dict[str, Any]]
) -> Result:
    """Put together all that there is to say about a run of a benchmark that has just ended."""
    return {
        "benchmark": benchmark,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": hardware,
        "versions": find_versions(),
        "commit": find_commit(),
        "settings": settings,
        "rows": rows,
    }


def describe_hardware(device: str) -> dict[str, Any]:
    """Return the CPU, the cores this process may use, the memory, how busy the machine is and, for cuda, the GPUs.

    Raises:
        UserError: If there is no GPU that one could use.
    """
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    hardware = {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError):
            raise UserError(
                "--device cuda: nvidia-smi finds no GPU; leave the option out, or mend the driver"
            ) from None
        hardware["gpu"], hardware["driver"] = gpus[0].split(", ")
        hardware["gpus"] = len(gpus)
    return hardware


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a Markdown table with a column for each figure that any row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    lines += [[_format(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _format(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_format, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def publish(result: Result, out: Path | None) -> None:
    """Print a result's table and, last, the result as one line of JSON; with `out`, keep it there.

    It is kept as .json, .md and .png, named by theme, hardware and date.
    """
    print(format_table(result["rows"]))
    if out:
        print(f"\nkept as {keep(result, out)}.md, .json and .png")
    print(json.dumps(result), flush=True)


def keep(result: Result, out: Path) -> Path:
    """Write a result's files into the folder `out`; return their path without an ending."""
    hardware = result["hardware"]
    machine = f"{hardware.get('gpu') or hardware['cpu']} {hardware['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    stem = out / f"{result['benchmark'].removeprefix('bench_')}-{slug}-{result['date']}"
    facts = {**hardware, **result["settings"], **result["versions"], "commit": result["commit"]}
    markdown = [
        f"# {result['benchmark']}, {result['date']}",
        format_table(result["rows"]),
        f"![images/s]({stem.name}.png)",
        "\n".join(f"* {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{stem.name}.md", ("\n\n".join(markdown) + "\n").encode())
    write_whole(out / f"{stem.name}.json", (json.dumps(result, indent=1) + "\n").encode())
    draw_results([result], out / f"{stem.name}.png")
    return stem


# --- pictures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportSettings:
    """Draw images/s over the kept results."""

    results: Path = RESULTS
    """Folder of the benchmarks' JSON files."""
    out: Path | None = None
    """The PNG to draw; images_per_second.png in that folder by default."""


def read_results(folder: Path) -> list[Result]:
    """Return the results kept in a folder, oldest first.

    Raises:
        UserError: If there is none, or a JSON file in there is something else.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_bytes())
            panel_title(result), result["date"], [(row["name"], row["images_per_second"]) for row in result["rows"]]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path}: no result of a benchmark; take it out of the folder") from None
        results.append(result)
    if not results:
        raise UserError(f"{folder}: holds no results; run a benchmark first, such as python -m benchmarks.bench_loader")
    return sorted(results, key=lambda result: result["date"])


def panel_title(result: Result) -> str:
    """Return what results must share to be comparable: the benchmark and the machine."""
    hardware = result["hardware"]
    gpu = f"{hardware['gpu']}, " if "gpu" in hardware else ""
    return f"{result['benchmark'].removeprefix('bench_')}: {gpu}{hardware['cpu']}, {hardware['cores']} cores"


def draw_results(results: list[Result], path: Path) -> None:
    """Draw results, given oldest first, into a PNG: a panel for each benchmark and machine."""
    panels: dict[str, list[Result]] = {}
    for result in results:
        panels.setdefault(panel_title(result), []).append(result)
    heights = [1.0 + 0.3 * sum(len(result["rows"]) for result in group) for group in panels.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, group) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, group)
        axis.set_title(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


def _draw_panel(axis: Axes, results: list[Result]) -> None:
    """Draw a bar for each row and date, with whiskers from lowest to highest."""
    names = list(dict.fromkeys(row["name"] for result in results for row in result["rows"]))
    height = 0.8 / len(results)
    for i, result in enumerate(results):
        rows = result["rows"]
        place = np.array([names.index(row["name"]) for row in rows]) + height * (i - (len(results) - 1) / 2)
        speed = np.array([row["images_per_second"] for row in rows])
        low, high = np.array([row.get("spread", [row["images_per_second"]] * 2) for row in rows]).T
        # where there are several GPUs, what each does
        per_gpu = np.array([row.get("images_per_second_per_gpu", row["images_per_second"]) for row in rows]) / speed
        whiskers = np.array([speed - low, high - speed]) * per_gpu
        label = f"{result['date']} {(result.get('commit') or '')[:7]}"
        bars = axis.barh(place, speed * per_gpu, 0.9 * height, xerr=whiskers, capsize=2, label=label)
        ratios = [next((f"{v:.3g}x" for key, v in row.items() if key.startswith("ratio_to_")), "") for row in rows]
        texts = [f"{value:.4g}   {ratio}" for value, ratio in zip(speed * per_gpu, ratios, strict=True)]
        axis.bar_label(bars, texts, padding=4, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("images/s" + (" per GPU" if "gpu" in results[0]["hardware"] else ""))
    axis.grid(axis="x", alpha=0.3)
    if len(results) > 1:
        axis.legend(fontsize=8)


@exits_on_user_error
def main() -> None:
    """Draw what the command line asks for."""
    settings = tyro.cli(ReportSettings, description=__doc__)
    out = settings.out or settings.results / "images_per_second.png"
    draw_results(read_results(settings.results), out)
    print(out)


if __name__ == "__main__":
    main()
