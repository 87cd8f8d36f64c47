import io
import math
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray
from scipy import ndimage, stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from pipeline.distortion import Rectangles, draw_rectangles
from pipeline.graph import NO_BLUR_SIGMA_PX, ReaderSpec, build_graph, build_labelled_graph
from pipeline.packing import EXTENSIONS, Store
from pipeline.spec import DistortionSpec, LabelledViewSpec, ViewSpec

DEVICES = [None, *range(min(1, torch.cuda.device_count()))]
SIZE_PX = 256
WHOLE = ViewSpec(
    crop_size_px=SIZE_PX,
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    jitter_probability=0,
    blur_probability=0,
    flip_probability=0,
)
"""The radiograph as it is; each test switches on what it looks at."""


class Views(NamedTuple):
    """All uint8 [N, S, S]."""

    query: np.ndarray
    key: np.ndarray
    target: np.ndarray


def write_tar(folder: Path, images: list[np.ndarray], store: Store) -> ReaderSpec:
    """Write a shard by hand, with the index as DALI documents it."""
    rows = []
    with tarfile.open(folder / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, image in enumerate(images):
            name = f"{i:04d}.{EXTENSIONS[store]}"
            data = image.tobytes() if store == "raw" else cv2.imencode(f".{EXTENSIONS[store]}", image)[1].tobytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            rows.append(f"{EXTENSIONS[store]} {tar.offset + 512} {len(data)} {name}")
            tar.addfile(info, io.BytesIO(data))
    (folder / "x.idx").write_text("\n".join([f"v1.2 {len(rows)}", *rows]) + "\n")
    return ReaderSpec(
        tar_paths=(str(folder / "x.tar"),),
        index_paths=(str(folder / "x.idx"),),
        store=store,
        size_px=images[0].shape[0],
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
    )


def draw_views(
    folder: Path,
    image: np.ndarray | list[np.ndarray],
    view: ViewSpec,
    distortion: DistortionSpec | None = None,
    *,
    num_views: int = 1024,
    store: Store = "raw",
    target: str = "aligned",
    device_id: int | None = None,
) -> Views:
    images = image if isinstance(image, list) else [image]
    reader = write_tar(folder, images, store)
    pipeline = build_graph(reader, view, distortion, target=target, batch_size=64, device_id=device_id, num_threads=2)
    batches = []
    for _ in range(-(-num_views // 64)):
        tensors = []
        for output in pipeline.run():
            tensor = torch.empty(output.as_tensor().shape(), dtype=torch.uint8)
            feed_ndarray(output.as_cpu().as_tensor() if device_id is not None else output.as_tensor(), tensor)
            tensors.append(tensor.numpy()[..., 0])
        batches.append(tensors)
    return Views(*(np.concatenate(arrays)[:num_views] for arrays in zip(*batches, strict=True)))


def texture(low: int, high: int, size_px: int = SIZE_PX, seed: int = 0) -> np.ndarray:
    """Smooth noise that fills the range from low to high."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size_px, size_px)), 2, mode="wrap")
    noise = (noise - noise.min()) / np.ptp(noise)
    return np.round(low + (high - low) * noise).astype(np.uint8)


def ramp(axis: int) -> np.ndarray:
    """Return an image whose pixel value is its own coordinate along `axis`."""
    return np.ascontiguousarray(np.moveaxis(np.tile(np.arange(256, dtype=np.uint8), (256, 1)), 1, axis))


def crop_spans(views: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return start and signed length [N], in px of the radiograph, of views of a ramp along `axis`."""
    size = views.shape[1]
    profile = views.mean(axis=2 - axis)
    position = (np.arange(size) + 0.5) / size
    inside = slice(4, -4)
    slope, intercept = np.polyfit(position[inside], profile[:, inside].T + 0.5, 1)
    return np.where(slope > 0, intercept, intercept + slope), slope


def torchvision_crops(view: ViewSpec, num_crops: int) -> np.ndarray:
    """Return rows of top, left, height, width by the reference implementation."""
    image = torch.zeros(1, 256, 256)
    return np.array(
        [RandomResizedCrop.get_params(image, list(view.crop_area), list(view.crop_aspect)) for _ in range(num_crops)]
    )


@pytest.mark.parametrize("device_id", DEVICES)
@pytest.mark.parametrize(
    "view",
    [
        replace(WHOLE, crop_size_px=64, crop_area=(0.2, 1.0), crop_aspect=(3 / 4, 4 / 3)),
        replace(WHOLE, crop_size_px=64, crop_area=(0.2, 1.0)),
        replace(WHOLE, crop_size_px=64, crop_area=(0.25, 0.25), crop_aspect=(3 / 4, 4 / 3)),
    ],
    ids=["published", "area alone", "aspect alone"],
)
@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_crops_are_distributed_as_torchvisions(
    tmp_path: Path, view: ViewSpec, axis: int, device_id: int | None
) -> None:
    torch.manual_seed(0)
    expected = torchvision_crops(view, 2048)
    views = draw_views(tmp_path, ramp(axis), view, num_views=2048, device_id=device_id)
    start, length = crop_spans(views.target, axis)
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 2048))  # crops end on whole pixels; ties upset the test
    assert stats.ks_2samp(start + jitter[0], expected[:, axis] + jitter[1]).pvalue > 1e-3
    assert stats.ks_2samp(length + jitter[0], expected[:, 2 + axis] + jitter[1]).pvalue > 1e-3


@pytest.mark.parametrize("device_id", DEVICES)
def test_views_are_flipped_half_of_the_time_query_and_key_independently(tmp_path: Path, device_id: int | None) -> None:
    views = draw_views(tmp_path, ramp(1), replace(WHOLE, crop_size_px=32, flip_probability=0.5), device_id=device_id)
    query_flipped, key_flipped = (crop_spans(images, 1)[1] < 0 for images in (views.query, views.key))
    counts = [(query_flipped == a) @ (key_flipped == b).astype(int) for a in (0, 1) for b in (0, 1)]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert np.abs(np.abs(crop_spans(views.query, 1)[1]) - 256).max() < 2


@pytest.mark.parametrize("device_id", DEVICES)
def test_a_flipped_crop_is_the_mirror_image_of_the_crop(tmp_path: Path, device_id: int | None) -> None:
    image = texture(0, 255)
    views = draw_views(
        tmp_path, image, replace(WHOLE, crop_size_px=224, flip_probability=1.0), num_views=1, device_id=device_id
    )
    whole = draw_views(tmp_path, image, replace(WHOLE, crop_size_px=224), num_views=1, device_id=device_id)
    assert np.abs(views.query[0, :, ::-1].astype(int) - whole.query[0]).max() <= 1


@pytest.mark.parametrize("device_id", DEVICES)
@pytest.mark.parametrize("crop_size_px", [224, 96])
def test_resampling_is_torchvisions_antialiased_bilinear(
    tmp_path: Path, crop_size_px: int, device_id: int | None
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (512, 512), np.uint8)
    view = replace(WHOLE, crop_size_px=crop_size_px)
    views = draw_views(tmp_path, image, view, num_views=1, device_id=device_id)
    size = [crop_size_px, crop_size_px]
    expected = tv.resize(torch.from_numpy(image)[None].float(), size, InterpolationMode.BILINEAR, antialias=True)[0]
    difference = np.abs(views.target[0] - expected.numpy())
    assert difference[1:-1, 1:-1].max() <= 1
    assert difference.max() < 12, "beyond the border DALI repeats pixels, torchvision leaves them out"


def resampling_weights(start_px: int, length_px: int, num_outputs: int, num_inputs: int) -> np.ndarray:
    """Weights [num_outputs, num_inputs] of antialiased linear resampling along one axis; beyond it, pixels repeat."""
    scale = length_px / num_outputs
    reach = np.arange(-math.ceil(scale) - 1, num_inputs + math.ceil(scale) + 1)
    center = start_px + (np.arange(num_outputs)[:, None] + 0.5) * scale
    weights = np.maximum(1 - np.abs(reach + 0.5 - center) / scale, 0)
    inside = np.eye(num_inputs)[reach.clip(0, num_inputs - 1)]
    return weights / weights.sum(axis=1, keepdims=True) @ inside


@pytest.mark.parametrize("device_id", DEVICES)
@pytest.mark.parametrize("flip", [0.0, 1.0], ids=["as it lies", "mirrored"])
@pytest.mark.parametrize(("height_px", "width_px"), [(24, 32), (32, 24)], ids=["wide", "high"])
def test_wide_and_high_regions_are_resampled_alike(
    tmp_path: Path, height_px: int, width_px: int, flip: float, device_id: int | None
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    area, aspect = height_px * width_px / 64**2, width_px / height_px
    shape = {"crop_size_px": 16, "crop_area": (area, area), "crop_aspect": (aspect, aspect)}
    view = replace(WHOLE, **shape, flip_probability=flip)
    views = draw_views(tmp_path, image, view, num_views=64, device_id=device_id).target
    along_y = np.stack([resampling_weights(y, height_px, 16, 64) for y in range(64 - height_px + 1)])
    along_x = np.stack([resampling_weights(x, width_px, 16, 64) for x in range(64 - width_px + 1)])
    anywhere = np.einsum("ayh,hw,bxw->abyx", along_y, image.astype(float), along_x)
    upright = views[:, :, ::-1] if flip else views
    assert all((np.abs(anywhere - crop).max(axis=(2, 3)) <= 1).any() for crop in upright)


@pytest.mark.parametrize("device_id", DEVICES)
def test_the_aligned_target_is_the_query_before_jitter_blur_and_distortion(
    tmp_path: Path, device_id: int | None
) -> None:
    image = texture(60, 200)
    plain = ViewSpec(crop_size_px=64, jitter_probability=0, blur_probability=0)
    views = draw_views(tmp_path, image, plain, device_id=device_id)
    assert (views.query == views.target).all()
    assert (views.key != views.target).any(axis=(1, 2)).all()
    full = draw_views(tmp_path, image, ViewSpec(crop_size_px=64), DistortionSpec(), device_id=device_id)
    assert (full.target == views.target).all(), "what comes after must not touch the target"
    assert (full.query != full.target).any(axis=(1, 2)).mean() > 0.9


@pytest.mark.parametrize("device_id", DEVICES)
def test_the_unflipped_target_is_the_querys_crop_as_it_lies(tmp_path: Path, device_id: int | None) -> None:
    view = ViewSpec(crop_size_px=64, jitter_probability=0, blur_probability=0)
    views = draw_views(tmp_path, texture(0, 255), view, target="unflipped", device_id=device_id)
    same = (views.query == views.target).all(axis=(1, 2))
    mirrored = (views.query[:, :, ::-1] == views.target).all(axis=(1, 2))
    assert (same ^ mirrored).all()
    assert stats.binomtest(int(same.sum()), len(same), 0.5).pvalue > 1e-3


@pytest.mark.parametrize("device_id", DEVICES)
def test_brightness_and_contrast_are_uniform_about_the_images_own_mean(tmp_path: Path, device_id: int | None) -> None:
    image = texture(90, 150)  # never saturates
    view = replace(WHOLE, jitter_probability=1.0)
    views = draw_views(tmp_path, image, view, num_views=512, device_id=device_id)
    before = views.target.reshape(512, -1).astype(float)
    after = views.query.reshape(512, -1).astype(float)
    brightness = after.mean(axis=1) / before.mean(axis=1)
    contrast = after.std(axis=1) / before.std(axis=1) / brightness
    residual = (
        after
        - after.mean(axis=1, keepdims=True)
        - (brightness * contrast)[:, None] * (before - before.mean(axis=1, keepdims=True))
    )
    assert np.abs(residual).max() < 2, "the change is affine"
    for factor in (brightness, contrast):
        assert stats.kstest(factor, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    assert abs(stats.spearmanr(brightness, contrast).statistic) < 4 / np.sqrt(512)


@pytest.mark.parametrize("device_id", DEVICES)
def test_saturating_jitter_is_torchvisions_in_either_order(tmp_path: Path, device_id: int | None) -> None:
    image = texture(0, 255)
    view = replace(WHOLE, jitter_probability=1.0, brightness=(1.4, 1.40001), contrast=(0.6, 0.60001))
    views = draw_views(tmp_path, image, view, num_views=512, device_id=device_id)
    picture = torch.from_numpy(image)[None] / 255
    brightness_first = tv.adjust_contrast(tv.adjust_brightness(picture, 1.4), 0.6)[0].numpy() * 255
    contrast_first = tv.adjust_brightness(tv.adjust_contrast(picture, 0.6), 1.4)[0].numpy() * 255
    assert np.abs(brightness_first - contrast_first).max() > 10
    is_first = np.abs(views.query - brightness_first).max(axis=(1, 2)) < 1.6
    is_second = np.abs(views.query - contrast_first).max(axis=(1, 2)) < 1.6
    assert (is_first ^ is_second).all()
    assert stats.binomtest(int(is_first.sum()), 512, 0.5).pvalue > 1e-3


@pytest.mark.parametrize("device_id", DEVICES)
def test_jitter_and_blur_come_as_often_as_published(tmp_path: Path, device_id: int | None) -> None:
    image = texture(60, 200)
    jittered = draw_views(tmp_path, image, replace(WHOLE, jitter_probability=0.8), device_id=device_id)
    assert stats.binomtest(int((jittered.key != image).any(axis=(1, 2)).sum()), 1024, 0.8).pvalue > 1e-3
    # A sigma under 0.25 px may leave an 8-bit image as it is, so the blur is made a visible one.
    blurred = draw_views(
        tmp_path, image, replace(WHOLE, blur_probability=0.5, blur_sigma_px=(1, 2)), device_id=device_id
    )
    assert stats.binomtest(int((blurred.key != image).any(axis=(1, 2)).sum()), 1024, 0.5).pvalue > 1e-3


@pytest.mark.parametrize("device_id", DEVICES)
def test_blur_is_gaussian_with_sigma_uniform_from_a_tenth_to_two_px(tmp_path: Path, device_id: int | None) -> None:
    edge = np.zeros((64, 64), np.uint8)
    edge[:, 32:] = 255
    view = replace(WHOLE, crop_size_px=64, blur_probability=1.0)
    views = draw_views(tmp_path, edge, view, num_views=2048, device_id=device_id)

    def spread_px(rows: np.ndarray) -> np.ndarray:
        """Root second moment [N] of the edge's derivative: the blur's sigma, as far as pixels resolve it."""
        slope = np.diff(rows.astype(float))
        position = np.arange(slope.shape[1]) - 31
        return np.sqrt((slope * position**2).sum(axis=1) / slope.sum(axis=1))

    sigma = np.random.default_rng(0).uniform(0.1, 2.0, 2048)
    expected = np.array([ndimage.gaussian_filter1d(edge[0].astype(float), s, truncate=3) for s in sigma])
    assert stats.ks_2samp(spread_px(views.query[:, 30]), spread_px(expected.round())).pvalue > 1e-3
    assert (views.query == views.query[:, 30:31]).all(), "an edge along y is blurred along x only"


@pytest.mark.parametrize("device_id", DEVICES)
@pytest.mark.parametrize("sigma_px", [0.5, 2.0])
def test_blur_is_within_a_grey_level_of_the_gaussian(tmp_path: Path, sigma_px: float, device_id: int | None) -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIZE_PX, SIZE_PX), np.uint8)
    view = replace(WHOLE, blur_probability=1.0, blur_sigma_px=(sigma_px, sigma_px + 1e-5))
    views = draw_views(tmp_path, image, view, num_views=1, device_id=device_id)
    expected = ndimage.gaussian_filter(image.astype(float), sigma_px, mode="mirror", truncate=3)
    assert np.abs(views.query[0] - expected).max() <= 1


def test_a_blur_that_is_skipped_would_change_no_pixel() -> None:
    harshest = np.random.default_rng(0).choice(np.array([0.0, 255.0]), (256, 256))
    assert (ndimage.gaussian_filter(harshest, NO_BLUR_SIGMA_PX).round() == harshest).all()


def reference_distortion(image: np.ndarray, table: Rectangles, index: int) -> np.ndarray:
    """Distort one image [S, S] with plain loops."""
    result = image.copy()
    if table.has_pastes[index]:
        result[:] = 0
        for (y, x), (to_y, to_x), (h, w) in zip(
            table.paste_from[index], table.paste_to[index], table.paste_size[index], strict=True
        ):
            result[to_y : to_y + h, to_x : to_x + w] = image[y : y + h, x : x + w]
    if table.has_erasures[index]:
        for (y, x), (h, w) in zip(
            table.erase_at[index].reshape(-1, 2), table.erase_size[index].reshape(-1, 2), strict=True
        ):
            result[y : y + h, x : x + w] = 0
    return result


@pytest.mark.parametrize("device_id", DEVICES)
def test_distorted_pixels_are_what_the_tables_say(tmp_path: Path, device_id: int | None) -> None:
    spec = DistortionSpec()
    image = np.random.default_rng(0).integers(1, 256, (224, 224), np.uint8)
    views = draw_views(tmp_path, image, replace(WHOLE, crop_size_px=224), spec, num_views=192, device_id=device_id)
    dali_seed = build_graph(
        write_tar(tmp_path, [image], "raw"),
        WHOLE,
        None,
        target="aligned",
        batch_size=1,
        device_id=device_id,
        num_threads=1,
    ).seed
    for view_index, images in enumerate((views.query, views.key)):
        for step in range(3):
            table = draw_rectangles(spec, 224, 64, (dali_seed, view_index), step)
            for i in range(64):
                assert (images[64 * step + i] == reference_distortion(image, table, i)).all()
    assert (views.query != views.key).any(axis=(1, 2)).mean() > 0.8, "the views are distorted independently"
    assert (views.target == image).all()


@pytest.mark.parametrize("device_id", DEVICES)
@pytest.mark.parametrize("store", ["jpeg", "png"])
def test_encoded_images_of_any_shape_are_read(tmp_path: Path, store: Store, device_id: int | None) -> None:
    wide, high = texture(20, 230)[:128], np.ascontiguousarray(texture(20, 230, seed=1)[:, :192])
    for image, aspect in ((wide, 2.0), (high, 0.75)):
        view = replace(WHOLE, crop_size_px=64, crop_aspect=(aspect, aspect))
        views = draw_views(tmp_path, [image], view, num_views=1, store=store, device_id=device_id)
        expected = tv.resize(torch.from_numpy(image)[None].float(), [64, 64], antialias=True)[0].numpy()
        assert np.abs(views.target[0] - expected)[1:-1, 1:-1].max() <= (1 if store == "png" else 4)


def test_a_graph_for_a_gpu_breaks_no_rule_of_placement(tmp_path: Path) -> None:
    """Without a driver, DALI checks where operators and their arguments lie, and only then asks for CUDA."""
    reader = write_tar(tmp_path, [texture(0, 255)], "raw")
    for store in EXTENSIONS:
        if torch.cuda.is_available():
            pytest.skip("every other test here runs on the GPU")
        with pytest.raises(RuntimeError, match="CUDA is not available"):
            build_graph(
                replace(reader, store=store),
                ViewSpec(),
                DistortionSpec(),
                target="unflipped",
                batch_size=2,
                device_id=0,
                num_threads=1,
            )


@pytest.mark.parametrize("augment", [False, True])
def test_a_labelled_graph_for_a_gpu_breaks_no_rule_of_placement(tmp_path: Path, augment: bool) -> None:
    if torch.cuda.is_available():
        pytest.skip("tests of the labelled loaders run on the GPU")
    reader = write_tar(tmp_path, [texture(0, 255)], "raw")
    for store in EXTENSIONS:
        with pytest.raises(RuntimeError, match="CUDA is not available"):
            build_labelled_graph(
                replace(reader, store=store),
                LabelledViewSpec(),
                augment=augment,
                batch_size=2,
                device_id=0,
                num_threads=1,
            )
