"""Where the data path's CPU time goes, stage by stage, and how near that is to DALI's own kernels.

    python -m benchmarks.bench_stages                                   # phantoms of 1024 px; some four minutes
    python -m benchmarks.bench_stages --images ChestX-ray14/images --work /nvme/benchmark
    python -m benchmarks.bench_stages --quick                           # does everything run?

The graph is measured with its stages switched on one after the other, the rows in turn, several times over; figures are
medians. In microseconds of CPU time, user and system, of all threads, per image:

    cpu_us_per_image      with all stages up to this one; images/s likewise
    stage_us_per_image    what this stage adds
    kernel_us_per_image   what the operators at its core take on a batch that lies ready: no reading, no conditionals

An image is one radiograph: two views and a target. Every core has a thread.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
import tyro
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from benchmarks.inputs import ImageBenchmark, pack_images
from benchmarks.report import describe_hardware, make_result, publish
from benchmarks.timing import Figures, measure_in_turn, summarise
from errors import exits_on_user_error
from pipeline.distortion import Rectangles, draw_rectangles, num_pastes
from pipeline.graph import ReaderSpec, decode, read
from pipeline.loader import LoaderSpec, PretrainLoader
from pipeline.packing import EXTENSIONS
from pipeline.shardset import ShardSet
from pipeline.spec import DistortionSpec, ViewSpec

STORE, SIZE_PX = "raw-512", 512
BATCH_SIZE = 64
VIEW = ViewSpec()
DISTORTION = DistortionSpec()
NUM_VIEWS = 2
CROP_ONLY = replace(VIEW, jitter_probability=0, blur_probability=0)
GRAPHS: dict[str, tuple[ViewSpec, DistortionSpec | None]] = {
    "crops": (CROP_ONLY, None),
    "jitter": (replace(CROP_ONLY, jitter_probability=VIEW.jitter_probability), None),
    "blur": (VIEW, None),
    "distortion": (VIEW, DISTORTION),
}
STAGES = ("reading", *GRAPHS, "copy-out")
KERNELS_OF = {
    "crops": {"resize": NUM_VIEWS},
    "jitter": {
        "brightness": NUM_VIEWS * VIEW.jitter_probability,
        "contrast": NUM_VIEWS * VIEW.jitter_probability,
    },
    "blur": {"filter": NUM_VIEWS * VIEW.blur_probability},
    "distortion": {
        "multi_paste": NUM_VIEWS * (DISTORTION.shuffle_probability + DISTORTION.outer_cutout_probability),
        "erase": NUM_VIEWS * DISTORTION.cutout_probability,
    },
}
"""By stage: operators, and how often an image meets each."""


# --- the graph, up to a stage ---------------------------------------------------------------------------------------


def open_stage(stage: str, source: str, num_threads: int) -> Callable[[], Any]:
    """Return a function that draws a batch from the shard set `source` through the stages up to this one."""
    view, distortion = GRAPHS.get(stage, (VIEW, DISTORTION))
    shard_set = ShardSet.open(source)
    spec = LoaderSpec((shard_set,), view, distortion, BATCH_SIZE, 0, torch.device("cpu"), num_threads=num_threads)
    if stage == "copy-out":
        return partial(next, chain.from_iterable(repeat(PretrainLoader(spec))))
    if stage != "reading":
        return spec.build_pipeline("train", shuffle=True, batch_size=BATCH_SIZE, seed=0).run
    split = shard_set.split("train")
    reader = ReaderSpec(
        split.tar_paths,
        split.index_paths,
        shard_set.store,
        shard_set.size_px,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
    )
    return _start(_reading_graph(reader, batch_size=BATCH_SIZE, num_threads=num_threads, device_id=None))


def _start(graph: Pipeline) -> Callable[[], Any]:
    graph.build()
    return graph.run


@pipeline_def
def _reading_graph(reader: ReaderSpec) -> DataNode:
    (encoded,) = read(reader, EXTENSIONS[reader.store])
    return decode(encoded, reader, on_gpu=False)[0]


# --- kernels alone --------------------------------------------------------------------------------------------------


def open_kernel(kernel: str, num_threads: int) -> Callable[[], Any]:
    """Return a function that runs an operator once for each image of a batch of noise; `nothing` is the run alone."""
    return _start(_kernel_graph(kernel, batch_size=BATCH_SIZE, num_threads=num_threads, device_id=None))


@pipeline_def
def _kernel_graph(kernel: str) -> DataNode:
    side_px = SIZE_PX if kernel == "resize" else VIEW.crop_size_px
    image = _constant(np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, side_px, side_px, 1), np.uint8), "HWC")
    return KERNELS[kernel](image)


def _constant(batch: np.ndarray, layout: str | None = None) -> DataNode:
    """[BATCH_SIZE, ...], the same in every run."""
    return fn.external_source(lambda: batch, layout=layout, no_copy=True)


def _resize(image: DataNode) -> DataNode:
    """Resize regions of the sizes that crops have, all higher than wide: DALI is faster at these on a CPU."""
    shape = types.Constant([SIZE_PX, SIZE_PX, 1], dtype=types.INT64)
    _, extent = fn.random_crop_generator(
        shape, random_area=list(VIEW.crop_area), random_aspect_ratio=list(VIEW.crop_aspect)
    )
    extent = fn.cast(fn.stack(fn.reductions.max(extent), fn.reductions.min(extent)), dtype=types.FLOAT)
    return fn.resize(image, size=[VIEW.crop_size_px] * 2, roi_start=[0.0, 0.0], roi_end=extent, antialias=True)


def _contrast(image: DataNode) -> DataNode:
    mean = fn.reductions.mean(image, dtype=types.FLOAT)
    return fn.brightness_contrast(image, contrast=fn.random.uniform(range=list(VIEW.contrast)), contrast_center=mean)


def _filter(image: DataNode) -> DataNode:
    """Convolve along x and y with as many weights as the widest blur has."""
    weights = np.full(2 * math.ceil(3 * VIEW.blur_sigma_px[1]) + 1, 0.1, np.float32)
    return fn.filter(fn.filter(image, types.Constant(weights[None])), types.Constant(weights[:, None]))


def _multi_paste(image: DataNode) -> DataNode:
    table = _draw_rectangles("shuffle_probability")
    return fn.multi_paste(
        *[image] * num_pastes(DISTORTION),
        in_anchors=_constant(table.paste_from),
        out_anchors=_constant(table.paste_to),
        shapes=_constant(table.paste_size),
    )


def _erase(image: DataNode) -> DataNode:
    table = _draw_rectangles("cutout_probability")
    at, size = (_constant(corners.astype(np.float32)) for corners in (table.erase_at, table.erase_size))
    return fn.erase(image, anchor=at, shape=size)


def _draw_rectangles(probability: str) -> Rectangles:
    """Draw tables with one kind of distortion only, named by its setting."""
    others = ("cutout_probability", "outer_cutout_probability", "shuffle_probability")
    spec = replace(DISTORTION, **dict.fromkeys(others, 0.0) | {probability: 1.0})
    return draw_rectangles(spec, VIEW.crop_size_px, BATCH_SIZE, (0,), 0)


KERNELS: dict[str, Callable[[DataNode], DataNode]] = {
    "nothing": lambda image: image.shape(),
    "resize": _resize,
    "brightness": lambda image: fn.brightness(image, brightness=fn.random.uniform(range=list(VIEW.brightness))),
    "contrast": _contrast,
    "filter": _filter,
    "multi_paste": _multi_paste,
    "erase": _erase,
}

# --- measuring ------------------------------------------------------------------------------------------------------


def measure(draw: Callable[[], Any], seconds: float) -> Figures:
    """Draw batches for `seconds` by the clock, once it runs steadily."""
    _draw_for(draw, seconds / 4)
    cpu_started, started = time.process_time(), time.perf_counter()
    num_images = BATCH_SIZE * _draw_for(draw, seconds)
    elapsed, cpu_used = time.perf_counter() - started, time.process_time() - cpu_started
    return {"images_per_second": num_images / elapsed, "cpu_us_per_image": cpu_used / num_images * 1e6}


def _draw_for(draw: Callable[[], Any], seconds: float) -> int:
    """Draw batches for so long, two at least; return how many."""
    started, num_drawn = time.perf_counter(), 0
    while num_drawn < 2 or time.perf_counter() < started + seconds:
        draw()
        num_drawn += 1
    return num_drawn


def tabulate(rounds: list[dict[str, Figures]]) -> list[dict[str, Any]]:
    """Turn the rounds' figures of stages and kernels into a row for each stage."""
    rows = []
    for round_ in rounds:
        cost_us = {name: figures["cpu_us_per_image"] for name, figures in round_.items()}
        before_us, stages = 0.0, {}
        for stage in STAGES:
            kernels = KERNELS_OF.get(stage, {})
            stages[stage] = round_[stage] | {"stage_us_per_image": cost_us[stage] - before_us}
            if kernels:
                kernel_us = sum(number * (cost_us[kernel] - cost_us["nothing"]) for kernel, number in kernels.items())
                stages[stage]["kernel_us_per_image"] = kernel_us
            before_us = cost_us[stage]
        rows.append(stages)
    return summarise(rows, baseline="")


@exits_on_user_error
def main() -> None:
    """Measure, print, keep."""
    settings = tyro.cli(ImageBenchmark, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    num_cores = settings.use_cores()
    hardware = describe_hardware("cpu")
    seconds = 0.2 if settings.quick else 2.0
    with settings.work_folder() as work:
        source = work / STORE
        pack_images(settings.find_images(work), STORE, source, num_cores)

        draws = {stage: open_stage(stage, str(source), num_cores) for stage in STAGES}
        draws |= {kernel: open_kernel(kernel, num_cores) for kernel in KERNELS}
        rounds = measure_in_turn(list(draws), settings.num_rounds, lambda name: measure(draws[name], seconds))
    rows = tabulate(rounds)
    described = settings.describe() | {"store": STORE, "batch_size": BATCH_SIZE, "seconds": seconds}
    publish(make_result("bench_stages", hardware, described, rows), settings.report_folder)


if __name__ == "__main__":
    main()
