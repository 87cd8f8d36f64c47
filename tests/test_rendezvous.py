from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from errors import Unfinished
from model.rendezvous import agree_on_start

RANKS = 3


def start(store: dist.Store, ranks: list[int], seconds: float = 20) -> list[str]:
    """Return what each of some ranks, which come in this order, takes for the name of the start."""
    with ThreadPoolExecutor(RANKS) as pool:
        names = [pool.submit(agree_on_start, store, rank, RANKS, timedelta(seconds=seconds)) for rank in ranks]
        return [name.result() for name in names]


def test_all_ranks_agree_on_a_name_that_no_earlier_start_had() -> None:
    store = dist.HashStore()
    names = [start(store, ranks) for ranks in ([0, 1, 2], [2, 1, 0], [1, 0, 2])]
    assert all(len(set(of_one_start)) == 1 for of_one_start in names)
    assert len({of_one_start[0] for of_one_start in names}) == 3


def test_a_start_that_broke_off_does_not_mislead_the_next() -> None:
    store = dist.HashStore()
    for broken in ([0], [1], [0, 2]):
        with pytest.raises(Unfinished, match="not all ranks have come"):
            start(store, broken, seconds=0.3)
    assert len(set(start(store, [2, 1, 0]))) == 1
