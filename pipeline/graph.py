"""The DALI graphs, for CPU and GPU; `pipeline` has no DALI operators elsewhere.

`build_graph` is for pre-training: read, decode, two views, distortion; `build_labelled_graph` for whoever has labels.

What keeps it true on a GPU: named arguments (sigma, factors, rectangles) are CPU data, so that whatever depends on
pixels, such as the image's own mean, is arithmetic in the graph; and nothing on the CPU follows what is on the GPU.
Where a CPU has a faster way to the same pixels, the graph asks for the device of the image.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import BatchInfo

from pipeline.distortion import Rectangles, draw_rectangles, num_pastes
from pipeline.packing import EXTENSIONS, Store
from pipeline.spec import DistortionSpec, LabelledViewSpec, ViewSpec

NO_BLUR_SIGMA_PX = 0.25


@dataclass(frozen=True)
class ReaderSpec:
    """Which samples a rank reads, and how they are stored."""

    tar_paths: tuple[str, ...]
    index_paths: tuple[str, ...]
    store: Store
    size_px: int
    """Side of the stored squares; only `raw` needs it."""
    rank: int
    world_size: int
    seed: int
    shuffle: bool
    shuffle_buffer_samples: int = 1024


def build_graph(
    reader: ReaderSpec,
    view: ViewSpec,
    distortion: DistortionSpec | None,
    *,
    target: Literal["aligned", "unflipped"],
    batch_size: int,
    device_id: int | None,
    num_threads: int,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """Return the built pipeline; its outputs are query, key and target, uint8 [crop_size_px, crop_size_px, 1] a sample.

    All that is random in it follows from the reader's seed and rank and the number of batches drawn so far.
    `device_id` None is the CPU. `checkpoint` is what `Pipeline.checkpoint()` of the same graph returned: the next batch
    is then the one that came after it.
    """
    pipeline = _graph(
        reader,
        view,
        distortion,
        target,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        seed=_seed_of(reader),
        enable_conditionals=True,
        enable_checkpointing=True,
        prefetch_queue_depth=2,
        checkpoint=checkpoint,
    )
    pipeline.build()
    return pipeline


def build_labelled_graph(
    reader: ReaderSpec,
    view: LabelledViewSpec,
    *,
    augment: bool,
    batch_size: int,
    device_id: int | None,
    num_threads: int,
) -> Pipeline:
    """Return the built pipeline; its outputs are an image and its sample's `.json`, uint8 [num_bytes] on the CPU.

    The image is uint8 [side, side, 1]: the radiograph scaled to `resized_size_px`; with `augment` a randomly placed,
    flipped and turned square of `crop_size_px` of it, as the reader's seed and rank say.
    """
    pipeline = _labelled_graph(
        reader,
        view,
        augment,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        seed=_seed_of(reader),
        prefetch_queue_depth=2,
    )
    pipeline.build()
    return pipeline


def _seed_of(reader: ReaderSpec) -> int:
    return (reader.seed * 1_000_003 + reader.rank * 7919 + 1) % 2**31  # DALI's seed is one 31-bit number


@pipeline_def
def _labelled_graph(reader: ReaderSpec, view: LabelledViewSpec, augment: bool) -> tuple[DataNode, DataNode]:
    encoded, meta = read(reader, EXTENSIONS[reader.store], "json")
    image, _ = decode(encoded, reader, on_gpu=Pipeline.current().device_id is not None)
    size_px = [view.resized_size_px, view.resized_size_px]
    image = fn.resize(image, size=size_px, interp_type=types.INTERP_LINEAR, antialias=True)
    return _turned_crop(image, view) if augment else image, meta


@pipeline_def
def _graph(
    reader: ReaderSpec, view: ViewSpec, distortion: DistortionSpec | None, target: str
) -> tuple[DataNode, DataNode, DataNode]:
    pipeline = Pipeline.current()
    (encoded,) = read(reader, EXTENSIONS[reader.store])
    image, image_shape = decode(encoded, reader, on_gpu=pipeline.device_id is not None)
    query, query_is_flipped = _crop(image, image_shape, view)
    restore = query if target == "aligned" else fn.flip(query, horizontal=fn.cast(query_is_flipped, dtype=types.INT32))
    key, _ = _crop(image, image_shape, view)
    query = _blur(_jitter(query, view), view)
    key = _blur(_jitter(key, view), view)
    if distortion is not None:
        shared = (distortion, view.crop_size_px, pipeline.max_batch_size)
        query = _distort(query, _RectangleSource(*shared, seed=(pipeline.seed, 0)))
        key = _distort(key, _RectangleSource(*shared, seed=(pipeline.seed, 1)))
    return query, key, restore


def read(reader: ReaderSpec, *extensions: str) -> list[DataNode]:
    """Return a sample's files of these extensions as they are stored, uint8 [num_bytes] on the CPU."""
    shuffling = (
        # The order of the tars must be the same for all ranks, so it can't follow from the rank's own seed.
        {"random_shuffle": True, "shuffle_after_epoch": True, "shuffle_after_epoch_seed": reader.seed % 2**31}
        if reader.shuffle
        else {}
    )
    files = fn.readers.webdataset(
        paths=list(reader.tar_paths),
        index_paths=list(reader.index_paths),
        ext=list(extensions),
        missing_component_behavior="error",
        initial_fill=reader.shuffle_buffer_samples,
        shard_id=reader.rank,
        num_shards=reader.world_size,
        **shuffling,
    )
    return list(files) if len(extensions) > 1 else [files]


