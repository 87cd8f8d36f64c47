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


def draw_boxes(
    image: np.ndarray, heatmap: np.ndarray, truths: np.ndarray, found: np.ndarray | None, caption: str
) -> np.ndarray:
    """Lay a heatmap over a radiograph, with the true boxes in green and the found one in red.

    Args:
        image: uint8 grey [S, S].
        heatmap: fp32 [S, S] in 0..1.
        truths: [N, 4]: left, top, right and bottom in px of the image.
        found: The same, [4], if there is one.
        caption: For the upper left corner.

    Returns:
        uint8 BGR [SIDE_PX, SIDE_PX, 3].
    """
    colours = cv2.applyColorMap((255 * heatmap).astype(np.uint8), cv2.COLORMAP_JET)
    colours = cv2.resize(colours, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_LINEAR)
    picture = cv2.addWeighted(_enlarged(image), 0.65, colours, 0.35, 0)
    boxes = [(truth, TRUTH_BGR) for truth in truths] + ([(found, PREDICTION_BGR)] if found is not None else [])
    for box, colour in boxes:
        left, top, right, bottom = (round(float(edge) * SIDE_PX / len(image)) for edge in box)
        cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), colour, 2)
    return _captioned(picture, caption)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 grey [H, W] or BGR [H, W, 3]. Raise UserError where that fails."""
    if not cv2.imwrite(str(path), pixels):
        raise UserError(f"{path}: could not be written; is the disk full?")


def _enlarged(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.resize(image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC), cv2.COLOR_GRAY2BGR)


def _captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    return cv2.putText(picture, caption, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, TEXT_BGR, 1, cv2.LINE_AA)
