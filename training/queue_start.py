"""What the queue holds before the first step."""

import math

import torch

from training.run import Meter, Run, say
from training.saving import Keeper
from training.step import draw_permutation


def fill_queue(run: Run, keeper: Keeper) -> None:
    """Begin with keys of radiographs in the queue: of an epoch at most, repeated where it holds more.

    Random directions, MoCo's beginning, are told from every key at a glance. While they last, InfoNCE falls where all
    radiographs are embedded alike, and a short run may not come out of that again.
    """
    size, batch_size = run.settings.moco_k, run.settings.batch_size
    num_batches = min(math.ceil(size / batch_size), run.loader.steps_per_epoch)
    say(f"filling the queue of {size} with the keys of {num_batches} batches")
    keys, permutation = [], draw_permutation(run)
    for i, batch in zip(range(num_batches), run.loader, strict=False):
        keeper.moved(2 * i + 1)
        with run.autocast():
            keys.append(run.model.encode_keys(batch.key, permutation).all)
        keeper.moved(2 * i + 2)
        if keeper.is_to_stop():
            keeper.stop(Meter())
    run.model.enqueue(torch.cat(keys).repeat(math.ceil(size / (num_batches * batch_size)), 1)[:size])
    run.has_queue = True
    run.loader.begin_here()
