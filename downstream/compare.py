"""Compare initialisations over amounts of labels and seeds, in one command that goes on where it was.

    python finetune.py compare --weights random imagenet dira=runs/dira/export/resnet50.pth --amounts 1% 25% 50% 100% \
        --runs 5 -- classify SHARDS
    python finetune.py compare --weights random dir=DIR/unet.pth dira=DIRA/unet.pth --amounts 4 16 all \
        --runs 5 -- segment --images IMAGES --masks MASKS

After `--` stands a command of finetune.py without its --weights, --run-dir and --runs.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import tyro

from downstream.classify import classify
from downstream.classify_settings import ClassifySettings
from downstream.comparison import PUBLISHED, SIGNIFICANT, Cell, compare_cells, draw_chart, format_table
from downstream.localize import LocalizeSettings, localize
from downstream.runs import FREE_TO_CHANGE, write_json
from downstream.segment import SegmentSettings, segment
from errors import UsageError, UserError
from model import distributed
from rundir import claim, lock
from settings import RunSettings

OURS = ("--weights", "--run-dir", "--runs")
"""Options of the compared command that the comparison sets itself."""
WITHOUT_FILE = ("random", "imagenet")
COMMANDS = {"classify": ClassifySettings, "segment": SegmentSettings}


@dataclass(frozen=True)
class CompareSettings(RunSettings):
    """Compare initialisations over amounts of labels and seeds."""

    MAY_CHANGE: ClassVar[frozenset[str]] = FREE_TO_CHANGE | {"weights", "amounts", "baseline", "localize"}

    command: tyro.conf.Positional[tuple[str, ...]]
    """After --: what is compared, classify or segment, with its options."""
    weights: tuple[str, ...]
    """random, imagenet, or NAME=FILE of a checkpoint or export."""
    amounts: tuple[str, ...] = ("all",)
    """Of labels: all; a percentage of the training split's patients (classify); or a number of patients (classify) or
    images (segment)."""
    runs: int = 3
    """Seeds of each. They decide on initial weights, the order of the data, and which labels are used."""
    baseline: str | None = None
    """What the others are tested against; the first of --weights by default."""
    localize: bool = False
    """With classify: measure each classifier's heatmaps against the boxes of its (one) shard set too."""
    run_dir: str = "runs/compare"
    """Where everything goes. The same command goes on where it was; further weights, amounts and runs may be added."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        if not self.command or self.command[0] not in COMMANDS:
            raise UsageError(
                "end the command with: -- classify SHARDS ..., or -- segment --images IMAGES --masks MASKS"
            )
        if given := [option for option in OURS if option in self.command]:
            raise UsageError(f"{', '.join(given)} after --: the comparison sets it")
        if self.runs <= 0:
            raise UsageError(f"--runs {self.runs}: must be more than 0")
        names = list(self.sources)
        if len(names) != len(self.weights) or len(set(self.amounts)) != len(self.amounts) or not self.amounts:
            raise UsageError("--weights and --amounts: each needs a name or number of its own")
        if self.baseline is not None and self.baseline not in names:
            raise UsageError(f"--baseline {self.baseline}: is none of {', '.join(names)}")
        if self.localize and self.command[0] != "classify":
            raise UsageError("--localize goes with classify")
        for amount in self.amounts:
            self.share(amount)

    @property
    def sources(self) -> dict[str, str]:
        """What each initialisation's name stands for. Raise UsageError at names that can't be folders."""
        pairs = [(name, file or name) for name, _, file in (weights.partition("=") for weights in self.weights)]
        for name, file in pairs:
            if not re.fullmatch(r"[\w.-]+", name) or (name == file and name not in WITHOUT_FILE):
                raise UsageError(f"--weights {name}: must be random, imagenet, or NAME=FILE with a plain NAME")
        return dict(pairs)

    @property
    def device(self) -> str:
        """What the compared command runs on."""
        return self.with_weights("random").device

    def with_weights(self, source: str) -> ClassifySettings | SegmentSettings:
        """The compared command's settings. A command line that makes no sense ends the program, with status 2."""
        task, *options = self.command
        program = f"finetune.py compare ... -- {task}"
        return tyro.cli(COMMANDS[task], args=[*options, "--weights", source], prog=program)

    def share(self, amount: str) -> dict[str, Any]:
        """The compared command's settings for an amount of labels. Raise UsageError where it is none."""
        task = self.command[0]
        if amount == "all":
            return {}
        if amount.isdecimal() and int(amount) > 0:
            return {"num_patients" if task == "classify" else "num_train": int(amount)}
        if task == "classify" and re.fullmatch(r"\d+(\.\d+)?%", amount) and 0 < float(amount[:-1]) <= 100:
            return {"label_fraction": float(amount[:-1]) / 100}
        raise UsageError(f"--amounts {amount}: must be all, a number, or with classify a percentage up to 100%")


