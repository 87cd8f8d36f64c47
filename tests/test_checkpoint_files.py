"""What is on the disk when a checkpoint is written, replaced, linked, cut or changed."""

import resource
import zipfile
from pathlib import Path

import pytest
import torch

from model.checkpoint import is_whole, link, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def test_the_one_before_is_kept_and_a_linked_one_keeps_its_content(tmp_path: Path) -> None:
    last, previous, best = (tmp_path / name for name in ("last.pt", "previous.pt", "best.pt"))
    for step in (1, 2, 3):
        save_checkpoint(last, {"step": step}, previous)
        if step == 2:
            link(last, best)
            link(last, best)
    steps = {path.name: load_checkpoint(path, CPU)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 3, "previous.pt": 2, "best.pt": 2}


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    save_checkpoint(last, {"step": 1}, previous)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(last, {"step": 2, "tensors": [torch.rand(20_000) for _ in range(3)]}, previous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert load_checkpoint(last, CPU) == {"step": 1}


def test_a_file_is_whole_until_a_byte_changes_or_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"tensor": torch.rand(2000), "step": 1})
    content = path.read_bytes()
    assert is_whole(path)
    with zipfile.ZipFile(path) as archive:
        stored = [(info.header_offset, info.file_size) for info in archive.infolist()]
    for offset, size in stored:
        flipped = bytearray(content)
        flipped[offset + 200 + size // 2 if size > 400 else offset] ^= 1
        path.write_bytes(flipped)
        assert not is_whole(path), offset
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert not is_whole(path), length
