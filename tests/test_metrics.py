import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.stats import rankdata

from downstream.metrics import auc, draw_roc_curves

NAMES = ("Mass", "Nodule", "Hernia", "Edema")


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores [200, 4]: the first two have both classes, the third none, the fourth only positives."""
    rng = np.random.default_rng(0)
    labels = np.stack([rng.random(200) < 0.3, rng.random(200) < 0.1, np.zeros(200), np.ones(200)], axis=1).astype(int)
    scores = np.round(rng.random((200, 4)) + 0.3 * labels, 1)  # with ties
    return labels, scores


def mann_whitney(labels: np.ndarray, scores: np.ndarray) -> float:
    """The probability that a positive has a higher score than a negative, from the sum of ranks."""
    num_positive = labels.sum()
    rank_sum = rankdata(scores)[labels == 1].sum()
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * (len(labels) - num_positive))


def test_auc_is_the_mann_whitney_statistic_of_each_finding(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    areas = auc(labels, scores, NAMES)
    expected = {name: mann_whitney(labels[:, i], scores[:, i]) for i, name in enumerate(NAMES[:2])}
    assert areas.by_finding == pytest.approx(expected)
    assert areas.mean == pytest.approx(sum(expected.values()) / 2)


def test_findings_of_one_class_only_are_named_and_left_out_of_the_mean(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    assert auc(labels, scores, NAMES).left_out == ["Hernia", "Edema"]
    nothing = auc(labels[:, 2:], scores[:, 2:], NAMES[2:])
    assert math.isnan(nothing.mean)
    assert nothing.by_finding == {}


def test_curves_are_drawn_for_the_findings_that_have_one(case: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    labels, scores = case
    draw_roc_curves(tmp_path / "all.png", labels, scores, NAMES)
    draw_roc_curves(tmp_path / "none.png", labels[:, 2:], scores[:, 2:], NAMES[2:])
    colours = [
        len(np.unique(cv2.imread(str(tmp_path / name)).reshape(-1, 3), axis=0)) for name in ("all.png", "none.png")
    ]
    assert colours[0] > 2 * colours[1]
