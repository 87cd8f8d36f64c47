"""Which device and precision a run uses: what was asked for, or the best there is."""

from contextlib import AbstractContextManager

import torch

from errors import UserError

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def choose_device(asked: str) -> torch.device:
    """Return the device's kind."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU that it can use; see nvidia-smi, or use --device cpu")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(asked: str, device: torch.device) -> str:
    """Return bf16, fp16 or fp32."""
    if device.type == "cpu":
        if asked == "fp16":
            raise UserError("--precision fp16 is for GPUs: on a CPU use bf16 or fp32")
        if asked == "auto":
            has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - there is no public name for it
            return "bf16" if has_bf16 else "fp32"
        return asked
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if asked == "bf16" and not has_bf16:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has none; use fp16")
    return ("bf16" if has_bf16 else "fp16") if asked == "auto" else asked


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Forward passes run in here; with fp32 it does nothing."""
    dtype = AUTOCAST_DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
