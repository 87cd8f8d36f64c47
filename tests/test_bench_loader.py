import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks.plain_loader import TwoViews
from benchmarks.webdataset_loader import TwoTensorViews, webdataset_batches
from pipeline.packing import decode_grey
from pipeline.shardset import ShardSet
from pipeline.spec import Batch, DistortionSpec, ViewSpec
from tests.commands import run_command
from tests.test_graph import WHOLE, Views, crop_spans, draw_views, ramp, texture

ROW_FIGURES = {
    *("images_per_second", "spread", "images_per_second_per_core", "cpu_seconds_per_1000_images", "peak_memory_mib"),
}


def draw_plain(image: np.ndarray, view: ViewSpec, distortion: DistortionSpec | None = None) -> Batch:
    batch = TwoViews(view, distortion)(Image.fromarray(image).convert("RGB"))
    assert all(images.shape == (3, view.crop_size_px, view.crop_size_px) for images in batch)
    assert all((images[0] == images).all() for images in batch), "grey stays grey"
    return Batch(*((255 * images[0]).round() for images in batch))


def draw_tensors(image: np.ndarray, view: ViewSpec, distortion: DistortionSpec | None = None) -> Batch:
    return Batch(*(images[0] for images in TwoTensorViews(view, distortion)(torch.from_numpy(image)[None])))


@pytest.fixture(params=[draw_plain, draw_tensors], ids=["plain", "webdataset"])
def draw_theirs(request: pytest.FixtureRequest) -> Callable[..., Views]:
    """Draw views by a recipe of the benchmarks, in the form in which `draw_views` gives ours."""

    def draw(
        image: np.ndarray, view: ViewSpec, distortion: DistortionSpec | None = None, *, num_views: int = 1024
    ) -> Views:
        random.seed(0)
        torch.manual_seed(0)
        batches = [request.param(image, view, distortion) for _ in range(num_views)]
        return Views(*(torch.stack(images).to(torch.uint8).numpy() for images in zip(*batches, strict=True)))

    return draw


def is_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return stats.ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.mark.parametrize("crop_area", [(0.2, 1.0), (0.25, 0.25)], ids=["published", "aspect alone"])
def test_crops_are_distributed_as_ours(
    tmp_path: Path, draw_theirs: Callable[..., Views], crop_area: tuple[float, float]
) -> None:
    view = replace(WHOLE, crop_size_px=32, crop_area=crop_area, crop_aspect=(3 / 4, 4 / 3))
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 1024))  # crops end on whole pixels; ties upset the test
    for axis in (0, 1):
        ours, theirs = draw_views(tmp_path, ramp(axis), view), draw_theirs(ramp(axis), view)
        for name in ("query", "key"):
            (our_start, our_length), (start, length) = (crop_spans(getattr(v, name), axis) for v in (ours, theirs))
            assert is_same_distribution(our_start + noise[0], start + noise[0])
            assert is_same_distribution(our_length + noise[1], length + noise[1])
        assert (theirs.query == theirs.target).all()
        starts = [crop_spans(images, axis)[0] for images in (theirs.query, theirs.key)]
        assert abs(stats.spearmanr(*starts).statistic) < 4 / np.sqrt(1024), "views are cropped independently"


def test_views_are_flipped_as_ours_and_the_target_with_the_query(draw_theirs: Callable[..., Views]) -> None:
    views = draw_theirs(ramp(1), replace(WHOLE, crop_size_px=32, flip_probability=0.5))
    flipped = [crop_spans(images, 1)[1] < 0 for images in views]
    assert (flipped[0] == flipped[2]).all()
    assert stats.chisquare(np.bincount(flipped[0] + 2 * flipped[1], minlength=4)).pvalue > 1e-3


