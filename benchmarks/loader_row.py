"""One row of bench_loader: how a loader's batches are counted and timed, in the process that it is called in."""

import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.timing import Figures, cpu_seconds, peak_memory_mib
from pipeline.spec import Batch


def measure_batches(
    open_batches: Callable[[], Iterator[Batch]], batch_size: int, num_workers: int, device: str, seconds: float
) -> Figures:
    """Open a loader, draw until it runs steadily, then for `seconds` and a little more by the clock.

    The clock starts and stops after a multiple of `num_workers` batches: worker processes finish that many together.
    """
    free_bytes = 0
    if device == "cuda":
        torch.ones(1, device=device)  # CUDA's own start is no loader's
        free_bytes = torch.cuda.mem_get_info()[0]
    started = time.perf_counter()
    batches = open_batches()
    next(batches)
    _wait_for(device)
    first_batch_seconds = time.perf_counter() - started
    for _ in range(num_workers - 1):
        next(batches)
    _draw(batches, num_workers, 0.5, device)
    cpu_started, started = cpu_seconds(), time.perf_counter()
    num_images = batch_size * _draw(batches, num_workers, seconds, device)
    elapsed, cpu_used = time.perf_counter() - started, cpu_seconds() - cpu_started
    figures = {
        "images_per_second": num_images / elapsed,
        "images_per_second_per_core": num_images / elapsed / num_workers,
        "cpu_seconds_per_1000_images": cpu_used / num_images * 1000,
        "peak_memory_mib": peak_memory_mib(),
        "first_batch_seconds": first_batch_seconds,
    }
    if device == "cuda":
        figures["cores_for_1000_images_per_second"] = figures["cpu_seconds_per_1000_images"]
        figures["gpu_memory_mib"] = (free_bytes - torch.cuda.mem_get_info()[0]) / 2**20
    return figures


def _draw(batches: Iterator[Batch], multiple: int, seconds: float, device: str) -> int:
    """Draw a multiple of so many batches, for so long at least; return how many."""
    started, num_drawn = time.perf_counter(), 0
    while num_drawn == 0 or num_drawn % multiple or time.perf_counter() < started + seconds:
        next(batches)
        num_drawn += 1
    _wait_for(device)
    return num_drawn


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def to_device(batches: Iterator[Batch], device: str) -> Iterator[Batch]:
    """Copy batches from pinned host memory as a training loop does, without waiting."""
    for batch in batches:
        yield Batch(*(images.to(device, non_blocking=True) for images in batch))
