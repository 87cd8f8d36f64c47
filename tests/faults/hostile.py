"""Hostile images and archives: each is packed and DALI decodes it, or it is refused with a reason.

python -m tests.faults.hostile --seed 0 --count 500 --work /tmp/hostile    # one batch, as `tests.faults` starts them
"""

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from errors import UserError
from pipeline.pack_job import pack
from pipeline.plan import PackSettings
from pipeline.shardset import ShardSet, verify_shard_set
from tests.commands import ROOT
from tests.faults.mutations import good_images, hostile_archive, hostile_image
from tests.faults.report import Tally

BATCH = 500
STORES = (("raw", 32), ("jpeg", 32), ("png", 32), ("png", 0))
PEAK_MIB = 3000
"""A batch's process may take this much: torch and DALI, and the largest images that are decoded."""
BATCH_TIMEOUT_S = 600
NUM_GOOD = 4


def hostile_images(count: int, seed: int, work: Path) -> Tally:
    """Pack hostile images and archives, each batch in a process of its own."""
    tally, peak_mib, number = Tally("hostile-images"), 0.0, 0
    while tally.tried < count:
        size = min(BATCH, count - tally.tried)
        arguments = ("--seed", f"{seed} {number}", "--count", size, "--work", work / "hostile")
        command = [sys.executable, "-m", "tests.faults.hostile", *map(str, arguments)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=BATCH_TIMEOUT_S,
                errors="replace",
            )
            problem = f"ended with {done.returncode}: {done.stderr[-800:]}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"hangs after {BATCH_TIMEOUT_S} s"
        if problem:
            tally.count("unknown", size)
            tally.lose(f"{' '.join(map(str, arguments))}: {problem}")
        else:
            batch = json.loads(done.stdout.splitlines()[-1])
            peak_mib = max(peak_mib, batch["peak_mib"])
            for outcome, times in batch["outcomes"].items():
                tally.count(outcome, times)
            for loss in batch["problems"]:
                tally.lose(f"seed '{seed} {number}': {loss}")
        tally.tell()
        number += 1
    tally.figures["peak_mib"] = peak_mib
    return tally


def try_images(rng: random.Random, count: int, work: Path) -> tuple[Counter[str], list[str]]:
    """Pack images from a folder, a tar and a tar.gz as one set; return how they ended, and what went wrong."""
    images, done_to = work / "images", {}
    images.mkdir(parents=True)
    for i in range(NUM_GOOD):
        (images / f"good{i}.png").write_bytes(good_images()["png"][0])
    for i in range(count):
        extension, data, what = hostile_image(rng)
        path = images / f"image{i:05d}.{extension}"
        path.write_bytes(data)
        done_to[path.stem] = f"{path.name} ({what})"
    store, size_px = rng.choice(STORES)
    options = {"store": store, "size_px": size_px, "max_rejected": count, "val_fraction": 0.0, "workers": 2}
    try:
        pack(PackSettings(images=(images,), out=work / "set", **options))
    except UserError as error:
        return Counter(lost=count), [f"{count} images as {store}-{size_px}: {error}"]
    packed, rejected = look_into(work / "set")
    problems = [f"{done_to[key]}: neither packed nor rejected" for key in done_to.keys() - packed - rejected.keys()]
    problems += [f"{done_to[key]}: packed and rejected" for key in done_to.keys() & packed & rejected.keys()]
    problems += [f"{done_to[key]}: rejected without a reason" for key, why in rejected.items() if not why.strip()]
    problems += verify_shard_set(work / "set", 2)
    problems += dali_problems(work / "set", f"{store}-{size_px}")
    return Counter(packed=len(packed) - NUM_GOOD, rejected=len(rejected)), problems


def try_archive(rng: random.Random, work: Path) -> tuple[str, list[str]]:
    """Pack one archive; return how it ended, and what went wrong."""
    ending, data, what = hostile_archive(rng)
    archive, out = work / f"x{ending}", work / "set"
    work.mkdir(parents=True)
    archive.write_bytes(data)
    options = {"store": "raw", "size_px": 32, "max_rejected": 100, "val_fraction": 0.0, "workers": 2}
    started = time.monotonic()
    try:
        pack(PackSettings(images=(archive,), out=out, **options))
    except UserError as error:
        problems = [] if str(work) in str(error) or "can be used" in str(error) else [f"{error}: names no archive"]
        problems += ["left a set behind"] if (out / "manifest.json").exists() else []
        outcome = "archive refused"
    else:
        look_into(out)
        problems, outcome = verify_shard_set(out), "archive packed"
    if (seconds := time.monotonic() - started) > 60:
        problems.append(f"took {seconds:.0f} s")
    problems += ["wrote outside"] if {path.name for path in work.iterdir()} - {archive.name, "set"} else []
    return outcome, [f"archive ({what}): {problem}" for problem in problems]


def look_into(out: Path) -> tuple[set[str], dict[str, str]]:
    """Keys of a set's samples; reasons by key of what was rejected."""
    packed = {key for key, _, _ in ShardSet.open(out).read_samples("train")}
    with (out / "rejected.csv").open(newline="", errors="replace") as file:
        rejected = {Path(row["file"]).stem: row["reason"] for row in csv.DictReader(file)}
    return packed, rejected


def dali_problems(out: Path, what: str) -> list[str]:
    """Run every packed image through the training graph."""
    import torch

    from pipeline.loader import LoaderSpec, ValidationLoader
    from pipeline.spec import ViewSpec

    view = ViewSpec(crop_size_px=32)
    loader = ValidationLoader(
        LoaderSpec((ShardSet.open(out),), view, None, 32, seed=0, device=torch.device("cpu"), num_threads=1), "train"
    )
    try:
        num_images = sum(len(batch.query) for batch in loader)
    except RuntimeError as error:
        return [f"DALI, {what}: {error}"]
    return [] if num_images == loader.num_samples else [f"DALI, {what}: {num_images} of {loader.num_samples} images"]


def own_peak_mib() -> float:
    """The most memory that this process has held; getrusage would count what its parent held when it was started."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Try one batch; print what came of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True)
    settings = parser.parse_args()
    settings.work.mkdir(parents=True, exist_ok=True)
    rng, num_archives = random.Random(settings.seed), settings.count // 4
    with tempfile.TemporaryDirectory(dir=settings.work) as work:
        outcomes, problems = try_images(rng, settings.count - num_archives, Path(work) / "images")
        for i in range(num_archives):
            folder = Path(work) / "archive"
            outcome, found = try_archive(random.Random(f"{settings.seed} {i}"), folder)
            outcomes[outcome] += 1
            problems += found
            shutil.rmtree(folder)
    peak_mib = own_peak_mib()
    problems += [f"took {peak_mib:.0f} MiB"] if peak_mib > PEAK_MIB else []
    print(json.dumps({"outcomes": outcomes, "problems": problems, "peak_mib": round(peak_mib)}))


if __name__ == "__main__":
    main()