def test_jitter_is_distributed_as_ours(tmp_path: Path, draw_theirs: Callable[..., Views]) -> None:
    image = texture(90, 150, size_px=64)  # never saturates
    view = replace(WHOLE, crop_size_px=64, jitter_probability=0.8)

    def measure(views: Views) -> tuple[np.ndarray, np.ndarray]:
        """Return brightness and contrast [N] of what became of the image."""
        mean, spread = views.query.mean(axis=(1, 2)), views.query.std(axis=(1, 2))
        return mean / image.mean(), spread / image.std() * image.mean() / mean

    ours, theirs = measure(draw_views(tmp_path, image, view)), measure(draw_theirs(image, view))
    assert is_same_distribution(ours[0], theirs[0])
    assert is_same_distribution(ours[1], theirs[1])
    is_left = [np.isclose(b, 1, atol=1e-4) & np.isclose(c, 1, atol=1e-4) for b, c in (ours, theirs)]
    assert stats.binomtest(int(is_left[1].sum()), 1024, 0.2).pvalue > 1e-3


def test_jitter_saturates_in_either_order_as_ours(tmp_path: Path, draw_theirs: Callable[..., Views]) -> None:
    image = texture(0, 255, size_px=64)
    view = replace(WHOLE, crop_size_px=64, jitter_probability=1.0, brightness=(1.4, 1.40001), contrast=(0.6, 0.60001))
    ours, theirs = draw_views(tmp_path, image, view).query, draw_theirs(image, view).query
    brightest = [images.max(axis=(1, 2)).astype(int) for images in (ours, theirs)]
    limit = (brightest[0].min() + brightest[0].max()) / 2  # brightness first leaves it darker
    for is_first in (np.less, np.greater):
        medians = [np.median(b[is_first(b, limit)]) for b in brightest]
        assert abs(medians[0] - medians[1]) <= 2
    assert stats.binomtest(int((brightest[1] < limit).sum()), 1024, 0.5).pvalue > 1e-3


def test_blur_is_distributed_as_ours(tmp_path: Path, draw_theirs: Callable[..., Views]) -> None:
    edge = np.zeros((64, 64), np.uint8)
    edge[:, 32:] = 255
    view = replace(WHOLE, crop_size_px=64, blur_probability=1.0)

    def spread_px(images: np.ndarray) -> np.ndarray:
        """Root second moment [N] of the edge's derivative; below 0.6 px, PIL's blur and a sampled Gaussian differ."""
        slope = np.diff(images[:, 30].astype(float))
        return np.sqrt((slope * (np.arange(63) - 31) ** 2).sum(axis=1) / slope.sum(axis=1)).clip(0.6)

    ours, theirs = (spread_px(views.query) for views in (draw_views(tmp_path, edge, view), draw_theirs(edge, view)))
    assert is_same_distribution(ours, theirs)
    sometimes = draw_theirs(edge, replace(view, blur_probability=0.5, blur_sigma_px=(1, 2)))
    assert stats.binomtest(int((spread_px(sometimes.key) > 0.6).sum()), 1024, 0.5).pvalue > 1e-3


@pytest.mark.parametrize("size_px", [224, 96])
def test_distortions_are_distributed_as_ours(tmp_path: Path, draw_theirs: Callable[..., Views], size_px: int) -> None:
    image = np.random.default_rng(0).integers(1, 256, (size_px, size_px), np.uint8)
    view = replace(WHOLE, crop_size_px=size_px)

    def measure(views: Views) -> tuple[np.ndarray, np.ndarray]:
        """Return the kind of each view [2 N] (whole, shuffled, cut-out, outer cut-out) and the share of it changed."""
        images = np.concatenate([views.query, views.key])
        is_black, is_changed = images == 0, images != image
        kind = np.sum([is_changed.any(axis=(1, 2)), is_black.any(axis=(1, 2)), is_black[:, 0].all(axis=1)], axis=0)
        return kind, is_changed.mean(axis=(1, 2))

    spec = DistortionSpec()
    our_kind, our_share = measure(draw_views(tmp_path, image, view, spec))
    kind, share = measure(draw_theirs(image, view, spec, num_views=512))
    counts = np.bincount(kind, minlength=4)
    assert stats.chisquare(counts, 1024 * np.array([0.35, 0.30, 0.30, 0.05])).pvalue > 1e-3
    for k in (1, 2, 3):
        assert is_same_distribution(our_share[our_kind == k], share[kind == k])
    assert stats.chi2_contingency(np.array([counts, np.bincount(our_kind, minlength=4)])).pvalue > 1e-3


