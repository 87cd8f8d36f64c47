"""How well a mask is predicted: Dice, IoU and the Hausdorff distance at 95%."""

from typing import NamedTuple

import numpy as np
import segmentation_models_pytorch.metrics as smp_metrics
import torch
from scipy import ndimage


class MaskScores(NamedTuple):
    """How a predicted mask compares with the true one."""

    dice: float
    """2 TP / (2 TP + FP + FN); 1 where both masks are empty."""
    iou: float
    """TP / (TP + FP + FN); 1 where both masks are empty."""
    hausdorff95_px: float | None
    """As in `hausdorff_95`."""


class PooledScores(NamedTuple):
    """The scores of the pixels of all images together."""

    dice: float
    iou: float


def score_mask(prediction: np.ndarray, truth: np.ndarray, pixel_size_px: tuple[float, float] = (1, 1)) -> MaskScores:
    """Compare two masks, bool [H, W]; `pixel_size_px` as in `hausdorff_95`."""
    dice, iou = _dice_and_iou(prediction[None], truth[None])
    return MaskScores(dice, iou, hausdorff_95(prediction, truth, pixel_size_px))


def pool_scores(predictions: np.ndarray, truths: np.ndarray) -> PooledScores:
    """Compare masks, bool [N, H, W], as if they were one: large masks weigh more than in a mean over images."""
    return PooledScores(*_dice_and_iou(predictions, truths))


def hausdorff_95(
    prediction: np.ndarray, truth: np.ndarray, pixel_size_px: tuple[float, float] = (1, 1)
) -> float | None:
    """The distance within which 95% of either outline lie from the other; 0 where both masks are empty.

    The larger of the two directed distances' 95th percentiles, as MONAI and the segmentation challenges have it. An
    outline is what a cross of 3 x 3 px erodes, so it lies inside its mask.

    Args:
        prediction: bool [H, W].
        truth: bool [H, W].
        pixel_size_px: Height and width of these pixels in pixels of the original image, the result's unit.

    Returns:
        None where only one of the masks is empty: then there is no distance.
    """
    if not prediction.any() or not truth.any():
        return None if prediction.any() or truth.any() else 0.0
    outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (prediction, truth)]
    to_outline = [ndimage.distance_transform_edt(~outline, sampling=pixel_size_px) for outline in outlines]
    directed = (to_outline[1][outlines[0]], to_outline[0][outlines[1]])
    return float(max(np.percentile(distances, 95) for distances in directed))


def _dice_and_iou(predictions: np.ndarray, truths: np.ndarray) -> tuple[float, float]:
    masks = [torch.from_numpy(np.ascontiguousarray(m, np.uint8))[:, None].long() for m in (predictions, truths)]
    counts = smp_metrics.get_stats(*masks, mode="binary")  # true and false positives, false and true negatives, [N, 1]
    # "macro" is "micro" where there is one class, but for empty masks: to them "micro" gives no number
    scores = (
        score(*counts, reduction="macro", zero_division=1.0) for score in (smp_metrics.f1_score, smp_metrics.iou_score)
    )
    dice, iou = (float(score) for score in scores)
    return dice, iou
