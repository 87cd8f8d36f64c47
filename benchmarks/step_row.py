"""One row of bench_step or bench_scaling: steps on a synthetic batch, timed, in the process that it is called in."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.phases import PhaseTimer
from benchmarks.plain_step import PlainStep, plain_batch
from benchmarks.timing import Figures, peak_memory_mib
from errors import UserError
from model import distributed
from model.device import AUTOCAST_DTYPES, choose_device, wait_for
from pipeline.spec import Batch
from settings import Settings
from training.graphs import GraphedStep
from training.learner import Learner, build_learner
from training.step import ignore, train_step

Step = Callable[[Callable[[str], None]], object]
"""A step on a batch of its own; it calls what it is given at the end of each phase."""

NUM_WARM_UP_STEPS = {"cpu": 2, "cuda": 10}  # cuDNN tries its kernels, torch.compile compiles, a graph is captured


def measure(settings: dict[str, Any], seconds: float, *, is_plain: bool = False) -> Figures:
    """Measure a step for about `seconds`; under torchrun on every rank, with the same figures: means over the ranks.

    Args:
        settings: Of `Settings`; its batch size counts all ranks.
        seconds: How long to measure, after the warm-up.
        is_plain: Measure the plain step instead of ours: fp32, one rank.
    """
    chosen = Settings.from_dict(settings, "benchmark")
    device = choose_device(chosen.device, distributed.local_rank())
    distributed.init_from_environment(device)
    try:
        figures = _measure(chosen, device, seconds, is_plain=is_plain)
        means = distributed.all_reduce_mean(torch.tensor(list(figures.values()), dtype=torch.float64, device=device))
        return dict(zip(figures, means.tolist(), strict=True))
    except torch.OutOfMemoryError:
        raise UserError(f"a batch of {chosen.batch_size} is too big for this GPU: pass --batch-sizes") from None
    finally:
        distributed.shutdown()


def _measure(settings: Settings, device: torch.device, seconds: float, *, is_plain: bool) -> Figures:
    flops_per_image = _count_flops(settings, device, is_plain=is_plain)
    peak = matmul_flops_per_second(device, "fp32" if is_plain else settings.precision)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    take_step = make_step(settings, device, is_plain=is_plain)
    for _ in range(NUM_WARM_UP_STEPS[device.type]):
        take_step(ignore)
    wait_for(device)
    started = time.perf_counter()
    take_step(ignore)
    wait_for(device)
    num_steps = max(2, round(seconds / (time.perf_counter() - started)))
    num_steps = int(distributed.all_reduce_mean(torch.tensor(float(num_steps), device=device)).item())  # on all ranks
    timer = PhaseTimer(device)
    started = time.perf_counter()
    for _ in range(num_steps):
        timer.begin_step()
        take_step(timer)
    wait_for(device)
    step_s = (time.perf_counter() - started) / num_steps
    phases = {f"{phase}_ms": duration for phase, duration in timer.medians_ms().items()}
    rate = settings.batch_size / step_s
    rate_per_rank = rate / distributed.world_size()
    on_gpu = device.type == "cuda"
    return {
        "images_per_second": rate,
        "images_per_second_per_gpu": rate_per_rank,
        "batch_size": settings.batch_size,
        "step_ms": 1000 * step_s,
        **phases,
        "gflop_per_image": flops_per_image / 1e9,
        "tflop_per_second": flops_per_image * rate_per_rank / 1e12,
        "matmul_peak_tflop_per_second": peak / 1e12,
        "share_of_matmul_peak": flops_per_image * rate_per_rank / peak,
        "peak_memory_mib": torch.cuda.max_memory_reserved() / 2**20 if on_gpu else peak_memory_mib(),
    }


def make_step(settings: Settings, device: torch.device, *, is_plain: bool) -> Step:
    """The step that the settings ask for, or the plain one, on one synthetic batch that lies on the device."""
    size_px, num_images = settings.crop_size, settings.batch_size // distributed.world_size()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, num_images, 1, size_px, size_px), dtype=torch.uint8, generator=generator)
    batch = Batch(*images.to(device))
    learner = build_learner(settings, device)
    if is_plain:
        return _make_plain_step(learner, batch)
    graphed = GraphedStep(learner) if settings.cuda_graphs else None

    def take_step(mark: Callable[[str], None]) -> torch.Tensor:
        terms = graphed(learner, batch) if graphed else train_step(learner, batch, mark)
        learner.step += 1
        return terms

    return take_step


def _make_plain_step(learner: Learner, batch: Batch) -> Step:
    settings = learner.settings
    plain = PlainStep(
        learner.model,
        settings.arch,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        disc_lr=settings.disc_lr,
    )
    floats = plain_batch(batch)
    return lambda mark: plain(floats, mark)


def _count_flops(settings: Settings, device: torch.device, *, is_plain: bool) -> float:
    """Multiplications and additions of a step for one image of one rank, counted on two images a rank in eager mode."""
    num_counted = 2 * distributed.world_size()
    small = replace(settings, batch_size=num_counted, accumulate=1, compile=False, cuda_graphs=False)
    take_step = make_step(small, device, is_plain=is_plain)
    with FlopCounterMode(display=False) as counter:
        take_step(ignore)
    return counter.get_total_flops() / 2


def matmul_flops_per_second(device: torch.device, precision: str) -> float:
    """The device's own peak, measured: the fastest of ten square matrix products, large enough to fill it."""
    size = 8192 if device.type == "cuda" else 1536
    dtype = AUTOCAST_DTYPES[precision] or torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions may
    durations_s = []
    for _ in range(10):
        wait_for(device)
        started = time.perf_counter()
        left @ right
        wait_for(device)
        durations_s.append(time.perf_counter() - started)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * size**3 / min(durations_s)
