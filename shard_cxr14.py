"""Pack chest radiographs into shards, check them, look at them.

    python shard_cxr14.py pack images/ --out shards --labels Data_Entry_2017_v2020.csv --boxes BBox_List_2017.csv \
        --train-val-list train_val_list.txt --test-list test_list.txt
    python shard_cxr14.py pack images_0*.tar.gz --out s3://bucket/shards-jpeg --store jpeg
    python shard_cxr14.py verify shards
    python shard_cxr14.py inspect shards --image views.png

`python shard_cxr14.py pack --help` explains every option.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from errors import UserError, exits_on_user_error
from pipeline.pack_job import pack
from pipeline.plan import PackSettings
from pipeline.progress import Progress
from pipeline.shardset import ShardSet, verify_shard_set

NUM_VIEWS = 8


@dataclass(frozen=True)
class VerifySettings:
    """Check every byte of a shard set, and that every image decodes; exit with 1 and a list where not."""

    shards: tyro.conf.Positional[str]
    """The shard set: a folder, or s3://BUCKET/FOLDER."""
    workers: int | None = None
    """Shards checked at the same time. Default: all cores."""


@dataclass(frozen=True)
class InspectSettings:
    """Say what is in a shard set."""

    shards: tyro.conf.Positional[str]
    """The shard set: a folder, or s3://BUCKET/FOLDER."""
    image: Path | None = None
    """Also draw a contact sheet of the views that a model will see into this PNG: rows are target, query, key."""


def verify(settings: VerifySettings) -> None:
    """Print what is wrong with a shard set, a line each; raise UserError if there is anything."""
    manifest = ShardSet.with_manifest(settings.shards).manifest
    with Progress("verifying", manifest["samples"]) as progress:
        problems = verify_shard_set(settings.shards, settings.workers or len(os.sched_getaffinity(0)), progress.advance)
    for problem in problems:
        print(problem)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{settings.shards}: {count}, listed above; pack it again")
    print(f"{settings.shards}: good, {manifest['samples']} samples")


def inspect(settings: InspectSettings) -> None:
    """Print what is in a shard set, and draw what a model will see of it."""
    shard_set = ShardSet.open(settings.shards)
    print(describe(shard_set))
    if settings.image:
        draw_views(shard_set, settings.image)
        print(f"{settings.image}: views of {shard_set.path} (rows: target, query, key)")


def describe(shard_set: ShardSet) -> str:
    """A shard set's manifest, for reading."""
    manifest = shard_set.manifest
    splits = manifest["splits"]
    size = f"{shard_set.size_px} px" if shard_set.size_px else "original size"
    lines = [
        f"{shard_set.path}: {manifest['samples']} radiographs as {shard_set.store}, {size}",
        f"pixel mean {manifest['pixel_mean']:.4f}, standard deviation {manifest['pixel_std']:.4f} (train, of 1)",
        f"{manifest['rejected']} rejected, {manifest['padded_to_square']} padded to a square",
        "",
        f"{'':24}" + "".join(f"{split:>12}" for split in splits),
    ]
    rows = {name: [info[name] for info in splits.values()] for name in ("samples", "patients", "boxes", "labelled")}
    rows["shards"] = [len(info["shards"]) for info in splits.values()]
    rows["MB"] = [round(sum(shard["bytes"] for shard in info["shards"]) / 1e6, 1) for info in splits.values()]
    rows |= {name: [info["labels"].get(name, "") for info in splits.values()] for name in shard_set.label_names}
    return "\n".join(lines + [f"{name:24}" + "".join(f"{n:>12}" for n in row) for name, row in rows.items()])


def draw_views(shard_set: ShardSet, path: Path) -> None:
    """Save a contact sheet of DiRA's views: a column each for a few samples of `train`."""
    # torch and DALI take seconds to import, and packing needs neither
    import torch  # noqa: PLC0415
    from torchvision.utils import make_grid, save_image  # noqa: PLC0415

    from pipeline.loader import LoaderSpec, PretrainLoader  # noqa: PLC0415
    from pipeline.spec import DistortionSpec, ViewSpec  # noqa: PLC0415

    num_samples = min(NUM_VIEWS, shard_set.split("train").num_samples)
    view = ViewSpec()
    spec = LoaderSpec((shard_set,), view, DistortionSpec(), num_samples, seed=0, device=torch.device("cpu"))
    batch = next(iter(PretrainLoader(spec)))
    rows = torch.cat([batch.target, batch.query, batch.key]) / 255
    try:
        save_image(make_grid(rows, nrow=num_samples, padding=4, pad_value=1.0), path, format="png")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _keep_stderr_to_ourselves() -> None:
    """Point file descriptor 2 elsewhere: libjpeg tells it about damaged images, in the middle of the progress."""
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")  # names may be of any bytes
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@exits_on_user_error
def main() -> None:
    """Run the command that the command line asks for."""
    settings = tyro.extras.subcommand_cli_from_dict(
        {"pack": PackSettings, "verify": VerifySettings, "inspect": InspectSettings},
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if isinstance(settings, InspectSettings):
        inspect(settings)
        return
    _keep_stderr_to_ourselves()
    try:
        pack(settings) if isinstance(settings, PackSettings) else verify(settings)
    except KeyboardInterrupt:
        carry_on = ": the same command carries on" if isinstance(settings, PackSettings) else ""
        raise UserError(f"interrupted{carry_on}") from None


if __name__ == "__main__":
    main()
