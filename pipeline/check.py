"""Compares the tars with their checksums beside the training: a flipped byte in `raw` pixels makes no decoder fail."""

import hashlib
import threading
from collections.abc import Sequence
from typing import Self

from pipeline.shardset import Shard, ShardSet, verify_shard

BLOCK_BYTES = 2**20


class BackgroundCheck:
    """Reads every tar of some splits once, in a thread, and says what is wrong. A context manager.

    It takes about a second of one core for a gigabyte, and leaves in the page cache what fits there. Sets on object
    storage, whose transfers have checksums of their own, are left out.
    """

    def __init__(self, shard_sets: Sequence[ShardSet], splits: Sequence[str], share: int, num_shares: int) -> None:
        """Choose what to read: of `num_shares` processes that see the same disk, each takes its `share`, from 0 on."""
        local = [
            (shard_set, shard)
            for shard_set in shard_sets
            if "://" not in shard_set.path
            for shard in shard_set.shards
            if shard.split in splits
        ]
        self._shards = local[share::num_shares]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard check", daemon=True)
        self.num_unchecked = len(self._shards)
        """Tars that have not been read to their end."""
        self.problem = ""
        """One line about the first tar that is not what was packed; it names the sample where that can be told."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        for shard_set, shard in self._shards:
            try:
                self.problem = self._find_problem(shard_set, shard)
            except OSError as error:
                self.problem = f"{shard_set.path}/{shard.tar}: can't be read ({error.strerror})"
            if self.problem or self._is_over.is_set():
                return
            self.num_unchecked -= 1

    def _find_problem(self, shard_set: ShardSet, shard: Shard) -> str:
        digest = hashlib.sha256()
        with shard_set.open_file(shard.tar) as file:
            while not self._is_over.is_set() and (block := file.read(BLOCK_BYTES)):
                digest.update(block)
        if self._is_over.is_set() or digest.hexdigest() == shard.sha256:
            return ""
        return next(iter(verify_shard(shard_set, shard)), "")
