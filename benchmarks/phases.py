"""Where a step's time goes: CUDA events on a GPU, the clock on a CPU, at the marks that the steps make."""

import itertools
import statistics
import time

import torch

PHASES = (
    *("forward_key", "forward_query", "losses", "backward", "discriminator", "optimizers", "ema_and_queue"),
    "communication",
)
"""What `training.step.train_step` and the plain step mark; backward includes what it waits for gradients' averages."""


class PhaseTimer:
    """Called with a phase's name when a part of it has ended; a phase may have several parts in a step."""

    def __init__(self, device: torch.device) -> None:
        """Time what `device` does."""
        self._on_gpu = device.type == "cuda"
        self._steps: list[list[tuple[str, torch.cuda.Event | float]]] = []

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._steps.append([("", self._now())])

    def __call__(self, phase: str) -> None:
        """Note that what was done since the last call was part of this phase."""
        self._steps[-1].append((phase, self._now()))

    def medians_ms(self) -> dict[str, float]:
        """The time of each phase that occurred, in ms: medians over the steps. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        sums = [self._sum_up(step) for step in self._steps]
        return {name: statistics.median(step[name] for step in sums) for name in PHASES if name in sums[0]}

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _sum_up(self, step: list[tuple[str, torch.cuda.Event | float]]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for (_, start), (phase, stop) in itertools.pairwise(step):
            elapsed_ms = start.elapsed_time(stop) if self._on_gpu else 1000 * (stop - start)
            sums[phase] = sums.get(phase, 0.0) + elapsed_ms
        return sums
