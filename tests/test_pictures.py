from pathlib import Path

import cv2
import numpy as np
import pytest

from downstream.pictures import PREDICTION_BGR, SIDE_PX, TRUTH_BGR, draw_boxes, draw_masks, write_png
from errors import UserError

SCALE = SIDE_PX / 64
BLACK = np.zeros((64, 64), np.uint8)


def extent_of(pixels: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom of a mask of the picture, in px of the 64 px that were drawn."""
    y, x = np.nonzero(pixels)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / SCALE


def test_masks_are_outlined_in_their_colours() -> None:
    truth, prediction = np.zeros((2, 64, 64), bool)
    truth[20:40, 10:30] = prediction[30:50, 35:60] = True
    picture = draw_masks(BLACK, truth, prediction, "")
    assert (picture.shape, picture.dtype) == ((SIDE_PX, SIDE_PX, 3), np.uint8)
    _, green, red = np.moveaxis(picture.astype(int), -1, 0)
    np.testing.assert_allclose(extent_of(green > red + 20), [10, 20, 30, 40], atol=0.5)
    np.testing.assert_allclose(extent_of(red > green + 20), [35, 30, 60, 50], atol=0.5)
    inside = picture[int(30 * SCALE), int(20 * SCALE)]
    assert not inside.any()


def test_boxes_lie_on_the_heatmap_in_their_colours() -> None:
    heatmap = np.zeros((64, 64), np.float32)
    heatmap[48, 16] = 1
    truths = np.array([[10.0, 20, 30, 40]])
    picture = draw_boxes(BLACK, heatmap, truths, np.array([35.0, 30, 60, 50]), "")
    assert (picture.shape, picture.dtype) == ((SIDE_PX, SIDE_PX, 3), np.uint8)
    np.testing.assert_allclose(extent_of((picture == TRUTH_BGR).all(axis=2)), truths[0], atol=0.5)
    np.testing.assert_allclose(extent_of((picture == PREDICTION_BGR).all(axis=2)), [35, 30, 60, 50], atol=0.5)
    assert not (draw_boxes(BLACK, heatmap, truths, None, "") == PREDICTION_BGR).all(axis=2).any()
    hot = draw_boxes(BLACK, heatmap, np.empty((0, 4)), None, "")[..., 2].astype(int)  # red
    y, x = np.unravel_index(hot.argmax(), hot.shape)
    assert (y / SCALE, x / SCALE) == (pytest.approx(48.5, abs=1), pytest.approx(16.5, abs=1))


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    write_png(tmp_path / "there.png", BLACK)
    assert cv2.imread(str(tmp_path / "there.png")) is not None
    with pytest.raises(UserError, match=r"nowhere/x\.png: could not be written"):
        write_png(tmp_path / "nowhere" / "x.png", BLACK)
