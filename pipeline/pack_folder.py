"""The output folder of a pack: whose it is, what it holds, and how a new set takes an old one's place.

All work goes on in `OUT/.pack/`, so that whatever OUT held before stays whole until the new set is complete:

    lock                    held (flock) while a pack runs
    plan.json               the options and images that the files beside it come from
    listings.json           what compressed archives hold
    staged-0.bin, .json     the images of one compressed archive, packed, in the archive's order
    train-000000.tar, .idx  a finished shard
    train-000000.json       written after them: what is known about the shard
    installing              the old set is gone; shards are moving to their places
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import UserError
from pipeline.packing import sync_folder, write_whole
from pipeline.plan import SPLITS
from pipeline.shardset import MANIFEST, REJECTED, WORK_FOLDER, read_manifest

_OWN_FILE = re.compile(r"\.pack|manifest\.json|rejected\.csv|(train|val|test)(/\1-\d{6,}\.(tar|idx))?")


def refuse_foreign_files(out: Path) -> None:
    """Refuse an output folder with anything in it that no pack wrote: only what a pack wrote may ever be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a new folder")
    is_ours = (out / WORK_FOLDER).is_dir() or read_manifest(str(out)) is not None
    for path in sorted([*out.iterdir(), *(out.glob("*/*") if is_ours else ())]):
        name = path.relative_to(out).as_posix()
        if not is_ours or not (_OWN_FILE.fullmatch(name) or name.startswith(f"{WORK_FOLDER}/")):
            raise UserError(f"{out}: holds something else ({name}); give --out a new folder")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Have the output folder for oneself; afterwards, leave no work folder unless there is something to carry on.

    Raises:
        UserError: If another process has it.
    """
    work, was_there = out / WORK_FOLDER, out.exists()
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(lock.fileno()).st_nlink > 0  # a pack that ends just now takes its lock away with it
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise UserError(f"{out}: another pack is at work there; wait for it or choose another folder")
        try:
            yield
        finally:
            if not (work / "plan.json").exists():
                shutil.rmtree(work)
                if not was_there and not any(out.iterdir()):
                    out.rmdir()


def is_to_do(out: Path, options: dict[str, Any], *, overwrite: bool) -> bool:
    """Tell whether to pack, or the set is there already; make the work folder ready in the first case.

    Raises:
        UserError: If the folder holds a set, or the beginnings of one, with other options, and may not be overwritten.
    """
    plan_path = out / WORK_FOLDER / "plan.json"
    begun, manifest = read_json(plan_path), read_manifest(str(out))
    if begun == options:
        print(f"carrying on with the interrupted pack in {out}", flush=True)
        return True
    if not overwrite and begun is not None:
        raise UserError(
            f"{out}: holds an interrupted pack of other images or options ({_differences(begun, options)}); "
            "repeat its command, give --overwrite or choose another folder"
        )
    if not overwrite and manifest is not None:
        if manifest["options"] == options:
            print(f"{out} is packed already: nothing to do")
            return False
        raise UserError(
            f"{out}: holds a shard set of other images or options ({_differences(manifest['options'], options)}); "
            "give --overwrite or choose another folder"
        )
    plan_path.unlink(missing_ok=True)
    for path in plan_path.parent.iterdir():
        if path.name != "lock":
            path.unlink()
    write_whole(plan_path, json.dumps(options).encode())
    return True


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = [name for name in here if there.get(name) != here[name]]
    return "; ".join(f"{name.replace('_', '-')} {there.get(name)} there, {here[name]} here" for name in names)


def install(out: Path, shards: Iterable[tuple[str, str]], manifest: bytes, rejected: bytes) -> None:
    """Put finished shards, given as (split, name), in the place of what was there.

    May be cut off at any point and called again.
    """
    work = out / WORK_FOLDER
    if not (work / "installing").exists():
        (out / MANIFEST).unlink(missing_ok=True)
        for old in out.glob("*/*"):
            if _OWN_FILE.fullmatch(old.relative_to(out).as_posix()):
                old.unlink()
        write_whole(work / "installing", b"")
    write_whole(work / REJECTED, rejected)
    write_whole(work / MANIFEST, manifest)
    for split, name in shards:
        (out / split).mkdir(exist_ok=True)
        for file in (work / f"{name}.idx", work / f"{name}.tar"):
            if file.exists():
                file.replace(out / split / file.name)
    for folder in (out / split for split in SPLITS):
        if folder.is_dir():
            sync_folder(folder)
            if not any(folder.iterdir()):
                folder.rmdir()
    (work / REJECTED).replace(out / REJECTED)
    (work / MANIFEST).replace(out / MANIFEST)
    sync_folder(out)
    (work / "plan.json").unlink()  # `claimed` clears away the rest


def read_json(path: Path) -> Any:
    """A JSON file's content, or None if it has none that is whole."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
