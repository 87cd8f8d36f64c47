"""Faults of packing: kills at random moments."""

import random
import sys
import tarfile
import time
from pathlib import Path

from tests.commands import run_command
from tests.faults.report import Tally
from tests.faults.runs import finish, running
from tests.faults.training import judge, new_folder

NUM_IMAGES = 300
KILLS_A_PACK = 5
SOURCES = ("folder", "images.tar", "images.tar.gz")


def kill_packing(count: int, seed: int, work: Path) -> Tally:
    """Kill packs at random moments and give the command again: same bytes as an uninterrupted pack, no stray files."""
    tally, number = Tally("kill-packing"), 0
    sources = make_sources(work)
    while tally.tried < count:
        source, rng = SOURCES[number % len(SOURCES)], random.Random(f"{seed} {number}")
        whole, out = work / f"whole-{source}", new_folder(work / f"packed-{source}")
        if not (whole / "manifest.json").exists() and (problem := finish(pack_command(sources[source], whole))):
            raise RuntimeError(f"the reference pack of {source}: {problem}")
        for _ in range(min(KILLS_A_PACK, count - tally.tried)):
            with running(pack_command(sources[source], out)) as process:
                time.sleep(rng.uniform(0.2, 2.5))
                is_alive = process.popen.poll() is None
                process.kill()
            if is_alive:
                tally.count(f"{source}, {stage(out)}")
        problem = finish(pack_command(sources[source], out))
        judge(tally, f"pack {number} ({source})", problem or tree_difference(out, whole))
        number += 1
    return tally


def make_sources(work: Path) -> dict[str, Path]:
    """The same phantoms as a folder, a tar and a tar.gz."""
    images = work / "pack-phantoms" / "images"
    sources = {"folder": images} | {name: work / name for name in SOURCES[1:]}
    if not sources["images.tar.gz"].exists():
        phantom = ("-m", "pipeline.phantom", images.parent, "--num-images", NUM_IMAGES, "--size-px", "128")
        run_command(*phantom).check_returncode()
        for name, mode in (("images.tar", "w"), ("images.tar.gz", "w:gz")):
            with tarfile.open(work / name, mode) as tar:
                tar.add(images, arcname="images")
    return sources


def pack_command(source: Path, out: Path) -> list[str]:
    """Many small shards: many moments to be killed at."""
    options = ("--size", "64", "--samples-per-shard", "2", "--val-fraction", "0.2", "--workers", "2")
    return list(map(str, [sys.executable, "shard_cxr14.py", "pack", source, "--out", out, *options]))


def stage(out: Path) -> str:
    """How far a pack has come, for the report."""
    if (out / "manifest.json").exists():
        return "installed"
    if (out / ".pack" / "installing").exists():
        return "installing"
    return "packing" if (out / ".pack" / "plan.json").exists() else "listing"


def tree_difference(out: Path, whole: Path) -> str:
    """The files that differ between two folders."""
    trees = [{str(p.relative_to(d)): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (out, whole)]
    differing = sorted(name for name in trees[0].keys() | trees[1].keys() if trees[0].get(name) != trees[1].get(name))
    return f"differ or are stray: {', '.join(differing[:5])}" if differing else ""