def decode(encoded: DataNode, reader: ReaderSpec, *, on_gpu: bool) -> tuple[DataNode, DataNode]:
    """Return the decoded images, uint8 HWC with one channel, and their shapes (CPU, int64 [3])."""
    if reader.store == "raw":
        shape = [reader.size_px, reader.size_px, 1]
        pixels = encoded.gpu() if on_gpu else encoded
        return fn.reshape(pixels, shape=shape, layout="HWC"), types.Constant(shape, dtype=types.INT64)
    image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.GRAY)
    return image, fn.peek_image_shape(encoded)


def _crop(image: DataNode, image_shape: DataNode, view: ViewSpec) -> tuple[DataNode, DataNode]:
    """Random resized crop and flip in one resampling."""
    anchor, extent = fn.random_crop_generator(
        image_shape, random_area=list(view.crop_area), random_aspect_ratio=list(view.crop_aspect)
    )
    is_flipped = fn.random.coin_flip(probability=view.flip_probability, dtype=types.BOOL)
    flip = fn.stack(0.0, fn.cast(is_flipped, dtype=types.FLOAT))  # of (y, x), x alone
    if image.device == "gpu":
        crop = _resize(image, anchor, extent, flip, view)
    elif extent[1] > extent[0]:
        crop = _resize_transposed(image, anchor, extent, flip, view)
    else:
        crop = _resize(image, anchor, extent, flip, view)
    return crop, is_flipped


