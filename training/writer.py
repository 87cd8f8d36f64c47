"""Checkpoints written beside the training, so that a step waits for a copy in memory and not for the disk."""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import Unfinished, UserError
from model.checkpoint import link, save_checkpoint


class CheckpointWriter:
    """Writes a run's `last.pt`, keeps the one before as `previous.pt`, and links `best.pt` to the best.

    One file at a time: the copy of the next state waits until the last one is written. What is not finite is not
    written. An error comes out of the next `write` or of `wait`.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether `wait` would raise; never waits itself."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def write(self, state: dict[str, Any], *, is_best: bool) -> None:
        """Copy the state, and write the copy while the caller goes on changing the state.

        Raises:
            UserError: What was written before could not be; see `wait`.
        """
        self.wait()
        copied = self._copy.take(state)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._pending = self._thread.submit(self._write, copied, is_best)

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            Unfinished: The disk refused.
            UserError: The state was not finite.
        """
        if self._pending is not None:
            self._pending.result()

    def _write(self, state: dict[str, Any], is_best: bool) -> None:
        last, previous = self._folder / "last.pt", self._folder / "previous.pt"
        kept = f"{last} is from before" if last.exists() else "nothing was saved before"
        # A term of the loss is named as such, whichever rank's it is
        if wrong := list(dict.fromkeys(re.sub(r"^meters\.\d+\.", "", name) for name in find_not_finite(state))):
            some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise UserError(
                f"the run diverged by step {state['step']}: {some} not finite; {kept}: try a smaller --lr or fp32"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(last, state, previous)
            if is_best:
                link(last, self._folder / "best.pt")
        except OSError as error:
            raise Unfinished(
                f"{last}: step {state['step']} can't be saved ({error.strerror}); {kept}: make room, "
                "and the same command goes on from there"
            ) from None


class HostCopy:
    """Copies nested tensors to the host's memory, into the same buffers each time: page-locked ones, from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def take(self, value: Any, path: tuple[object, ...] = ()) -> Any:
        """A copy in dicts, lists and tuples like the value's; from a GPU it is there after the stream's next sync."""
        if isinstance(value, Tensor):
            buffer = self._buffers.get(path)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                self._buffers[path] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return type(value)((key, self.take(item, (*path, key))) for key, item in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self.take(item, (*path, i)) for i, item in enumerate(value))
        return value


def find_not_finite(value: Any, name: str = "") -> list[str]:
    """The names of the tensors, in nested dicts, lists and tuples, that hold a number which is none or infinite."""
    if isinstance(value, Tensor):
        return [] if not value.is_floating_point() or value.isfinite().all() else [name]
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return []
    return [wrong for key, item in items for wrong in find_not_finite(item, f"{name}.{key}" if name else key)]
