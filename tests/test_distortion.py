import numpy as np
import pytest
from scipy import stats

from pipeline.distortion import Rectangles, draw_rectangles
from pipeline.spec import DistortionSpec

SPEC = DistortionSpec()
SIZE_PX = 224


def draw(num_views: int = 4000, size_px: int = SIZE_PX, spec: DistortionSpec = SPEC, step: int = 0) -> Rectangles:
    return draw_rectangles(spec, size_px, num_views, seed=(7,), step=step)


def erasures(table: Rectangles) -> tuple[np.ndarray, np.ndarray]:
    """Return corners and sizes [N, E, 2] of the views that have erasures."""
    shape = (-1, SPEC.max_blocks, 2)
    return table.erase_at.reshape(shape)[table.has_erasures], table.erase_size.reshape(shape)[table.has_erasures]


def is_shuffled(table: Rectangles) -> np.ndarray:
    return table.has_pastes & (table.paste_size[:, 0] == SIZE_PX).all(axis=1)


def test_each_kind_comes_as_often_as_published() -> None:
    table = draw(20_000)
    shuffled = is_shuffled(table)
    outer = table.has_pastes & ~shuffled
    counts = [table.has_erasures.sum(), outer.sum(), shuffled.sum()]
    counts.append(20_000 - sum(counts))
    assert stats.chisquare(counts, 20_000 * np.array([0.30, 0.05, 0.30, 0.35])).pvalue > 1e-3
    assert not (table.has_erasures & table.has_pastes).any()


def test_cutout_sides_are_independent_and_uniform_from_10_to_70() -> None:
    _, size = erasures(draw())
    blocks = size[size.all(axis=2)]
    for side in blocks.T:
        counts = np.bincount(side, minlength=71)
        assert counts[:10].sum() == 0
        assert len(counts) == 71
        assert stats.chisquare(counts[10:]).pvalue > 1e-3
    assert abs(stats.pearsonr(*blocks.T).statistic) < 4 / np.sqrt(len(blocks))


def test_cutout_stops_after_each_block_with_probability_one_tenth() -> None:
    _, size = erasures(draw(20_000))
    num_blocks = size.all(axis=2).sum(axis=1)
    expected = [0.1 * 0.9 ** (n - 1) for n in range(1, 10)] + [0.9**9]
    counts = np.bincount(num_blocks, minlength=11)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:], len(num_blocks) * np.array(expected)).pvalue > 1e-3


def test_outer_cutout_keeps_windows_of_224_minus_50_to_70() -> None:
    table = draw(20_000)
    outer = table.has_pastes & ~is_shuffled(table)
    size = table.paste_size[outer]
    sides = size[size.all(axis=2)]
    assert (sides.min(), sides.max()) == (154, 174)
    assert stats.chisquare(np.bincount(sides.ravel())[154:]).pvalue > 1e-3
    assert (table.paste_from[outer] == table.paste_to[outer]).all()
    num_windows = size.all(axis=2).sum(axis=1)
    assert (num_windows.min(), num_windows.max()) == (1, 10)


def test_shuffle_swaps_ten_pairs_of_disjoint_blocks_of_one_size() -> None:
    table = draw()
    shuffled = is_shuffled(table)
    assert table.paste_size.shape[1] == 1 + 2 * 10
    source, to = table.paste_from[shuffled, 1:], table.paste_to[shuffled, 1:]
    size = table.paste_size[shuffled, 1:]
    assert (size.min(), size.max()) == (10, 15)
    assert (size[:, ::2] == size[:, 1::2]).all()
    assert (source[:, ::2] == to[:, 1::2]).all()
    assert (source[:, 1::2] == to[:, ::2]).all()
    for first, second, extent in zip(*(a[:, ::2].reshape(-1, 2) for a in (source, to, size)), strict=True):
        rows = set(range(first[0], first[0] + extent[0])) & set(range(second[0], second[0] + extent[0]))
        columns = set(range(first[1], first[1] + extent[1])) & set(range(second[1], second[1] + extent[1]))
        assert not (rows and columns)


@pytest.mark.parametrize(("size_px", "border_px"), [(224, 3), (448, 6), (96, 1), (32, 1)])
def test_every_block_lies_inside_the_border_and_reaches_it(size_px: int, border_px: int) -> None:
    table = draw(size_px=size_px)
    at, size = erasures(table)
    low, high = at[size.all(axis=2)], (at + size)[size.all(axis=2)]
    swaps = table.paste_size.any(axis=2) & (table.paste_size < size_px).all(axis=2)
    low = np.concatenate([low, table.paste_from[swaps], table.paste_to[swaps]])
    high = np.concatenate([high, *((a + table.paste_size)[swaps] for a in (table.paste_from, table.paste_to))])
    assert low.min() == border_px
    assert high.max() == size_px - border_px


def test_lengths_scale_with_the_view() -> None:
    _, size = erasures(draw(size_px=448))
    sides = size[size > 0]
    assert (sides.min(), sides.max()) == (20, 140)


def test_tables_follow_from_seed_and_step_alone() -> None:
    first, again, next_step = draw(8, step=3), draw(8, step=3), draw(8, step=4)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not all((a == b).all() for a, b in zip(first, next_step, strict=True))
    other_seed = draw_rectangles(SPEC, SIZE_PX, 8, seed=(8,), step=3)
    assert not all((a == b).all() for a, b in zip(first, other_seed, strict=True))
