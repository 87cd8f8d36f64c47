"""The output of a pack: whose it is, what it holds, and how a new set takes an old one's place.

All work goes on in a folder of its own, so that whatever OUT held before stays whole until the new set is complete. It
is `OUT/.pack/` or, for an OUT on `s3://`, a local folder in $TMPDIR from where all is uploaded at the end:

    lock                    held (flock) while a pack runs
    plan.json               the options and images that the files beside it come from
    listings.json           what compressed archives hold
    staged-0.bin, .json     the images of one compressed archive, packed, in the archive's order
    train-000000.tar, .idx  a finished shard
    train-000000.json       written after them: what is known about the shard
    too-slow.json           images that a decoder did not get done with
    installing              the old set is gone; shards are moving to their places
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import UserError
from pipeline.packing import sync_folder, write_whole
from pipeline.plan import SPLITS
from pipeline.shardset import MANIFEST, REJECTED, WORK_FOLDER, read_manifest
from pipeline.storage import open_storage

_OWN_FILE = re.compile(r"\.pack|manifest\.json|rejected\.csv|(train|val|test)(/\1-\d{6,}\.(tar|idx))?")


class LocalOutput:
    """OUT, a folder. Names are relative to it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._root = Path(path)
        self.work = self._root / WORK_FOLDER

    def names_in(self, folder: str = "") -> list[str]:
        """What lies in a folder of it."""
        path = self._root / folder
        if not folder and path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; give --out a new folder")
        return [entry.relative_to(self._root).as_posix() for entry in path.iterdir()] if path.is_dir() else []

    def begin(self) -> None:
        """Mark it as a pack's: the work folder in there does."""

    def remove(self, name: str) -> None:
        """Remove a file, and its folder when that is empty."""
        path = self._root / name
        path.unlink(missing_ok=True)
        if path.parent != self._root and not any(path.parent.iterdir()):
            path.parent.rmdir()

    def move_in(self, file: Path, name: str) -> None:
        """Give a finished file from the work folder its place, where it survives a power cut."""
        path = self._root / name
        if not path.parent.exists():
            path.parent.mkdir()
            sync_folder(self._root)
        file.replace(path)
        sync_folder(path.parent)

    def end(self) -> None:
        """Undo `begin`."""


class RemoteOutput:
    """OUT on `s3://` or wherever else fsspec writes; files appear there whole or not at all."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._filesystem, self._root = open_storage(path)
        self.work = Path(tempfile.gettempdir(), f"dira-pack-{hashlib.sha256(path.encode()).hexdigest()[:16]}")

    def names_in(self, folder: str = "") -> list[str]:
        """What lies in a folder of it."""
        try:
            paths = self._filesystem.ls(f"{self._root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        names = {path.removeprefix(self._root).strip("/") for path in paths}
        return sorted(names - {"", folder})  # some tools keep an empty object of the folder's own name

    def begin(self) -> None:
        """Mark it as a pack's, even if the work folder is lost; this also shows early that we may write there."""
        self._filesystem.pipe_file(f"{self._root}/{WORK_FOLDER}/begun", b"")

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._filesystem.rm_file(f"{self._root}/{name}")

    def move_in(self, file: Path, name: str) -> None:
        """Upload a finished file from the work folder, and remove it there."""
        self._filesystem.put_file(str(file), f"{self._root}/{name}")
        file.unlink()

    def end(self) -> None:
        """Undo `begin`."""
        self.remove(f"{WORK_FOLDER}/begun")


Output = LocalOutput | RemoteOutput


def open_output(path: str | Path) -> Output:
    """The output that `--out` names."""
    path = str(path)
    return RemoteOutput(path.rstrip("/")) if "://" in path else LocalOutput(path)


def refuse_foreign_files(out: Output) -> None:
    """Refuse an output with anything in it that no pack wrote: only what a pack wrote may ever be replaced."""
    names = out.names_in()
    is_ours = WORK_FOLDER in names or read_manifest(out.path) is not None
    if is_ours:
        names += [name for folder in names for name in out.names_in(folder)]
    for name in sorted(names):
        if not is_ours or not (_OWN_FILE.fullmatch(name) or name.startswith(f"{WORK_FOLDER}/")):
            raise UserError(f"{out.path}: holds something else ({name}); give --out a new folder")


@contextmanager
def claimed(out: Output) -> Iterator[None]:
    """Have the work folder for oneself; afterwards, leave none unless there is something to carry on.

    Raises:
        UserError: If another process of this machine has it.
    """
    work, parent = out.work, out.work.parent
    was_there = parent.exists()
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(lock.fileno()).st_nlink > 0  # a pack that ends just now takes its lock away with it
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise UserError(f"{out.path}: another pack is at work there; wait for it or choose another folder")
        try:
            yield
        finally:
            if not (work / "plan.json").exists():
                shutil.rmtree(work)
                if not was_there and not any(parent.iterdir()):
                    parent.rmdir()


def is_to_do(out: Output, options: dict[str, Any], *, overwrite: bool) -> bool:
    """Tell whether to pack, or the set is there already; make the work folder ready in the first case.

    Raises:
        UserError: If the folder holds a set, or the beginnings of one, with other options, and may not be overwritten.
    """
    plan_path = out.work / "plan.json"
    begun, manifest = read_json(plan_path), read_manifest(out.path)
    if begun == options:
        print(f"carrying on with the interrupted pack in {out.path}", flush=True)
        out.begin()
        return True
    if not overwrite and begun is not None:
        raise UserError(
            f"{out.path}: holds an interrupted pack of other images or options ({_differences(begun, options)}); "
            "repeat its command, give --overwrite or choose another folder"
        )
    if not overwrite and manifest is not None:
        if manifest["options"] == options:
            print(f"{out.path} is packed already: nothing to do")
            return False
        raise UserError(
            f"{out.path}: holds a shard set of other images or options ({_differences(manifest['options'], options)}); "
            "give --overwrite or choose another folder"
        )
    out.begin()
    plan_path.unlink(missing_ok=True)
    for path in plan_path.parent.iterdir():
        if path.name != "lock":
            path.unlink()
    write_whole(plan_path, json.dumps(options).encode())
    return True


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = [name for name in here if there.get(name) != here[name]]
    return "; ".join(f"{name.replace('_', '-')} {there.get(name)} there, {here[name]} here" for name in names)


def install(out: Output, shards: Iterable[tuple[str, str]], manifest: bytes, rejected: bytes) -> None:
    """Put finished shards, given as (split, name), in the place of what was there; the manifest comes last.

    May be cut off at any point and called again.
    """
    work = out.work
    if not (work / "installing").exists():
        out.remove(MANIFEST)
        for split in SPLITS:
            for name in filter(_OWN_FILE.fullmatch, out.names_in(split)):
                out.remove(name)
        write_whole(work / "installing", b"")
    write_whole(work / REJECTED, rejected)
    write_whole(work / MANIFEST, manifest)
    for split, name in shards:
        for file in (work / f"{name}.idx", work / f"{name}.tar"):
            if file.exists():
                out.move_in(file, f"{split}/{file.name}")
    out.move_in(work / REJECTED, REJECTED)
    out.move_in(work / MANIFEST, MANIFEST)
    out.end()
    (work / "plan.json").unlink()  # `claimed` clears away the rest


def read_json(path: Path) -> Any:
    """A JSON file's content, or None if it has none that is whole."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