def _resize(image: DataNode, anchor: DataNode, extent: DataNode, flip: DataNode, view: ViewSpec) -> DataNode:
    """Resample a region given in (y, x): one whose ends are swapped, where `flip` is 1, is resized mirrored."""
    start, extent = fn.cast(anchor, dtype=types.FLOAT), fn.cast(extent, dtype=types.FLOAT)
    return fn.resize(
        image,
        size=[view.crop_size_px, view.crop_size_px],
        roi_start=start + extent * flip,
        roi_end=start + extent * (1.0 - flip),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


def _resize_transposed(image: DataNode, anchor: DataNode, extent: DataNode, flip: DataNode, view: ViewSpec) -> DataNode:
    """As `_resize`, with x and y swapped before and after.

    On a CPU, DALI's resampling is two to three times as slow for a region that is wider than high.
    """
    margin = extent // view.crop_size_px + 2  # what antialiasing reads beyond the region
    corner = dali_math.max(anchor - margin, 0)
    plane = fn.slice(
        fn.squeeze(image, axes=[2]),  # an axis for the one channel would make it three times as slow
        start=corner,
        shape=extent + 2 * margin,
        axes=[0, 1],
        out_of_bounds_policy="trim_to_shape",
    )
    anchor, extent, flip = (fn.stack(pair[1], pair[0]) for pair in (anchor - corner, extent, flip))
    crop = _resize(_transpose(plane), anchor, extent, flip, view)
    return _transpose(fn.squeeze(crop, axes=[2]))


def _transpose(plane: DataNode) -> DataNode:
    """[H, W] to [W, H, 1]."""
    transposed = fn.transpose(plane, perm=[1, 0], transpose_layout=False)
    return fn.expand_dims(transposed, axes=[2], new_axis_names="C")


def _turned_crop(image: DataNode, view: LabelledViewSpec) -> DataNode:
    """Crop, flip and rotation about the crop's centre in one resampling; black where the crop leaves the radiograph."""
    centre = view.crop_size_px / 2
    places = [float(px) for px in range(view.resized_size_px - view.crop_size_px + 1)]
    mirror = fn.random.coin_flip(probability=view.flip_probability, dtype=types.BOOL)
    angle = view.max_rotation_deg * fn.random.uniform(range=[-1.0, 1.0])
    from_crop_to_image = fn.transforms.combine(  # the first is applied first
        fn.transforms.translation(offset=[-centre, -centre]),
        fn.transforms.scale(scale=fn.stack(1.0 - 2.0 * fn.cast(mirror, dtype=types.FLOAT), 1.0)),
        fn.transforms.rotation(angle=angle),
        fn.transforms.translation(offset=centre + fn.random.uniform(values=places, shape=[2])),
    )
    return fn.warp_affine(
        image,
        matrix=from_crop_to_image,
        size=[view.crop_size_px, view.crop_size_px],
        interp_type=types.INTERP_LINEAR,
        fill_value=0,
    )


def _jitter(image: DataNode, view: ViewSpec) -> DataNode:
    """Brightness and contrast, in either order, each saturating as torchvision's ColorJitter on a grey image does."""
    brightness = fn.random.uniform(range=list(view.brightness))
    contrast = fn.random.uniform(range=list(view.contrast))
    brightness_first = fn.random.coin_flip(dtype=types.BOOL)
    if fn.random.coin_flip(probability=view.jitter_probability, dtype=types.BOOL):
        if brightness_first:
            output = _scale_contrast(_scale_brightness(image, brightness), contrast)
        else:
            output = _scale_brightness(_scale_contrast(image, contrast), brightness)
    else:
        output = image
    return output


def _scale_brightness(image: DataNode, factor: DataNode) -> DataNode:
    return fn.brightness(image, brightness=factor)


def _scale_contrast(image: DataNode, factor: DataNode) -> DataNode:
    mean = fn.reductions.mean(image, dtype=types.FLOAT)
    if image.device == "cpu":
        return fn.brightness_contrast(image, contrast=factor, contrast_center=mean)
    scaled = fn.brightness(image, brightness=factor, dtype=types.INT16)  # which holds the unsaturated sum
    return fn.cast(scaled + fn.cast(mean * (1.0 - factor), dtype=types.INT16), dtype=types.UINT8)


def _blur(image: DataNode, view: ViewSpec) -> DataNode:
    sigma = fn.random.uniform(range=list(view.blur_sigma_px))
    is_blurred = fn.random.coin_flip(probability=view.blur_probability, dtype=types.BOOL)
    # Below a quarter of a pixel the kernel's centre weighs over 0.998: no 8-bit pixel changes.
    if is_blurred & (sigma > NO_BLUR_SIGMA_PX):
        output = _smooth(image, sigma, max_sigma_px=view.blur_sigma_px[1])
    else:
        output = image
    return output


def _smooth(image: DataNode, sigma: DataNode, max_sigma_px: float) -> DataNode:
    """Gaussian blur, the Gaussian cut off at three sigma or further out."""
    if image.device == "gpu":
        return fn.gaussian_blur(image, sigma=sigma)
    # On a CPU `filter` is OpenCV's and takes a fifth of the time; rounding in between moves pixels by one at the most.
    radius_px = math.ceil(3 * max_sigma_px)
    distances_px = np.arange(-radius_px, radius_px + 1, dtype=np.float32)
    weights = dali_math.exp(types.Constant(-(distances_px**2) / 2) / (sigma * sigma))
    weights = weights / fn.reductions.sum(weights)
    along_x = fn.filter(image, fn.reshape(weights, shape=[1, distances_px.size]))
    return fn.filter(along_x, fn.reshape(weights, shape=[distances_px.size, 1]))


@dataclass(frozen=True)
class _RectangleSource:
    """Feeds rectangle tables. It has no state, so that DALI's checkpoints resume it; DALI would trace a closure."""

    spec: DistortionSpec
    view_size_px: int
    batch_size: int
    seed: tuple[int, ...]

    def __call__(self, batch: BatchInfo) -> Rectangles:
        return draw_rectangles(self.spec, self.view_size_px, self.batch_size, self.seed, batch.iteration)


def _distort(image: DataNode, source: _RectangleSource) -> DataNode:
    """Paste, then erase, what the rectangle tables say."""
    table = Rectangles(
        *fn.external_source(
            source,
            num_outputs=len(Rectangles._fields),
            batch_info=True,
            dtype=[types.BOOL, *[types.INT32] * 3, types.BOOL, *[types.INT32] * 2],
        )
    )
    if table.has_pastes:
        pasted = fn.multi_paste(
            *[image] * num_pastes(source.spec),
            in_anchors=table.paste_from,
            out_anchors=table.paste_to,
            shapes=table.paste_size,
        )
    else:
        pasted = image
    if table.has_erasures:
        distorted = fn.erase(
            pasted,
            anchor=fn.cast(table.erase_at, dtype=types.FLOAT),
            shape=fn.cast(table.erase_size, dtype=types.FLOAT),
        )
    else:
        distorted = pasted
    return distorted
