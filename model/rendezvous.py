"""Where ranks find each other: torchrun's store, told apart from what an earlier start has left in it.

torchrun keeps one store over all of `--max-restarts`, and a rank that looks up an address there may be given that of a
rank that has died. (Its TORCHELASTIC_RESTART_COUNT is no help: on several nodes it is not the same everywhere.)
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from errors import Unfinished

_POLL_S = 0.05


def connect(timeout: timedelta) -> dist.TCPStore:
    """A connection of one's own to the store at MASTER_ADDR and MASTER_PORT; without torchrun, rank 0 holds it."""
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not is_torchruns and os.environ["RANK"] == "0",
        timeout=timeout,
        multi_tenant=True,
    )


def agree_on_start(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta) -> str:
    """A name for this start, the same on all of its ranks, that no earlier one had.

    Rank 0 thinks of a name and waits until every rank has answered to it with a word of its own; then it publishes the
    words. A rank that has read an earlier start's name won't find its own word there, and reads again.

    Raises:
        Unfinished: The ranks didn't come within the time.
    """
    mine = uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("start", mine)
        answers = [f"{mine}/{other}" for other in range(1, num_ranks)]
        _wait_for(store, answers, until)
        store.set(f"{mine}/all", ",".join([mine, *(store.get(answer).decode() for answer in answers)]))
        return mine
    while True:
        _wait_for(store, ["start"], until)
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", mine)
        while store.get("start").decode() == start:
            if store.check([f"{start}/all"]) and store.get(f"{start}/all").decode().split(",")[rank] == mine:
                return start
            _pause(until)


def _wait_for(store: dist.Store, keys: list[str], until: float) -> None:
    while keys and not store.check(keys):
        _pause(until)


def _pause(until: float) -> None:
    if time.monotonic() > until:
        raise Unfinished("not all ranks have come: see why they did not start, and give the same command again")
    time.sleep(_POLL_S)