@pytest.mark.parametrize("store", ["raw", "png"])
def test_webdataset_reads_what_the_shards_hold(shard_folder: Path, tmp_path: Path, store: str) -> None:
    if store == "png":
        images = shard_folder.parent / "images"
        done = run_command("shard_cxr14.py", "pack", images, "--out", tmp_path / "png", "--store", "png", "--size", 0)
        assert done.returncode == 0, done.stderr
        shard_folder = tmp_path / "png"
    shard_set = ShardSet.open(shard_folder)
    batches = webdataset_batches(shard_set, replace(WHOLE, crop_size_px=64), None, 4, num_workers=1, device="cpu")
    num_samples = shard_set.split("train").num_samples
    seen = Counter(
        image.numpy().tobytes() for batch in islice(batches, num_samples) for images in batch for image in images
    )
    decode = decode_grey if store == "png" else partial(np.frombuffer, dtype=np.uint8)
    assert set(seen) == {decode(image).tobytes() for _, _, image in shard_set.read_samples("train")}
    assert set(seen.values()) == {4 * 3}, "four epochs, in each of which every sample gives three images"


def read_result(stdout: str) -> dict[str, Any]:
    result = json.loads(stdout.splitlines()[-1])
    assert {"benchmark", "hardware", "versions", "commit", "rows"} <= result.keys()
    assert result["hardware"]["cores"] > 0
    assert result["versions"]["numpy"] == np.__version__
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


def test_bench_loader_measures_rows_and_keeps_a_report(work: Path) -> None:
    names = ["plain", "plain-grey", "raw-512", "png-original", "webdataset-jpeg-512"]
    small = ("--num-images", 16, "--phantom-size", 256, "--batch-size", 4, "--seconds", 0.05, "--cores", 1)
    options = (*small, "--rows", *names, "--work", work, "--out", work / "results")
    done = run_command("-m", "benchmarks.bench_loader", "--quick", *options)
    assert done.returncode == 0, done.stderr
    result = read_result(done.stdout)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == names
    for row in rows.values():
        assert ROW_FIGURES | {"ratio_to_plain", "first_batch_seconds", "bytes_read_per_image"} <= row.keys()
        assert all(row[figure] > 0 for figure in row.keys() - {"name", "spread"})
        assert row["ratio_to_plain"] == pytest.approx(row["images_per_second"] / rows["plain"]["images_per_second"])
    assert rows["raw-512"]["bytes_read_per_image"] > 512 * 512
    (report,) = (work / "results").glob("loader-*-1-cores-*.json")
    assert json.loads(report.read_text()) == result
    assert "| png-original |" in report.with_suffix(".md").read_text()
    with Image.open(report.with_suffix(".png")) as chart:
        assert chart.format == "PNG"


def test_bench_shard_measures_packing_against_decoding_alone(work: Path) -> None:
    images = next(work.glob("phantoms-16-of-256-px")) / "images"
    done = run_command("-m", "benchmarks.bench_shard", "--quick", "--images", images, "--num-images", 20)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in read_result(done.stdout)["rows"]}
    assert list(rows) == ["decode-only", "raw-512", "jpeg-512", "png-512", "png-original"]
    for row in rows.values():
        assert ROW_FIGURES | {"ratio_to_decode_only"} <= row.keys()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--rows", "plain", "nonsense"), 2, "nonsense"),
        (("--batch-size", 65), 2, "--batch-size 65"),
        (("--cores", 10_000), 2, "--cores 10000"),
        (("--images", Path(__file__).parent), 1, "holds no PNG files"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(arguments: tuple[object], status: int, message: str) -> None:
    done = run_command("-m", "benchmarks.bench_loader", "--quick", *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
