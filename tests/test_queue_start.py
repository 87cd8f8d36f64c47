import copy
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train
from errors import Unfinished
from model import distributed
from model.moco import shuffle_permutation
from settings import Settings
from tests.small_runs import CPU, assert_ended_alike, keeper_of, last_checkpoint, small
from tests.test_distributed import RANKS, run_on_ranks
from training import queue_start
from training.run import Run, build
from training.saving import Keeper

BATCH = 4
SAYS = "filling the queue"


def plain_keys(network: nn.Module, images: Tensor, permutation: Tensor) -> Tensor:
    """Keys [B, C] of a global batch, its shuffled halves normalised each by itself: two groups, or two ranks."""
    keys = torch.empty(len(images), 128)
    for places in permutation.chunk(2):
        keys[places] = network(images[places])[0]
    return keys


@torch.no_grad()
def filled(settings: Settings) -> tuple[Run, Tensor]:
    """A run whose queue was filled, and the keys of its first epoch, made one batch after the other."""
    run, other = build(settings, CPU), build(settings, CPU)
    network = copy.deepcopy(other.model.key)
    for layer in network.modules():
        if hasattr(layer, "num_groups"):
            layer.num_groups = 1
    permutation = shuffle_permutation(settings.batch_size, seed=settings.seed << 32)
    keys = [plain_keys(network, distributed.all_gather(batch.key), permutation) for batch in other.loader]
    queue_start.fill_queue(run, keeper_of(run))
    return run, torch.cat(keys)


@pytest.mark.parametrize("size", [10, 70])
def test_the_queue_is_filled_with_an_epochs_keys_repeated_where_it_holds_more(
    shard_folder: Path, tmp_path: Path, size: int
) -> None:
    run, keys = filled(small(shard_folder, tmp_path, "di", moco_k=size, key_bn_groups=2))
    assert len(keys) == BATCH * run.loader.steps_per_epoch < 35
    torch.testing.assert_close(run.model.queue, torch.cat((keys, keys, keys))[:size], rtol=0, atol=1e-5)
    assert run.model.queue_ptr.item() == 0
    assert (run.step, run.loader.num_batches_drawn) == (0, 0)


def fill_on_rank(folder: Path) -> dict[str, Tensor]:
    shard_folder = Path((folder / "shards.txt").read_text())
    run, keys = filled(small(shard_folder, folder / "run", "di", moco_k=10))
    return {"queue": run.model.queue, "keys": keys}


def test_two_ranks_fill_their_queues_with_the_same_keys(shard_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards.txt").write_text(str(shard_folder))
    ranks = run_on_ranks(fill_on_rank, tmp_path)
    assert len(ranks) == RANKS == 2
    assert torch.equal(ranks[0]["queue"], ranks[1]["queue"])
    torch.testing.assert_close(ranks[0]["queue"], ranks[0]["keys"][:10], rtol=0, atol=1e-5)


def test_filling_moves_no_weight_and_training_goes_on_with_the_next_batch(shard_folder: Path, tmp_path: Path) -> None:
    settings = small(shard_folder, tmp_path, moco_k=10)
    run, other = build(settings, CPU), build(settings, CPU)
    queue_start.fill_queue(run, keeper_of(run))
    weights = dict(other.model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in run.model.named_parameters())
    *_, fourth = (batch for batch, _ in zip(other.loader, range(4), strict=False))
    batches = list(run.loader)
    assert len(batches) == run.loader.steps_per_epoch
    assert all(map(torch.equal, batches[0], fourth))


def test_only_a_queue_of_random_directions_is_filled(
    shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not one that was taken from a checkpoint, to go on from or to start from; but one beside exported weights."""
    first = small(shard_folder, tmp_path / "first", "dir", max_steps=2)
    checkpoint, export = (tmp_path / "first" / name for name in ("checkpoints/last.pt", "export/unet.pth"))
    runs = {
        "first": (first, True),
        "more of it": (small(shard_folder, tmp_path / "first", "dir", max_steps=3), False),
        "from its checkpoint": (small(shard_folder, tmp_path / "b", max_steps=2, init_from=str(checkpoint)), False),
        "from its export": (small(shard_folder, tmp_path / "c", "dir", max_steps=2, init_from=str(export)), True),
    }
    for name, (settings, is_filled) in runs.items():
        train.pretrain(settings, CPU)
        assert (SAYS in capsys.readouterr().out) == is_filled, name


def test_a_random_start_leaves_the_places_that_no_step_has_reached(shard_folder: Path, tmp_path: Path) -> None:
    settings = small(shard_folder, tmp_path, "di", max_steps=2, queue_start="random")
    train.pretrain(settings, CPU)
    queue, start = last_checkpoint(tmp_path)["model"]["queue"], build(settings, CPU).model.queue
    assert torch.equal(queue[2 * BATCH :], start[2 * BATCH :])
    assert not (queue[: 2 * BATCH] == start[: 2 * BATCH]).any()


def test_a_run_asked_to_stop_while_it_fills_the_queue_starts_anew_and_ends_alike(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.pretrain(small(shard_folder, tmp_path / "whole"), CPU)
    has_moved = Keeper.moved

    def asked(keeper: Keeper, num_parts: int = 0) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        while not keeper.is_asked_to_stop:
            pass
        has_moved(keeper, num_parts)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "moved", asked)
        with pytest.raises(Unfinished, match="SIGTERM at step 0 of 10: the same command starts anew"):
            train.pretrain(small(shard_folder, tmp_path / "stopped"), CPU)
    assert not list((tmp_path / "stopped" / "checkpoints").glob("*"))
    train.pretrain(small(shard_folder, tmp_path / "stopped"), CPU)
    assert_ended_alike(tmp_path / "stopped", tmp_path / "whole")
