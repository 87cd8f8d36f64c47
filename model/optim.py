"""Fused optimizers, apex's or torch's own, and the learning rate's schedule."""

import importlib
import math
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import nn

from errors import UsageError, UserError

APEX_HELP = (
    "build it from source (https://github.com/NVIDIA/apex, with its C++ and CUDA extensions) or use NVIDIA's PyTorch "
    "container; the package called apex on the index is another one. Or pass --fused torch"
)


def make_sgd(
    params: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    fused: str,
    device: torch.device,
) -> torch.optim.Optimizer:
    """SGD as one fused kernel over all parameters.

    `fused` is `apex`, `torch`, or `auto`: apex's where it can be imported and the device is a GPU, else torch's.
    Call `zero_grad()` without arguments: apex's takes none.

    Raises:
        UserError: `apex` was asked for and can't be had.
    """
    if apex := _apex_optimizers(fused, device):
        return apex.FusedSGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    sgd = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    for parameter in sgd.param_groups[0]["params"]:
        # As the first step would make it: were it skipped for an overflow in fp16, torch would go on with stray memory.
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def make_adam(
    params: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    fused: str,
    device: torch.device,
) -> torch.optim.Optimizer:
    """Adam without weight decay, fused in the same way as in `make_sgd`."""
    if apex := _apex_optimizers(fused, device):
        return apex.FusedAdam(params, lr=lr, betas=betas)
    return torch.optim.Adam(params, lr=lr, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set it for the next step; where it is kept in a tensor, in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate_in_tensor(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make torch's fused SGD or Adam fit for capture in a CUDA graph, which reads the learning rate from the device.

    Raises:
        UsageError: It is apex's.
    """
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam):
        raise UsageError("--cuda-graphs takes torch's optimizers: pass --fused torch")
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


def _apex_optimizers(fused: str, device: torch.device) -> ModuleType | None:
    """The module `apex.optimizers` if it is to be used."""
    if fused == "torch" or (fused == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise UserError(f"--fused apex runs on GPUs only, and this run is on {device.type}: pass --fused torch")
    try:
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")  # apex's compiled kernels: a Python-only build lacks them
    except ImportError as error:
        if fused == "auto":
            return None
        raise UserError(f"--fused apex: NVIDIA's apex can't be imported ({error}): {APEX_HELP}") from None
    return optimizers


def learning_rate(base: float, schedule: str, epoch: int, epochs: int, drop_epochs: Sequence[int] = ()) -> float:
    """The learning rate of an epoch, counted from 0.

    `cosine`: base * (1 + cos(pi * epoch / epochs)) / 2, which would be 0 at the end (SGDR, equation 5,
    https://arxiv.org/abs/1608.03983). `step`: base, and a tenth of it again from each of `drop_epochs` on.
    """
    if schedule == "cosine":
        return base * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return base * 0.1 ** sum(epoch >= drop for drop in drop_epochs)
