"""The steps that fp16's loss scaler skips, because a gradient had overflowed."""

import torch


class SkippedSteps:
    """Counts them on the device: the scale goes down exactly at those steps. The host waits for nothing."""

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        self._scaler = scaler
        self._one = torch.ones(1, device=device)
        self._scale = scaler.scale(self._one)
        self._count = torch.zeros(1, device=device)

    def add_step(self) -> None:
        """Look at the scale after a step, that is after `scaler.update()`."""
        if self._scaler.is_enabled():
            scale = self._scaler.scale(self._one)
            self._count += scale < self._scale
            self._scale = scale

    def line(self) -> dict[str, float]:
        """How many there were since the last call, for a line of metrics; nothing where no loss is scaled. Waits."""
        if not self._scaler.is_enabled():
            return {}
        count = self._count.item()
        self._count.zero_()
        return {"skipped_steps": count}
