"""Images/s of the training step alone, on a synthetic batch on the device, against the plain step.

    python -m benchmarks.bench_step                      # this CPU or GPU, ResNet-50 at 224; on 2 cores some 12 minutes
    python -m benchmarks.bench_step --batch-sizes 256 16 --rows dira-plain dira-bf16 dira-bf16-compile dira-bf16-graphs
    python -m benchmarks.bench_step --quick              # does everything run?

Each row is measured in a process of its own, the rows in turn, several times over; figures are medians. A row is
MODE-plain, or MODE-PRECISION and, after further dashes, `compile` for --compile and `graphs` for --cuda-graphs.

plain is the step as one writes it first (benchmarks/plain_step.py): the same losses and weights, none of the shortcuts.
An image is one radiograph. The parts of a step are timed by CUDA events on a GPU and by the clock on a CPU; of several
ranks, backward includes what it waits for the gradients' averages. `share_of_matmul_peak` is the rate of counted
multiplications and additions over the rate of a large matrix product, measured in the same process and precision.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.report import RESULTS, describe_hardware, make_result, publish
from benchmarks.timing import Figures, in_fresh_process, measure_in_turn, summarise
from errors import UsageError, exits_on_user_error
from model.device import choose_device, choose_precision
from settings import Settings

FLAGS = {"compile": "compile", "graphs": "cuda_graphs"}


@dataclass(frozen=True)
class StepBenchmark:
    """Measure the training step."""

    rows: tuple[str, ...] = ()
    """What to measure. Default: dir and dira, plain and in every precision that suits the device."""
    batch_sizes: tuple[int, ...] = ()
    """Images in a step. Default: 8 on a CPU, 256 and 16 on a GPU; they must divide --moco-k's 65536."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    crop_size: int = 224
    key_bn_groups: int = 4
    """As in train.py."""
    seconds: float | None = None
    """Time to measure a row for, in each round. Default: 10, with --quick 0.2."""
    repeats: int | None = None
    """Rounds, in each of which every row is measured once. Default: 3, with --quick 1."""
    quick: bool = False
    """A small network, little time: shows that everything runs. Keeps no report unless --out is given."""
    out: Path | None = None
    """Folder for the report. Default: benchmarks/results."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        for size in self.batch_sizes:
            if size < 2 or 65536 % size:
                raise UsageError(f"--batch-sizes {size}: must be a power of two")
        for row in self.rows:
            self.settings_of(row, 8)

    def settings_of(self, row: str, batch_size: int) -> Settings:
        """Settings of a row; raise UsageError where there is no such row."""
        mode, _, rest = row.partition("-")
        kind, *flags = rest.split("-")
        if mode not in {"di", "dir", "dira"} or kind not in {"plain", "fp32", "bf16", "fp16"} or {*flags} - {*FLAGS}:
            raise UsageError(f"--rows {row}: such as dir-plain, dir-fp32, dira-bf16 or dira-bf16-compile-graphs")
        if kind == "plain" and (flags or mode == "di"):
            raise UsageError(f"--rows {row}: the plain step is {'for dir and dira' if mode == 'di' else 'never that'}")
        small = {"arch": "resnet18", "crop_size": 32} if self.quick else {}
        return Settings(
            shards=("synthetic",),
            mode=mode,
            batch_size=batch_size,
            precision="fp32" if kind == "plain" else kind,
            device=self.device,
            key_bn_groups=self.key_bn_groups,
            **{"arch": self.arch, "crop_size": self.crop_size} | small,
            **{FLAGS[flag]: True for flag in flags},
        )


def group_by_plain(rounds: list[dict[str, Figures]], groups: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of all groups, each with its ratio to its own group's `plain` row, in the order of the groups.

    A row's name is its group, a dash and its kind: `dir-plain` and `dir-bf16` are of group `dir`.
    """
    rows = []
    for group in groups:
        prefix = f"{group}-"
        of_group = [
            {name.removeprefix(prefix): figures for name, figures in measured.items() if name.startswith(prefix)}
            for measured in rounds
        ]
        rows += [row | {"name": f"{group}-{row['name']}"} for row in summarise(of_group, baseline="plain")]
    return rows


def default_rows(device: str) -> tuple[str, ...]:
    """Both modes of the published schedule, plain and in what suits the device."""
    best = choose_precision("auto", choose_device(device, 0))
    kinds = ["plain", "fp32", *([best] if best != "fp32" else [])]
    if device == "cuda":
        kinds += [f"{best}-compile", f"{best}-graphs"]
    return tuple(f"{mode}-{kind}" for mode, kind in itertools.product(("dir", "dira"), kinds))


@exits_on_user_error
def main() -> None:
    """Measure, print, keep."""
    asked = tyro.cli(StepBenchmark, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    device = choose_device(asked.device, 0).type
    batch_sizes = asked.batch_sizes or ((256, 16) if device == "cuda" and not asked.quick else (8,))
    names = {}
    for batch_size, row in itertools.product(batch_sizes, asked.rows or default_rows(device)):
        mode, _, kind = row.partition("-")
        group = f"{mode}-{batch_size}" if len(batch_sizes) > 1 else mode
        names[f"{group}-{kind}"] = (group, row, batch_size)
    seconds = asked.seconds or (0.2 if asked.quick else 10.0)

    def measure(name: str) -> Figures:
        _, row, batch_size = names[name]
        settings = asked.settings_of(row, batch_size).to_dict()
        return in_fresh_process(
            "benchmarks.step_row:measure", settings=settings, seconds=seconds, is_plain=row.endswith("-plain")
        )

    repeats = asked.repeats or (1 if asked.quick else 3)
    rounds = measure_in_turn(list(names), repeats, measure)
    rows = group_by_plain(rounds, dict.fromkeys(group for group, _, _ in names.values()))
    described = {
        "arch": "resnet18" if asked.quick else asked.arch,
        "crop_size_px": 32 if asked.quick else asked.crop_size,
        "key_bn_groups": asked.key_bn_groups,
        "repeats": repeats,
        "seconds": seconds,
    }
    out = asked.out or (None if asked.quick else RESULTS)
    publish(make_result("bench_step", describe_hardware(device), described, rows), out)


if __name__ == "__main__":
    main()
