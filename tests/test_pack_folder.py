import fcntl
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from errors import UserError
from pipeline import pack_folder
from pipeline.pack_job import PackJob, pack
from pipeline.plan import PackSettings
from pipeline.shardset import verify_shard_set


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (40, 40), dtype=np.uint8))
    return folder


def run(images: Path, out: Path, **options: object) -> None:
    pack(PackSettings(images=(images,), out=out, **{"size_px": 32, "samples_per_shard": 2} | options))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- what is there already ------------------------------------------------------------------------------------------


def test_finished_set_is_left_alone_by_the_same_command(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    run(images, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    run(images, out, workers=1, max_rejected=3)
    assert "packed already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("options", "difference"),
    [({"store": "jpeg"}, "store raw there, jpeg here"), ({"seed": 1}, "seed 0 there, 1 here")],
)
def test_finished_set_is_refused_to_other_options(
    images: Path, tmp_path: Path, options: dict[str, object], difference: str
) -> None:
    out = tmp_path / "set"
    run(images, out)
    before = tree(out)
    with pytest.raises(UserError, match=f"{difference}.*--overwrite"):
        run(images, out, **options)
    assert tree(out) == before


def test_finished_set_is_refused_to_other_images(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "set")
    (images / "1.png").unlink()
    with pytest.raises(UserError, match=r"images 8 of .* there, 7 of .* here"):
        run(images, tmp_path / "set")


def test_interrupted_pack_is_refused_to_other_options_but_not_to_overwrite(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    (images / "bad.png").write_text("<html>")
    with pytest.raises(UserError, match="max-rejected"):
        run(images, out, max_rejected=0)
    before = tree(out)
    with pytest.raises(UserError, match=r"interrupted pack .*store raw there, png here"):
        run(images, out, store="png")
    assert tree(out) == before
    run(images, out, store="png", overwrite=True)
    run(images, tmp_path / "fresh", store="png")
    assert tree(out) == tree(tmp_path / "fresh")


def test_overwrite_leaves_nothing_of_the_old_set(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(images, out)
    run(images, out, samples_per_shard=100, val_fraction=0, overwrite=True)
    run(images, tmp_path / "fresh", samples_per_shard=100, val_fraction=0)
    assert tree(out) == tree(tmp_path / "fresh")
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "rejected.csv", "train"]


def test_overwrite_with_the_same_options_mends_a_damaged_set(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(images, out)
    before = tree(out)
    (out / "train" / "train-000000.tar").write_bytes(b"")
    run(images, out, overwrite=True)
    assert tree(out) == before


def test_old_set_stays_whole_when_overwriting_fails(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(images, out)
    before = tree(out)
    (images / "list.txt").write_text("unknown.png\n")
    with pytest.raises(UserError, match="not found"):
        run(images, out, overwrite=True, train_list=images / "list.txt")
    assert tree(out) == before
    (images / "bad.png").write_text("<html>")
    with pytest.raises(UserError, match="max-rejected"):
        run(images, out, overwrite=True, max_rejected=0)
    assert {name: content for name, content in tree(out).items() if not name.startswith(".pack/")} == before
    assert verify_shard_set(out) == []


class PowerCut(BaseException):
    pass


@contextmanager
def power_cut_after(num_changes: int) -> Iterator[None]:
    """Let only so many changes to any folder happen."""
    calls = itertools.count()

    def limited(change: Callable) -> Callable:
        def wrapped(*arguments: object, **options: object) -> object:
            if next(calls) == num_changes:
                raise PowerCut
            return change(*arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(Path, name, limited(getattr(Path, name)))
        yield


def test_installing_can_be_cut_off_anywhere_and_carried_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images, tmp_path / "fresh", store="png")
    run(images, tmp_path / "ready", samples_per_shard=1)
    calls: list[tuple] = []
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.pack_job.install", lambda _, shards, *contents: calls.append((list(shards), *contents)))
        run(images, tmp_path / "ready", store="png", overwrite=True)
    for num_changes in itertools.count():
        out = Path(shutil.copytree(tmp_path / "ready", tmp_path / str(num_changes)))
        try:
            with power_cut_after(num_changes):
                pack_folder.install(pack_folder.open_output(out), *calls[0])
        except PowerCut:
            is_whole = False
        else:
            is_whole = True
        run(images, out, store="png")
        assert tree(out) == tree(tmp_path / "fresh")
        if is_whole:
            break
    assert num_changes > 30


# --- whose folder it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["photo.png", "train/photo.png", "manifest.json", ".git/config"])
def test_folder_with_anything_else_is_refused_and_left_alone(images: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "set"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"something else|not the manifest"):
            run(images, out, overwrite=overwrite)
        assert tree(out) == {name: b"{}"}


def test_set_with_a_foreign_file_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(images, out)
    (out / "train" / "notes.txt").touch()
    before = tree(out)
    with pytest.raises(UserError, match=r"something else \(train/notes.txt\)"):
        run(images, out, overwrite=True, seed=1)
    assert tree(out) == before


def test_foreign_file_that_appears_meanwhile_is_left_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    run(images, out)
    pack_shards = PackJob.run

    def pack_and_write(job: PackJob) -> None:
        pack_shards(job)
        (out / "train" / "notes.txt").write_text("mine")

    monkeypatch.setattr(PackJob, "run", pack_and_write)
    run(images, out, seed=1, overwrite=True)
    assert (out / "train" / "notes.txt").read_text() == "mine"


def test_file_in_the_place_of_the_folder_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "set").touch()
    with pytest.raises(UserError, match="is a file"):
        run(images, tmp_path / "set")


def test_empty_folder_is_filled(images: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    run(images, tmp_path / "set")
    assert verify_shard_set(tmp_path / "set") == []


def test_folder_of_a_running_pack_is_refused(images: Path, tmp_path: Path) -> None:
    work = tmp_path / "set" / ".pack"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another pack is at work there"):
            run(images, tmp_path / "set")
        assert work.is_dir()
    run(images, tmp_path / "set")


def test_bad_input_leaves_no_trace_of_an_output_folder(images: Path, tmp_path: Path) -> None:
    (images / "list.txt").write_text("unknown.png\n")
    with pytest.raises(UserError):
        run(images, tmp_path / "set", train_list=images / "list.txt")
    with pytest.raises(UserError):
        run(tmp_path / "gone", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_output_may_lie_beside_the_images_it_comes_from(images: Path) -> None:
    run(images, images / "shards")
    run(images, images / "shards")
    assert verify_shard_set(images / "shards") == []
