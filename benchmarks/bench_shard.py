"""Images/s of packing, against decoding every PNG and nothing else on the same cores.

    python -m benchmarks.bench_shard                              # phantoms of 1024 px; some three minutes
    python -m benchmarks.bench_shard --images ChestX-ray14/images --num-images 2000 --work /nvme/benchmark
    python -m benchmarks.bench_shard --quick                      # does everything run?

Rows are measured in turn, several times over, each in a process of its own; figures are medians. `decode-only` reads
and decodes the files with OpenCV in as many threads as there are cores. The others are `shard_cxr14.py pack` as a
whole, from listing the images to the manifest on the disk, and `ratio_to_decode_only` is the median of the ratios
within a round. The images are in the page cache; the shards go to the disk of --work.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import tyro

from benchmarks.inputs import STORES, ImageBenchmark, pack_images
from benchmarks.report import describe_hardware, make_result, publish
from benchmarks.timing import Figures, cpu_seconds, in_fresh_process, measure_in_turn, peak_memory_mib, summarise
from errors import UserError, exits_on_user_error

ROWS = ("decode-only", *STORES)


def measure(row: str, images: str, work: str, num_workers: int) -> Figures:
    """Decode the PNG files in a folder, or pack them into a folder in `work` that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=work) as out:
        cpu_started, started = cpu_seconds(), time.perf_counter()
        if row == "decode-only":
            decode_all(Path(images), num_workers)
        else:
            pack_images(Path(images), row, Path(out) / row, num_workers)
        elapsed, cpu_used = time.perf_counter() - started, cpu_seconds() - cpu_started
    num_images = len(list(Path(images).iterdir()))
    return {
        "images_per_second": num_images / elapsed,
        "images_per_second_per_core": num_images / elapsed / num_workers,
        "cpu_seconds_per_1000_images": cpu_used / num_images * 1000,
        "peak_memory_mib": peak_memory_mib(),
    }


def decode_all(folder: Path, num_threads: int) -> None:
    """Decode the PNG files in a folder and nothing else."""
    cv2.setNumThreads(1)  # the parallelism is over images
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(_decode, folder.iterdir()))


def _decode(path: Path) -> None:
    if cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is None:
        raise UserError(f"{path.resolve()}: is damaged; name --images that are whole")


@exits_on_user_error
def main() -> None:
    """Measure, print, keep."""
    settings = tyro.cli(ImageBenchmark, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    num_cores = settings.use_cores()
    hardware = describe_hardware("cpu")
    with settings.work_folder() as work:
        images = settings.find_images(work)

        def measure_row(row: str) -> Figures:
            where = {"images": str(images), "work": str(work)}
            return in_fresh_process("benchmarks.bench_shard:measure", row=row, num_workers=num_cores, **where)

        rows = summarise(measure_in_turn(ROWS, settings.num_rounds, measure_row), baseline="decode-only")
    publish(make_result("bench_shard", hardware, settings.describe(), rows), settings.report_folder)


if __name__ == "__main__":
    main()
