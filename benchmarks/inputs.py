"""Radiographs for the benchmarks: a folder of PNGs, real ones or phantoms, and shard sets packed from it."""

import contextlib
import io
import itertools
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.report import RESULTS
from benchmarks.timing import say
from errors import UsageError, UserError
from pipeline.pack_job import pack
from pipeline.packing import Store
from pipeline.phantom import write_phantoms
from pipeline.plan import PackSettings
from settings import option

NUM_SHARDS = 32  # enough for every worker process of a big machine to have one
STORES: dict[str, tuple[Store, int]] = {
    "raw-512": ("raw", 512),
    "jpeg-512": ("jpeg", 512),
    "png-512": ("png", 512),
    "png-original": ("png", 0),
}
"""Rows of the benchmarks: `--store` and `--size` of a pack."""


@dataclass(frozen=True)
class ImageBenchmark:
    """What the benchmarks on images share."""

    images: Path | None = None
    """Folder of PNG radiographs, searched all the way down. Phantoms if left out."""
    num_images: int | None = None
    """How many to take; a smaller folder's are taken several times. Default: 512, with --quick 64."""
    phantom_size_px: Annotated[int, tyro.conf.arg(name="phantom-size")] = 1024
    """Side of the phantoms."""
    cores: int | None = None
    """CPU cores to use: so many threads or worker processes. Default: all."""
    repeats: int | None = None
    """Rounds, in each of which every row is measured once. Default: 5, with --quick 1."""
    quick: bool = False
    """Few images, little time: shows that everything runs. Keeps no report unless --out is given."""
    work: Path | None = None
    """Folder for phantoms and shards, which the next run finds there. Default: a temporary one."""
    out: Path | None = None
    """Folder for the report. Default: benchmarks/results."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        for name in ("num_images", "cores", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{option(name)} {value}: must be 1 or more")
        num_there = len(os.sched_getaffinity(0))
        if self.cores and self.cores > num_there:
            raise UsageError(f"--cores {self.cores}: there are only {num_there}")

    @property
    def num_images_used(self) -> int:
        """How many images to measure on."""
        return self.num_images or (64 if self.quick else 512)

    @property
    def num_rounds(self) -> int:
        """How often to measure every row."""
        return self.repeats or (1 if self.quick else 5)

    @property
    def report_folder(self) -> Path | None:
        """Where the report goes, if anywhere."""
        return self.out or (None if self.quick else RESULTS)

    def describe(self) -> dict[str, Any]:
        """Return what a report should say about the settings, as JSON."""
        settings = asdict(self) | {"num_images": self.num_images_used, "repeats": self.num_rounds}
        folder = "/".join(self.images.resolve().parts[-2:]) if self.images else None
        settings["images"] = folder or f"phantoms of {self.phantom_size_px} px"
        of_this_run = ("phantom_size_px", "cores", "work", "out", "rows")
        return {name: value for name, value in settings.items() if name not in of_this_run}

    def use_cores(self) -> int:
        """Keep this process and its children to `cores` cores; return how many these are."""
        if self.cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: self.cores])
        return len(os.sched_getaffinity(0))

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder to work in; a temporary one is gone afterwards."""
        if self.work:
            self.work.mkdir(parents=True, exist_ok=True)
            yield self.work.resolve()
        else:
            with tempfile.TemporaryDirectory(prefix="dira-benchmark-") as folder:
                yield Path(folder)

    def find_images(self, work: Path) -> Path:
        """Return a folder in `work` of PNG files: links to those asked for, or phantoms."""
        if self.images:
            return self._link_images(work / "links")
        folder = work / f"phantoms-{self.num_images_used}-of-{self.phantom_size_px}-px"
        if not folder.exists():
            say(f"drawing {self.num_images_used} phantoms of {self.phantom_size_px} px")
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            write_phantoms(part, self.num_images_used, self.phantom_size_px)
            part.rename(folder)
        return folder / "images"

    def _link_images(self, folder: Path) -> Path:
        paths = sorted(self.images.resolve().rglob("*.png"))
        if not paths:
            raise UserError(f"{self.images}: holds no PNG files; name a folder that does, or leave out --images")
        random.Random(0).shuffle(paths)  # the first ones may all be of a few patients
        folder.mkdir(exist_ok=True)
        for link in folder.iterdir():
            if link.is_symlink():  # from a run before; anything else is not ours to remove
                link.unlink()
        for i, path in enumerate(itertools.islice(itertools.cycle(paths), self.num_images_used)):
            (folder / f"{i:06}-{path.name}").symlink_to(path)
        return folder


def pack_images(folder: Path, row: str, out: Path, num_workers: int) -> None:
    """Pack a folder of images as the row says, all into the split `train`, without a word."""
    store, size_px = STORES[row]
    settings = PackSettings(
        images=(folder,),
        out=out,
        val_fraction=0,
        store=store,
        size_px=size_px,
        samples_per_shard=math.ceil(len(list(folder.iterdir())) / NUM_SHARDS),
        workers=num_workers,
        overwrite=True,
    )
    say(f"packing {row}")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pack(settings)
