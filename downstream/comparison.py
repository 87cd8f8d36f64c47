"""Scores of several initialisations side by side: tests, tables, charts, and the figures that have been published."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import false_discovery_control, ttest_ind

SIGNIFICANT = 0.05

PUBLISHED = {
    "classify": """\
Published (DiRA, CVPR 2022; ResNet-50, 224 px; mean AUC in %, means over runs):

| weights | ChestX-ray14 | CheXpert |
| --- | --- | --- |
| random | 80.31 | 86.62 |
| ImageNet, supervised | 81.70 | 87.17 |
| DiRA (MoCo-v2) | 81.12 | 87.59 |

| labels, ChestX-ray14 | 1% | 25% | 50% |
| --- | --- | --- | --- |
| MoCo-v2 | 52.99 | 74.89 | 76.71 |
| DiRA (MoCo-v2) | 59.39 | 77.55 | 78.74 |
""",
    "segment": """\
Published (DiRA, CVPR 2022; ResNet-50 U-Net, 224 px; Dice in %, means over runs):

| weights | SIIM-ACR | Montgomery |
| --- | --- | --- |
| random | 67.54 | 97.55 |
| ImageNet, supervised | 67.93 | 98.19 |
| DiRA (MoCo-v2) | 69.24 | 98.24 |

| labels, Montgomery | 1% | 25% | 50% |
| --- | --- | --- | --- |
| MoCo-v2 | 63.69 | 96.44 | 97.60 |
| DiRA (MoCo-v2) | 72.53 | 97.06 | 98.14 |
""",
}


class Cell(NamedTuple):
    """One initialisation with one amount of labels."""

    init: str
    amount: str
    scores: dict[str, list[float]]
    """Of each metric, a score for each seed; where a run has none, it is left out."""
    num_train: float
    """Labelled images, the mean over the seeds."""


def mean_and_std(scores: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample, NaN where there are too few."""
    mean = statistics.fmean(scores) if scores else math.nan
    return mean, statistics.stdev(scores) if len(scores) > 1 else math.nan


def welch(ours: list[float], baseline: list[float]) -> float:
    """Two-sided p-value of Welch's t-test; NaN where there are too few scores or all are the same."""
    if min(len(ours), len(baseline)) < 2 or max(np.ptp(ours), np.ptp(baseline)) < 1e-9:
        return math.nan
    return float(ttest_ind(ours, baseline, equal_var=False).pvalue)


def compare_cells(cells: list[Cell], metric: str, baseline: str) -> list[dict[str, Any]]:
    """Every cell's mean, standard deviation and test against the baseline with the same amount of labels.

    `p` is Welch's; `p_corrected` holds the false discovery rate over all tests of this metric (Benjamini and Hochberg,
    1995). Both are None where there is nothing to test.
    """
    of_baseline = {cell.amount: cell.scores.get(metric, []) for cell in cells if cell.init == baseline}
    p_values = [
        math.nan if cell.init == baseline else welch(cell.scores.get(metric, []), of_baseline[cell.amount])
        for cell in cells
    ]
    tested = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected = dict(zip(tested, false_discovery_control([p_values[i] for i in tested]), strict=True)) if tested else {}
    rows = []
    for i, (cell, p) in enumerate(zip(cells, p_values, strict=True)):
        mean, std = mean_and_std(cell.scores.get(metric, []))
        rows.append(
            {
                "weights": cell.init,
                "labels": cell.amount,
                "num_train": cell.num_train,
                "scores": cell.scores.get(metric, []),
                "mean": None if math.isnan(mean) else mean,
                "std": None if math.isnan(std) else std,
                "p": p if i in corrected else None,
                "p_corrected": float(corrected[i]) if i in corrected else None,
            }
        )
    return rows


def format_table(rows: list[dict[str, Any]], metric: str, baseline: str) -> str:
    """Markdown: a line for each amount of labels, a column for each initialisation. Shares are in percent."""
    inits, amounts = unique(row["weights"] for row in rows), unique(row["labels"] for row in rows)
    scale = scale_of(metric)
    lines = [
        f"| {title(metric)} | images | {' | '.join(inits)} |",
        f"| {' | '.join(['---'] * (len(inits) + 2))} |",
    ]
    for amount in amounts:
        of_amount = {row["weights"]: row for row in rows if row["labels"] == amount}
        texts = [_cell_text(of_amount[init], scale) for init in inits]
        lines.append(f"| {amount} | {of_amount[baseline]['num_train']:.0f} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _cell_text(row: dict[str, Any], scale: float) -> str:
    if row["mean"] is None:
        return "none"
    text = f"{scale * row['mean']:.2f}"
    if row["std"] is not None:
        text += f" ± {scale * row['std']:.2f}"
    if row["p_corrected"] is not None:
        star = "*" if row["p_corrected"] < SIGNIFICANT else ""
        text += f" (p {row['p_corrected']:.2g}{star})"
    return text


def draw_chart(path: Path, rows: list[dict[str, Any]], metric: str) -> None:
    """Draw a PNG of bars with the standard deviations as error bars, grouped by the amount of labels."""
    inits, amounts = unique(row["weights"] for row in rows), unique(row["labels"] for row in rows)
    scale, width = scale_of(metric), 0.8 / len(inits)
    figure = Figure(figsize=(max(5, 1 + 0.5 * len(inits) * len(amounts)), 4), layout="constrained")
    axis = figure.subplots()
    shown = []
    for i, init in enumerate(inits):
        of_init = {row["labels"]: row for row in rows if row["weights"] == init}
        means = [scale * (of_init[amount]["mean"] or 0) for amount in amounts]
        errors = [scale * (of_init[amount]["std"] or 0) for amount in amounts]
        axis.bar(np.arange(len(amounts)) + i * width, means, width, yerr=errors, capsize=3, label=init)
        shown += [value for mean, error in zip(means, errors, strict=True) for value in (mean - error, mean + error)]
    low, high = min(shown), max(shown)
    margin = 0.15 * (high - low) or 1.0
    axis.set_ylim(low - margin, high + margin)  # bars don't begin at 0: differences are small beside the scores
    axis.set_xticks(np.arange(len(amounts)) + width * (len(inits) - 1) / 2, amounts)
    axis.set(xlabel="labels", ylabel=title(metric))
    figure.legend(loc="outside upper center", ncols=min(4, len(inits)))
    figure.savefig(path, dpi=110)


def title(metric: str) -> str:
    """A metric's name and unit."""
    return metric if metric.endswith("_px") else f"{metric}, %"


def scale_of(metric: str) -> float:
    """From what is saved to what is shown."""
    return 1.0 if metric.endswith("_px") else 100.0


def unique(names: Any) -> list[str]:
    """In the order of their first appearance."""
    return list(dict.fromkeys(names))
