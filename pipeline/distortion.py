"""Cut-out, outer cut-out and shuffle as tables of rectangles: what to paste, in which order, then what to erase.

All randomness is a pure function of (seed, step): nothing has to be saved to resume, and any table can be drawn again.
"""

from typing import NamedTuple

import numpy as np

from pipeline.spec import DistortionSpec


class Rectangles(NamedTuple):
    """Tables for a batch of N views. All int32, in px, (y, x) order; a rectangle of size zero does nothing."""

    has_pastes: np.ndarray
    """[N] bool: the view becomes black, then gets its pastes. False: the view stays as it is."""
    paste_from: np.ndarray
    """[N, P, 2] top left corners in the undistorted view."""
    paste_to: np.ndarray
    """[N, P, 2] top left corners in the distorted view; later pastes overwrite earlier ones."""
    paste_size: np.ndarray
    """[N, P, 2]"""
    has_erasures: np.ndarray
    """[N] bool"""
    erase_at: np.ndarray
    """[N, E * 2] top left corners of what is set to 0 in the end: y0, x0, y1, x1, ..."""
    erase_size: np.ndarray
    """[N, E * 2] heights and widths, likewise."""


def num_pastes(spec: DistortionSpec) -> int:
    """P of the tables: the whole view and both blocks of every swap, or the windows of an outer cut-out."""
    return max(1 + 2 * spec.num_swaps, spec.max_blocks)


def draw_rectangles(
    spec: DistortionSpec, view_size_px: int, num_views: int, seed: tuple[int, ...], step: int
) -> Rectangles:
    """Draw the distortions of `num_views` square views of side `view_size_px`.

    `seed` tells apart what must not repeat within a step (run, rank, which view); `step` counts batches.
    """
    rng = np.random.default_rng([*seed, step])
    kind = rng.random(num_views)
    is_cutout = kind <= spec.cutout_probability
    is_outer = ~is_cutout & (kind <= spec.cutout_probability + spec.outer_cutout_probability)
    is_shuffle = ~(is_cutout | is_outer) & (
        kind <= spec.cutout_probability + spec.outer_cutout_probability + spec.shuffle_probability
    )

    erase_at, erase_size = _draw_blocks(rng, spec, view_size_px, num_views, spec.cutout_side_px)
    erase_size[~is_cutout] = 0
    margin_low, margin_high = spec.outer_margin_px
    window_side_px = (224 - margin_high, 224 - margin_low)
    window_at, window_size = _draw_blocks(rng, spec, view_size_px, num_views, window_side_px)
    first, second, swap_size = _draw_swaps(rng, spec, view_size_px, num_views)

    paste_from = np.zeros((num_views, num_pastes(spec), 2), np.int32)
    paste_to, paste_size = np.zeros_like(paste_from), np.zeros_like(paste_from)
    outer = np.ix_(is_outer, np.arange(spec.max_blocks))
    paste_from[outer] = paste_to[outer] = window_at[is_outer]
    paste_size[outer] = window_size[is_outer]
    paste_size[is_shuffle, 0] = view_size_px  # the whole view lies under the swapped blocks
    shuffle = np.ix_(is_shuffle, np.arange(1, 1 + 2 * spec.num_swaps))
    paste_from[shuffle] = np.stack([second, first], axis=2).reshape(num_views, -1, 2)[is_shuffle]
    paste_to[shuffle] = np.stack([first, second], axis=2).reshape(num_views, -1, 2)[is_shuffle]
    paste_size[shuffle] = np.repeat(swap_size, 2, axis=1)[is_shuffle]
    return Rectangles(
        is_outer | is_shuffle,
        paste_from,
        paste_to,
        paste_size,
        is_cutout,
        erase_at.reshape(num_views, -1),
        erase_size.reshape(num_views, -1),
    )


def _scaled(length_px: int, view_size_px: int) -> int:
    """Scale a length given for a 224 px view, to 1 px at least."""
    return max(1, round(length_px * view_size_px / 224))


def _draw_blocks(
    rng: np.random.Generator, spec: DistortionSpec, view_size_px: int, num_views: int, side_px: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return corners and sizes [N, max_blocks, 2] of independent blocks; those after the last have size zero."""
    low, high = (_scaled(side, view_size_px) for side in side_px)
    size = rng.integers(low, high, (num_views, spec.max_blocks, 2), np.int32, endpoint=True)
    at = _draw_corners(rng, spec, view_size_px, size)
    stops = rng.random((num_views, spec.max_blocks)) < spec.stop_probability
    is_drawn = np.cumsum(stops, axis=1) - stops == 0  # no stop before this one
    size[~is_drawn] = 0
    return at, size


def _draw_swaps(
    rng: np.random.Generator, spec: DistortionSpec, view_size_px: int, num_views: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the corners of both blocks and their common size, each [N, num_swaps, 2]; the two are disjoint."""
    low, high = (_scaled(side, view_size_px) for side in spec.shuffle_side_px)
    size = rng.integers(low, high, (num_views, spec.num_swaps, 2), np.int32, endpoint=True)
    first = _draw_corners(rng, spec, view_size_px, size)
    second = _draw_corners(rng, spec, view_size_px, size)
    while (overlaps := (np.abs(first - second) < size).all(axis=2)).any():
        first[overlaps] = _draw_corners(rng, spec, view_size_px, size[overlaps])
        second[overlaps] = _draw_corners(rng, spec, view_size_px, size[overlaps])
    return first, second, size


def _draw_corners(rng: np.random.Generator, spec: DistortionSpec, view_size_px: int, size: np.ndarray) -> np.ndarray:
    """Return a top left corner for each block of `size` [..., 2], uniform over where it keeps off the border."""
    border = _scaled(spec.border_px, view_size_px)
    return rng.integers(border, view_size_px - border - size, dtype=np.int32, endpoint=True)
