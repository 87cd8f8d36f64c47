"""How good predicted probabilities of findings are: area under the ROC curve, by finding and on average."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score, roc_curve


class Auc(NamedTuple):
    """Areas under the ROC curve, 0..1."""

    mean: float
    """Over `by_finding`; NaN where that is empty."""
    by_finding: dict[str, float]
    left_out: list[str]
    """Findings that all samples have, or none: there is no curve."""


def auc(labels: np.ndarray, scores: np.ndarray, names: tuple[str, ...]) -> Auc:
    """Area under the ROC curve of every finding and their mean.

    Args:
        labels: 0 or 1, [N, number of findings].
        scores: Of any scale, [N, number of findings]: the higher, the more likely.
        names: The findings.
    """
    has_both = [len(np.unique(labels[:, i])) == 2 for i in range(len(names))]
    values = {name: float(roc_auc_score(labels[:, i], scores[:, i])) for i, name in enumerate(names) if has_both[i]}
    mean = sum(values.values()) / len(values) if values else math.nan
    return Auc(mean, values, [name for i, name in enumerate(names) if not has_both[i]])


def draw_roc_curves(path: Path, labels: np.ndarray, scores: np.ndarray, names: tuple[str, ...]) -> None:
    """Draw a PNG of the ROC curve of each finding that has one; arguments as in `auc`."""
    areas = auc(labels, scores, names)
    figure = Figure(figsize=(7, 6))
    axis = figure.subplots()
    for i, name in enumerate(names):
        if name in areas.by_finding:
            false_positive_rate, true_positive_rate, _ = roc_curve(labels[:, i], scores[:, i])
            axis.plot(false_positive_rate, true_positive_rate, label=f"{name} {areas.by_finding[name]:.3f}")
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axis.set(xlabel="false positive rate", ylabel="true positive rate", title=f"mean AUC {areas.mean:.4f}")
    axis.set_aspect("equal")
    if areas.by_finding:
        axis.legend(fontsize="small", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
