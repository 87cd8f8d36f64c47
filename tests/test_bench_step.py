import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench_step import StepBenchmark, group_by_plain
from benchmarks.phases import PHASES, PhaseTimer
from benchmarks.precision_band import BAND, largest_deviation, loss_curves
from errors import UsageError
from model.device import choose_precision
from tests.commands import run_command
from tests.small_runs import small

CPU = torch.device("cpu")


def run_quick(name: str, *options: object) -> dict[str, dict[str, Any]]:
    """Rows, by name, of a benchmark's result."""
    done = run_command("-m", f"benchmarks.{name}", "--quick", *options, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"benchmark", "hardware", "versions", "commit", "rows"} <= result.keys()
    return {row["name"]: row for row in result["rows"]}


def test_bench_step_splits_the_step_and_counts_its_arithmetic(tmp_path: Path) -> None:
    rows = run_quick("bench_step", "--rows", "dira-plain", "dira-fp32", "--out", tmp_path)
    assert list(rows) == ["dira-plain", "dira-fp32"]
    for row in rows.values():
        parts_ms = sum(row[f"{phase}_ms"] for phase in PHASES if f"{phase}_ms" in row)
        assert parts_ms == pytest.approx(row["step_ms"], rel=0.5)
        assert row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / row["step_ms"])
        assert row["tflop_per_second"] == pytest.approx(row["gflop_per_image"] * row["images_per_second"] / 1000)
        assert 0 < row["share_of_matmul_peak"] < 1
    assert rows["dira-fp32"]["ratio_to_plain"] > 0
    # Without the key network's decoder, and without the frozen discriminator's weight gradients.
    assert rows["dira-fp32"]["gflop_per_image"] < 0.95 * rows["dira-plain"]["gflop_per_image"]
    (report,) = tmp_path.glob("step-*.json")
    assert json.loads(report.read_text())["rows"][0]["name"] == "dira-plain"


def test_bench_scaling_measures_more_ranks(tmp_path: Path) -> None:
    rows = run_quick("bench_scaling", "--modes", "di", "--ranks", 1, 2, "--precision", "fp32", "--out", tmp_path)
    assert list(rows) == ["di-fp32-one-rank", "di-fp32-2-ranks"]
    two = rows["di-fp32-2-ranks"]
    assert (two["ranks"], two["batch_size"]) == (2, 8)
    assert two["images_per_second"] == pytest.approx(2 * two["images_per_second_per_gpu"])
    assert two["communication_ms"] > rows["di-fp32-one-rank"]["communication_ms"]


def test_bench_train_trains_on_shards(tmp_path: Path) -> None:
    small_images = ("--num-images", 16, "--phantom-size", 64, "--work", tmp_path)
    rows = run_quick("bench_train", *small_images, "--modes", "dir", "--precision", "fp32", "--cores", 1)
    row = rows["dir-fp32"]
    assert 0 < row["data_wait_fraction"] < 1
    assert row["ratio_to_step_alone"] == pytest.approx(row["images_per_second"] / row["step_alone_images_per_second"])


def test_phases_add_up_over_their_parts_and_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 10.0, 11.0, 13.0, 24.0, 30.0, 31.0, 33.0, 44.0])
    monkeypatch.setattr("benchmarks.phases.time.perf_counter", lambda: next(clock))
    timer = PhaseTimer(CPU)
    for _ in range(3):
        timer.begin_step()
        for phase in ("communication", "forward_key", "communication"):
            timer(phase)
    assert timer.medians_ms() == {"forward_key": 2000, "communication": 12000}


def test_ratios_are_to_the_plain_step_of_the_same_mode() -> None:
    rates = {"dir-plain": 2.0, "dir-bf16": 6.0, "dira-plain": 1.0, "dira-bf16": 4.0}
    rows = group_by_plain([{name: {"images_per_second": rate} for name, rate in rates.items()}], ["dir", "dira"])
    assert {row["name"]: row["ratio_to_plain"] for row in rows} == {
        "dir-plain": 1,
        "dir-bf16": 3,
        "dira-plain": 1,
        "dira-bf16": 4,
    }


@pytest.mark.parametrize("row", ["dir", "gan-fp32", "dir-fp8", "dir-fp32-fast", "di-plain", "dir-plain-compile"])
def test_rows_that_are_none_are_refused(row: str) -> None:
    with pytest.raises(UsageError, match=f"--rows {row}: "):
        StepBenchmark(rows=(row,))


@pytest.mark.skipif(choose_precision("auto", CPU) == "fp32", reason="this CPU has no bf16")
def test_bf16_stays_within_the_stated_band_of_fp32(shard_folder: Path, tmp_path: Path) -> None:
    curves = {}
    for precision in ("fp32", "bf16"):
        settings = small(shard_folder, tmp_path, "dira", precision=precision, batch_size=8, lr=0.01, moco_k=64)
        curves[precision] = loss_curves(settings, CPU, num_steps=60)
    assert len(curves["fp32"]["total"]) == 3
    assert 0 < largest_deviation(curves["bf16"], curves["fp32"]) < BAND
