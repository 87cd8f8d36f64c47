import pytest
import torch

from errors import UserError
from model.device import autocast, choose_device, choose_precision

CPU = torch.device("cpu")


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert choose_device("auto", 0).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu", 3) == CPU


def test_a_rank_without_a_gpu_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match="rank 99 of this machine has no GPU"):
        choose_device("cuda", 99)


def test_fp16_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match="fp16 is for GPUs"):
        choose_precision("fp16", CPU)
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("auto", CPU) in {"bf16", "fp32"}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_precision_it_is_named_after(precision: str, dtype: torch.dtype) -> None:
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
