import json
from pathlib import Path

import pytest

from benchmarks.bench_stages import KERNELS, STAGES, tabulate
from tests.commands import run_command


def test_a_stage_costs_what_it_adds_and_its_kernels_what_they_take_beyond_an_empty_run() -> None:
    cost_us = {"reading": 50, "crops": 900, "jitter": 1100, "blur": 1300, "distortion": 1400, "copy-out": 1405}
    cost_us |= {
        "nothing": 1,
        "resize": 401,
        "brightness": 11,
        "contrast": 31,
        "filter": 101,
        "multi_paste": 51,
        "erase": 21,
    }
    figures = {name: {"images_per_second": 1e6 / cost, "cpu_us_per_image": cost} for name, cost in cost_us.items()}
    slower = {name: {"images_per_second": 1.0, "cpu_us_per_image": 3 * cost} for name, cost in cost_us.items()}
    table = tabulate([figures, figures, slower])
    assert [row["stage_us_per_image"] for row in table] == [50, 850, 200, 200, 100, 5]
    kernel_us = {row["name"]: row["kernel_us_per_image"] for row in table if "kernel_us_per_image" in row}
    assert kernel_us == pytest.approx(
        {"crops": 800, "jitter": 1.6 * (10 + 30), "blur": 100, "distortion": 0.7 * 50 + 0.6 * 20}
    )


def test_the_last_line_holds_a_row_for_every_stage(tmp_path: Path) -> None:
    small = ("--num-images", 64, "--phantom-size", 128, "--cores", 1)
    done = run_command("-m", "benchmarks.bench_stages", "--quick", *small, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == list(STAGES)
    assert all(row["cpu_us_per_image"] > 0 for row in rows)
    assert sum(row["stage_us_per_image"] for row in rows) == pytest.approx(rows[-1]["cpu_us_per_image"])
    assert all(f": {name}: " in done.stderr for name in (*STAGES, *KERNELS)), "all are measured"
    assert len(list(tmp_path.glob("stages-*.png"))) == 1
