import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage

from downstream.segment_metrics import hausdorff_95, pool_scores, score_mask


def disc(radius_px: float, centre: tuple[float, float] = (64, 64)) -> np.ndarray:
    y, x = np.ogrid[:128, :128]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius_px**2


def square(left_px: int) -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[10:30, left_px : left_px + 20] = True
    return mask


def blob(seed: int) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(60, 90)), 5)
    return noise > noise.std()


def test_concentric_discs_have_the_scores_of_their_areas_and_the_distance_of_their_radii() -> None:
    scores = score_mask(disc(30), disc(40))
    assert scores.dice == pytest.approx(2 * 30**2 / (30**2 + 40**2), abs=0.005)
    assert scores.iou == pytest.approx(30**2 / 40**2, abs=0.005)
    assert scores.hausdorff95_px == pytest.approx(10, abs=0.5)


def test_a_square_shifted_by_a_quarter_overlaps_by_three_quarters() -> None:
    scores = score_mask(square(10), square(15))
    assert (scores.dice, scores.iou) == pytest.approx((0.75, 0.6))


def test_what_agrees_is_perfect_and_what_does_not_meet_scores_nothing() -> None:
    assert score_mask(disc(9), disc(9)) == (1, 1, 0)
    apart = score_mask(square(2), square(40))
    assert (apart.dice, apart.iou) == (0, 0)


def test_the_unit_of_the_distance_is_the_original_pixel() -> None:
    one, other = np.zeros((2, 20, 20), bool)
    one[2, 3] = other[5, 7] = True
    assert hausdorff_95(one, other) == pytest.approx(5)
    assert hausdorff_95(one, other, pixel_size_px=(2, 0.5)) == pytest.approx(math.hypot(6, 2))


def test_a_twentieth_of_an_outline_does_not_count() -> None:
    speck = disc(40)
    speck[2, 2] = True
    assert hausdorff_95(speck, disc(40)) == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (3.5, 2.0)])
def test_distances_are_monais(spacing: tuple[float, float]) -> None:
    for seed in range(4):
        masks = blob(seed), blob(seed + 50)
        tensors = [torch.from_numpy(mask)[None, None] for mask in masks]
        theirs = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=spacing)
        assert hausdorff_95(*masks, spacing) == pytest.approx(theirs.item(), rel=1e-5)
        assert hausdorff_95(*masks, spacing) > 3


def test_dice_and_iou_follow_their_definitions() -> None:
    one, other = blob(1), blob(51)
    both, either = (one & other).sum(), (one | other).sum()
    scores = score_mask(one, other)
    assert (scores.dice, scores.iou) == pytest.approx((2 * both / (one.sum() + other.sum()), both / either))
    assert 0.02 < scores.iou < 0.98


def test_empty_masks_agree_with_each_other_and_have_no_distance_from_anything_else() -> None:
    nothing = np.zeros((128, 128), bool)
    assert score_mask(nothing, nothing) == (1, 1, 0)
    assert score_mask(disc(5), nothing) == (0, 0, None)
    assert score_mask(nothing, disc(5)) == (0, 0, None)


def test_pooled_scores_are_those_of_one_large_mask() -> None:
    predictions, truths = np.stack([square(10), square(2)]), np.stack([square(15), square(40)])
    pooled = pool_scores(predictions, truths)
    assert (pooled.dice, pooled.iou) == pytest.approx((2 * 300 / 1600, 300 / 1300))
    large = score_mask(np.concatenate(predictions), np.concatenate(truths))
    assert (pooled.dice, pooled.iou) == pytest.approx((large.dice, large.iou))
