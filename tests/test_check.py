import shutil
from pathlib import Path

import pytest
import torch

import train
from errors import UserError
from pipeline.check import BackgroundCheck
from pipeline.packing import parse_index
from pipeline.shardset import ShardSet
from tests.small_runs import small


def flip_a_pixel(shards: Path) -> str:
    """Flip a bit in the middle of the second sample of the first training tar; return its key."""
    entry = parse_index((shards / "train" / "train-000000.idx").read_bytes())[1]
    with open(shards / "train" / "train-000000.tar", "r+b") as file:
        file.seek(entry.image_offset + entry.image_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return entry.key


def check(shards: Path, share: int = 0, num_shares: int = 1) -> BackgroundCheck:
    """Return a check that has run to its end."""
    found = BackgroundCheck([ShardSet.open(shards)], ("train", "val"), share, num_shares)
    with found:
        found._thread.join()
    return found


def test_what_was_packed_passes_and_every_tar_is_read_by_one_share(shard_folder: Path) -> None:
    whole = BackgroundCheck([ShardSet.open(shard_folder)], ("train", "val"), 0, 1)
    halves = [BackgroundCheck([ShardSet.open(shard_folder)], ("train", "val"), share, 2) for share in (0, 1)]
    assert sorted(shard.tar for half in halves for _, shard in half._shards) == sorted(s.tar for _, s in whole._shards)
    assert whole.num_unchecked > 2
    done = check(shard_folder)
    assert (done.problem, done.num_unchecked) == ("", 0)


def test_one_flipped_pixel_is_found_and_its_sample_named(shard_folder: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(shard_folder, tmp_path / "shards")
    key = flip_a_pixel(shards)
    found = check(shards)
    assert "train-000000.tar" in found.problem
    assert key in found.problem
    assert not check(shards, share=1, num_shares=2).problem  # another process reads that tar


def test_training_on_a_flipped_pixel_stops_and_saves_nothing_of_it(shard_folder: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(shard_folder, tmp_path / "shards")
    key = flip_a_pixel(shards)
    settings = small(shards, tmp_path / "run", "di", epochs=1000, max_steps=None, save_every=1000)
    with pytest.raises(UserError, match=f"sample {key}.*stopped at step"):
        train.pretrain(settings, torch.device("cpu"))
    trusting = small(shards, tmp_path / "trusting", "di", max_steps=2, trust_shards=True)
    train.pretrain(trusting, torch.device("cpu"))
