"""How near the losses of fp32, bf16 and, on a GPU, fp16 stay to one another: runs from one seed, and their curves.

    python -m benchmarks.precision_band                  # 300 steps of ResNet-18 at 64 px; on 2 cores some 5 minutes
    python -m benchmarks.precision_band --quick --out /tmp/band

Every run sees the same phantoms in the same order. Losses are means over windows of 20 steps. A row's
`largest_deviation` is the largest difference of total, InfoNCE or mean squared error from fp32's over all windows, as a
share of fp32's. The picture shows the adversarial game's two terms too, but which of the players is ahead differs from
run to run. Leaves precision_band-*.json and .png.
"""

import datetime as dt
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.inputs import ImageBenchmark, pack_images
from benchmarks.report import RESULTS, describe_hardware
from benchmarks.timing import say
from errors import exits_on_user_error
from model.device import AUTOCAST_DTYPES, choose_device, choose_precision
from pipeline.loader import PretrainLoader
from pipeline.packing import write_whole
from provenance import find_commit, find_versions
from settings import Settings
from training.learner import build_learner
from training.run import TERMS, loader_spec
from training.step import train_step

WINDOW_STEPS = 20
BAND = 0.1
"""The terms `HELD` of a run in bf16 or fp16 stay within this share of fp32's."""
HELD = ("total", "contrastive", "mse")
"""Not the two of the adversarial game, in which network and discriminator answer each other's smallest moves."""


@dataclass(frozen=True)
class PrecisionBand(ImageBenchmark):
    """Train in every precision from one seed and compare the losses."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    mode: Literal["di", "dir", "dira"] = "dira"
    num_steps: int | None = None
    """Default: 300, with --quick 40."""


def loss_curves(settings: Settings, device: torch.device, num_steps: int) -> dict[str, list[float]]:
    """Train; return every term's means over windows of `WINDOW_STEPS` steps."""
    learner = build_learner(settings, device)
    loader = PretrainLoader(loader_spec(settings, device))
    terms: list[torch.Tensor] = []
    while len(terms) < num_steps:
        for batch in loader:
            terms.append(train_step(learner, batch))
            learner.step += 1
    num_windows = num_steps // WINDOW_STEPS
    values = torch.stack(terms[: num_windows * WINDOW_STEPS]).reshape(num_windows, WINDOW_STEPS, -1).mean(dim=1)
    return dict(zip(TERMS[settings.mode], values.T.tolist(), strict=True))


def largest_deviation(curves: dict[str, list[float]], reference: dict[str, list[float]]) -> float:
    """The largest difference from the reference of any of `HELD` in any window, as a share of the reference."""
    return max(
        float(np.max(np.abs(np.array(curves[name]) / np.array(reference[name]) - 1)))
        for name in HELD
        if name in reference
    )


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw each term's curves of all precisions, and the band around fp32's, into a PNG."""
    names = list(curves["fp32"])
    figure = Figure(figsize=(8, 2 * len(names) + 0.5), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], names, strict=True):
        steps = WINDOW_STEPS * (0.5 + np.arange(len(curves["fp32"][name])))
        reference = np.array(curves["fp32"][name])
        axis.fill_between(
            steps, reference * (1 - BAND), reference * (1 + BAND), alpha=0.15, label=f"fp32 +- {BAND:.0%}"
        )
        for precision, terms in curves.items():
            axis.plot(steps, terms[name], label=precision)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axis.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


@exits_on_user_error
def main() -> None:
    """Train, compare, draw, keep."""
    asked = tyro.cli(PrecisionBand, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    device = choose_device(asked.device, 0)
    num_steps = asked.num_steps or (40 if asked.quick else 300)
    has_bf16 = choose_precision("auto", device) == "bf16"
    precisions = [p for p in AUTOCAST_DTYPES if (p != "bf16" or has_bf16) and (p != "fp16" or device.type == "cuda")]
    curves: dict[str, dict[str, list[float]]] = {}
    with asked.work_folder() as work:
        pack_images(asked.find_images(work), "raw-512", work / "raw-512", asked.use_cores())
        for precision in sorted(precisions, reverse=True):
            say(f"{num_steps} steps in {precision}")
            settings = Settings(
                shards=(str(work / "raw-512"),),
                mode=asked.mode,
                arch="resnet18",
                crop_size=32 if asked.quick else 64,
                batch_size=32,
                lr=0.01,
                moco_k=256,
                moco_m=0.99,
                precision=precision,
                device=device.type,
            )
            curves[precision] = loss_curves(settings, device, num_steps)
    result: dict[str, Any] = {
        "benchmark": "precision_band",
        "hardware": describe_hardware(device.type),
        "versions": find_versions(),
        "commit": find_commit(),
        "settings": asked.describe() | {"num_steps": num_steps, "window_steps": WINDOW_STEPS, "band": BAND},
        "rows": [
            {"name": precision, "largest_deviation": largest_deviation(terms, curves["fp32"]), "curves": terms}
            for precision, terms in curves.items()
        ],
    }
    out = asked.out or (None if asked.quick else RESULTS / "precision")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        stem = f"precision_band-{device.type}-{dt.datetime.now(dt.UTC).date().isoformat()}"
        write_whole(out / f"{stem}.json", (json.dumps(result, indent=1) + "\n").encode())
        draw(curves, out / f"{stem}.png")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
