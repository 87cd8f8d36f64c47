"""What a view is: plain types, shared by the data path and everything that uses it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """One rank's share of a step. Every image is uint8 grey, 0..255, [B, 1, crop_size_px, crop_size_px]."""

    query: torch.Tensor
    """The first view: cropped, flipped, jittered, blurred and, where the mode says so, distorted."""
    key: torch.Tensor
    """The second view of the same radiographs, drawn independently."""
    target: torch.Tensor
    """What the network has to restore: the query's crop and flip, before jitter, blur and distortion."""


@dataclass(frozen=True)
class ViewSpec:
    """How one view is drawn from a radiograph (MoCo-v2's augmentations, for grey images)."""

    crop_size_px: int = 224
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Share of the radiograph's area."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height, log-uniform."""
    jitter_probability: float = 0.8
    brightness: tuple[float, float] = (0.6, 1.4)
    contrast: tuple[float, float] = (0.6, 1.4)
    """About the image's own mean."""
    blur_probability: float = 0.5
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    flip_probability: float = 0.5


@dataclass(frozen=True)
class LabelledViewSpec:
    """How a labelled radiograph is shown to a classifier: scaled to a square, then, in training, cropped and turned."""

    resized_size_px: int = 256
    crop_size_px: int = 224
    """Side of a training view; evaluation gets the whole square and crops it as it needs."""
    flip_probability: float = 0.5
    max_rotation_deg: float = 7.0


@dataclass(frozen=True)
class DistortionSpec:
    """How a view is damaged for the network to restore. Lengths are for a 224 px view and scale with its size.

    One draw per view decides between the kinds; what is left of 1 after their probabilities leaves the view whole.
    """

    cutout_probability: float = 0.30
    outer_cutout_probability: float = 0.05
    shuffle_probability: float = 0.30
    max_blocks: int = 10
    stop_probability: float = 0.1
    """After each cut-out block or outer window, the chance that it was the last."""
    num_swaps: int = 10
    cutout_side_px: tuple[int, int] = (10, 70)
    outer_margin_px: tuple[int, int] = (50, 70)
    """A window that outer cut-out keeps has sides of 224 minus this."""
    shuffle_side_px: tuple[int, int] = (10, 15)
    border_px: int = 3
    """Blocks stay this far inside the view."""
