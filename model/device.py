"""Which device and precision a run uses: what was asked for, or the best there is."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from errors import UserError

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def choose_device(asked: str, local_rank: int) -> torch.device:
    """Return the device that a rank's number on its machine gives it."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus <= local_rank:
        raise UserError(
            f"rank {local_rank} of this machine has no GPU: torch finds {num_gpus} that it can use (see nvidia-smi); "
            "start fewer ranks, or use --device cpu"
        )
    return torch.device("cuda", local_rank)


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


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, as losses need it under autocast; in fp64, in which the tests compare, it stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def wait_for(device: torch.device) -> None:
    """Return once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
