"""The run folder: who may write in it, and its config, metrics, curves, pictures and checkpoints."""

import fcntl
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from errors import Unfinished, UserError
from pipeline.packing import write_whole
from provenance import find_commit, find_versions
from settings import RunSettings

SECONDS_BETWEEN_CURVES = 60


def lock(folder: Path) -> TextIO:
    """Take the folder for as long as the returned file is open; a process that dies lets go of it.

    Raises:
        UserError: Another run has it, or it can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"run folder {folder}: {error.strerror}: choose another --run-dir") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"run folder {folder} is in use by another run: wait for it, or use another --run-dir"
        ) from None
    return file


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise what keeps us from writing in the run folder as Unfinished: when it is mended, the run goes on."""
    try:
        yield
    except OSError as error:
        raise Unfinished(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); "
            "mend it, and the same command goes on from the last save"
        ) from None


def check_config(folder: Path, settings: RunSettings) -> None:
    """Raise UserError where the folder holds another run."""
    path = folder / "config.json"
    if path.exists():
        try:
            saved = json.loads(path.read_text())["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no config.json of a run: use another --run-dir") from None
        settings.refuse_other(settings.from_dict(saved, str(path)), str(path))


def write_config(folder: Path, settings: RunSettings, chosen: dict[str, Any]) -> None:
    """Write every setting, what was chosen for the automatic ones, versions and the git commit."""
    config = {
        "settings": settings.to_dict(),
        "chosen": chosen,
        "versions": find_versions(),
        "git_commit": find_commit(),
        "command": [sys.executable, *sys.argv],
    }
    write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def claim(folder: Path, settings: RunSettings, chosen: dict[str, Any]) -> None:
    """Make the folder this run's, or raise UserError where it holds another."""
    check_config(folder, settings)
    write_config(folder, settings, chosen)


class RunLog:
    """Metrics as lines of JSON, TensorBoard events and curves; a progress bar on a terminal, plain lines elsewhere.

    On ranks other than the main one it does nothing.
    """

    def __init__(self, folder: Path, *, first_step: int, num_steps: int, is_main: bool) -> None:
        """Open the folder's logs; what an interrupted run logged after `first_step` will come again and is dropped."""
        self._folder = folder
        self._is_main = is_main
        if not is_main:
            return
        self._path = folder / "metrics.jsonl"
        self.lines = [line for line in read_metrics(self._path) if line["step"] <= first_step]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty())
        self._curves_drawn_at = time.monotonic()

    def advance(self) -> None:
        """Advance the progress bar."""
        if self._is_main:
            self._bar.update()

    def say(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self._is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def write(self, line: dict[str, Any]) -> None:
        """Log one line; `phase` says which of train and val it is."""
        if not self._is_main:
            return
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        values = {name: value for name, value in line.items() if isinstance(value, float)}
        for name, value in values.items():
            self._events.add_scalar(f"{line['phase']}/{name}", value, line["step"])
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"{line['phase']:5}  epoch {line['epoch']}  step {line['step']}  {shown}")

    def write_reconstructions(self, step: int, query: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
        """Save input, output and target, [N, 1, H, W] in 0..1 each, as the three rows of a picture."""
        if self._is_main:
            folder = self._folder / "reconstructions"
            folder.mkdir(exist_ok=True)
            save_image(torch.cat([query, output, target]), folder / f"step-{step:07d}.png", nrow=len(query))

    def draw_curves(self, *, now: bool = False) -> None:
        """Draw every term of the loss over the steps, unless it was done a moment ago."""
        if not self._is_main or (not now and time.monotonic() < self._curves_drawn_at + SECONDS_BETWEEN_CURVES):
            return
        self._curves_drawn_at = time.monotonic()
        draw_curves(self.lines, self._folder / "curves.png")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            self._bar.close()
            self._events.close()
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last one that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss terms, training and validation, and the learning rate and speed, over the steps."""
    names = ("total", "contrastive", "mse", "adversarial", "discriminator", "lr", "images_per_second")
    names += ("queue_similarity", "probe_knn_auc", "probe_linear_auc")
    names = [name for name in names if any(name in line for line in lines)]
    figure = Figure(figsize=(8, 2.2 * len(names) + 0.5))
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)
    for name, axis in zip(names, axes[:, 0], strict=True):
        for phase, style in (("train", "-"), ("val", "o-")):
            points = [(line["step"], line[name]) for line in lines if line["phase"] == phase and name in line]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=3, label=phase)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
