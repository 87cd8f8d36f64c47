import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.report import describe_hardware, format_table, keep, make_result, publish, read_results
from errors import UserError
from provenance import find_commit
from tests.commands import ROOT, run_command

ROWS = [
    {"name": "plain", "images_per_second": 12.345, "spread": [10.0, 1234.5], "ratio_to_plain": 1.0},
    {"name": "ours", "images_per_second": 123.45, "spread": [120.0, 125.0], "peak_memory_mib": 7.0},
]


@pytest.fixture
def result() -> dict[str, Any]:
    return make_result("bench_nothing", describe_hardware("cpu"), {"quick": True}, ROWS)


def test_a_table_has_a_column_for_every_figure_of_any_row() -> None:
    assert format_table(ROWS).splitlines() == [
        "| name | images per second | spread | ratio to plain | peak memory mib |",
        "| --- | --- | --- | --- | --- |",
        "| plain | 12.3 | 10 to 1234 | 1 |  |",
        "| ours | 123 | 120 to 125 |  | 7 |",
    ]


def test_the_last_line_is_the_result(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    publish(result, None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert list(result) == ["benchmark", "date", "hardware", "versions", "commit", "settings", "rows"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert (find_commit() or "").removesuffix("+") == head.strip()


def test_what_is_kept_is_read_again_oldest_first(result: dict[str, Any], tmp_path: Path) -> None:
    later = result | {"date": "2999-01-01", "hardware": result["hardware"] | {"cpu": "A", "gpu": "New (R) GPU"}}
    assert keep(later, tmp_path).name == f"nothing-new-r-gpu-{result['hardware']['cores']}-cores-2999-01-01"
    keep(result, tmp_path)
    assert read_results(tmp_path) == [result, later]
    assert len(list(tmp_path.iterdir())) == 6, "nothing temporary is left"


def test_the_picture_has_a_panel_for_each_benchmark_and_machine(result: dict[str, Any], tmp_path: Path) -> None:
    def draw() -> tuple[int, int]:
        done = run_command("-m", "benchmarks.report", "--results", tmp_path)
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / "images_per_second.png") as image:
            return image.size

    keep(result, tmp_path)
    width_px, height_px = draw()
    keep(result | {"benchmark": "bench_other"}, tmp_path)
    assert draw() == (width_px, pytest.approx(2 * height_px, rel=0.15))


def test_a_folder_without_results_or_with_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path)
    for content in ("{", "[]", '{"benchmark": "x", "hardware": {}, "rows": [], "date": ""}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(UserError, match=r"other\.json: no result"):
            read_results(tmp_path)