class Job(NamedTuple):
    """A cell of the table that is still to be filled."""

    init: str
    amount: str
    settings: ClassifySettings | SegmentSettings


def compare(settings: CompareSettings) -> dict[str, Any]:
    """Fill every cell of the table, then test, print, draw and save it. On ranks but 0 nothing is returned.

    Raises:
        UserError: Bad input, or a run folder that can't be used.
    """
    folder, is_main = Path(settings.run_dir), distributed.is_main()
    with lock(folder) if is_main else contextlib.nullcontext():
        if is_main:
            claim(folder, settings, {})
        jobs = plan(settings)
        if missing := [job.settings.weights for job in jobs if not is_there(job.settings.weights)]:
            raise UserError(f"{missing[0]}: there is no such file to start from")
        cells = []
        for i, job in enumerate(jobs, 1):
            with logging_to(Path(f"{job.settings.run_dir}.log")):
                scores, num_train = do_job(job.settings, with_boxes=settings.localize)
            cells.append(Cell(job.init, job.amount, scores, num_train))
            if is_main:
                shown = ", ".join(f"{name} {[round(value, 4) for value in found]}" for name, found in scores.items())
                print(f"{i} of {len(jobs)}: {job.init}, {job.amount} labels: {shown}", flush=True)
        return write_comparison(settings, cells, folder) if is_main else {}


def plan(settings: CompareSettings) -> list[Job]:
    """The compared command with each of the initialisations and amounts."""
    jobs = []
    for amount in settings.amounts:
        for name, source in settings.sources.items():
            run_dir = str(Path(settings.run_dir) / f"{name}-{amount.replace('%', 'pct')}")
            shared = {"run_dir": run_dir, "runs": settings.runs, **settings.share(amount)}
            jobs.append(Job(name, amount, replace(settings.with_weights(source), **shared)))
    return jobs


def is_there(weights: str) -> bool:
    """Whether what a job starts from can be had: better to know before the first job than before the last."""
    return weights in WITHOUT_FILE or Path(weights).exists()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Put on rank 0 what is printed into a file: a line for each epoch would bury the table."""
    with path.open("a") if distributed.is_main() else io.StringIO() as log, contextlib.redirect_stdout(log):
        yield


def do_job(settings: ClassifySettings | SegmentSettings, *, with_boxes: bool) -> tuple[dict[str, list[float]], float]:
    """Fine-tune with each seed, or read what has been done; return scores, and the mean number of labelled images."""
    results = segment(settings) if isinstance(settings, SegmentSettings) else classify(settings)
    if not distributed.is_main():
        return {}, 0.0
    runs = results["runs"]
    scores = {name: [run[name] for run in runs if run[name] is not None] for name in results["mean"]}
    if with_boxes:
        found = [locate(settings, run["seed"]) for run in runs]
        scores |= {name: [means[name] for means in found] for name in found[0]}
    return scores, sum(run["num_train"] for run in runs) / len(runs)


def locate(settings: ClassifySettings, seed: int) -> dict[str, float]:
    """How well a classifier's heatmaps find the boxes: means over the findings. What has been done is only read."""
    folder = Path(settings.run_dir) / f"seed-{seed}"
    results = folder / "localize" / "results.json"
    if not results.exists():
        (shards,) = settings.shards
        weights = str(folder / "classifier.pt")
        localize(LocalizeSettings(shards, weights=weights, run_dir=str(results.parent), device=settings.device))
    return json.loads(results.read_text())["mean"]


def write_comparison(settings: CompareSettings, cells: list[Cell], folder: Path) -> dict[str, Any]:
    """Write comparison.md, .json and a chart for each metric; print and return them."""
    baseline = settings.baseline or next(iter(settings.sources))
    metrics = list(dict.fromkeys(name for cell in cells for name in cell.scores))
    tables = {metric: compare_cells(cells, metric, baseline) for metric in metrics}
    for metric, rows in tables.items():
        draw_chart(folder / f"{metric}.png", rows, metric)
    heading = (
        f"`{' '.join(settings.command)}`: mean ± deviation over {settings.runs} seeds. p: Welch's t-test against "
        f"{baseline}, as false discovery rate over a table's tests (Benjamini-Hochberg); * below {SIGNIFICANT}.\n"
    )
    shown = [format_table(rows, metric, baseline) for metric, rows in tables.items()]
    text = "\n".join([heading, *shown, PUBLISHED[settings.command[0]]])
    print(text, flush=True)
    (folder / "comparison.md").write_text(text)
    content = {"command": list(settings.command), "baseline": baseline, "metrics": tables}
    write_json(folder / "comparison.json", content)
    return content
