"""Images/s of the data path, against the plain recipe everyone writes and against webdataset, on the same images.

    python -m benchmarks.bench_loader                              # phantoms of 1024 px; some eight minutes
    python -m benchmarks.bench_loader --images ChestX-ray14/images --work /nvme/benchmark
    python -m benchmarks.bench_loader --device cuda --cores 4
    python -m benchmarks.bench_loader --quick                      # does everything run?

Each row is measured in a process of its own, the rows in turn, several times over; figures are medians. Rows:

    plain                    PNG files, PIL, torchvision, NumPy, DataLoader; RGB and floats, as everyone has them
    plain-grey               the same in grey and 8 bits, as our loader's batches are
    raw-512 to png-original  our loader on shards of that --store and --size
    webdataset-...           webdataset and torchvision's v2 on tensors, on the same shards

An image is one radiograph: two views and a target of 224 px, distorted as `dira` wants them. `ratio_to_plain` is the
median of the ratios within a round. CPU time and memory are those of the row's process and its children. The time to
the first batch starts when the loader is opened, imports done. Bytes read per image are the sizes of the files, over
the images in them: what a disk has to deliver. Here it delivers nothing: the files are in the page cache.
"""

from dataclasses import dataclass
from typing import Literal

import tyro

from benchmarks.inputs import STORES, ImageBenchmark, pack_images
from benchmarks.report import describe_hardware, make_result, publish
from benchmarks.timing import Figures, in_fresh_process, measure_in_turn, summarise
from errors import UsageError, exits_on_user_error

ROWS: dict[str, tuple[str, str | None]] = {
    "plain": ("plain_loader:measure", None),
    "plain-grey": ("plain_loader:measure_grey", None),
    **{store: ("dali_loader:measure", store) for store in STORES},
    "webdataset-raw-512": ("webdataset_loader:measure", "raw-512"),
    "webdataset-jpeg-512": ("webdataset_loader:measure", "jpeg-512"),
}
"""By name: what measures it, and the shards that it reads, if any."""


@dataclass(frozen=True)
class LoaderBenchmark(ImageBenchmark):
    """Measure the data path against the plain recipe."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where batches have to arrive; cuda also says how many CPU cores feed 1,000 images/s."""
    rows: tuple[str, ...] = tuple(ROWS)
    """What to measure."""
    batch_size: int = 64
    seconds: float | None = None
    """Time to measure a row for, in each round. Default: 5, with --quick 0.5."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        super().__post_init__()
        if unknown := sorted(set(self.rows) - ROWS.keys()):
            raise UsageError(f"--rows {' '.join(unknown)}: there are {', '.join(ROWS)}")
        if self.batch_size < 1 or self.batch_size > self.num_images_used:
            raise UsageError(f"--batch-size {self.batch_size}: must be 1 or more, and at most --num-images")

    @property
    def num_seconds(self) -> float:
        """How long to measure."""
        return self.seconds or (0.5 if self.quick else 5.0)


@exits_on_user_error
def main() -> None:
    """Measure, print, keep."""
    settings = tyro.cli(LoaderBenchmark, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    num_cores = settings.use_cores()
    hardware = describe_hardware(settings.device)
    with settings.work_folder() as work:
        images = settings.find_images(work)
        stores = dict.fromkeys(store for _, store in map(ROWS.get, settings.rows) if store)
        for store in stores:
            pack_images(images, store, work / store, num_cores)

        def measure(name: str) -> Figures:
            function, store = ROWS[name]
            source = work / store if store else images
            figures = in_fresh_process(
                f"benchmarks.{function}",
                source=str(source),
                batch_size=settings.batch_size,
                num_workers=num_cores,
                device=settings.device,
                seconds=settings.num_seconds,
            )
            num_bytes = sum(file.stat().st_size for file in source.rglob("*.tar" if store else "*.png"))
            return {**figures, "bytes_read_per_image": num_bytes / settings.num_images_used}

        rows = summarise(measure_in_turn(settings.rows, settings.num_rounds, measure), baseline="plain")
    described = settings.describe() | {"seconds": settings.num_seconds}
    publish(make_result("bench_loader", hardware, described, rows), settings.report_folder)


if __name__ == "__main__":
    main()
