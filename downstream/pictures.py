"""Pictures of what a network found, beside what is there: outlines of masks, heatmaps and boxes."""

from pathlib import Path

import cv2
import numpy as np

from errors import UserError

SIDE_PX = 448
TRUTH_BGR, PREDICTION_BGR, TEXT_BGR = (80, 200, 80), (60, 60, 255), (255, 255, 255)


def draw_masks(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, caption: str) -> np.ndarray:
    """Outline the true mask in green and the predicted one in red.

    Args:
        image: uint8 grey [S, S].
        truth: bool [S, S].
        prediction: bool [S, S].
        caption: For the upper left corner.

    Returns:
        uint8 BGR [SIDE_PX, SIDE_PX, 3].
    """
    picture = _enlarged(image)
    for mask, colour in ((truth, TRUTH_BGR), (prediction, PREDICTION_BGR)):
        enlarged = cv2.resize(mask * np.uint8(255), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_LINEAR) > 127
        outlines, _ = cv2.findContours(enlarged.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, colour, 1, cv2.LINE_AA)
    return _captioned(picture, caption)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 grey [H, W] or BGR [H, W, 3]. Raise UserError where that fails."""
    if not cv2.imwrite(str(path), pixels):
        raise UserError(f"{path}: could not be written; is the disk full?")


def _enlarged(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.resize(image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC), cv2.COLOR_GRAY2BGR)


def _captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    return cv2.putText(picture, caption, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, TEXT_BGR, 1, cv2.LINE_AA)
