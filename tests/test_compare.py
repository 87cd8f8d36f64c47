import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tyro
from scipy import stats

from downstream.compare import CompareSettings, compare, plan
from downstream.comparison import Cell, compare_cells, draw_chart, format_table, welch
from downstream.networks import Classifier, save_classifier
from errors import UsageError, UserError

SMALL = ("--arch", "resnet18", "--crop-size", "32", "--epochs", "1", "--device", "cpu", "--data-threads", "1")


def settings_for(shards: Path, run_dir: Path, **changes: Any) -> CompareSettings:
    """A comparison that takes seconds."""
    values = {"weights": ("random",), "amounts": ("3", "all"), "runs": 2, "run_dir": str(run_dir)}
    return CompareSettings(("classify", str(shards), *SMALL), **values | changes)


def cells_of(scores: dict[tuple[str, str], list[float]]) -> list[Cell]:
    return [Cell(init, amount, {"auc": found}, 4.0) for (init, amount), found in scores.items()]


CELLS = cells_of(
    {
        ("random", "4"): [0.50, 0.52, 0.51, 0.53],
        ("dira", "4"): [0.60, 0.63, 0.61, 0.58],
        ("random", "all"): [0.80, 0.81, 0.83, 0.79],
        ("dira", "all"): [0.81, 0.80, 0.84, 0.79],
    }
)


def welch_by_hand(a: list[float], b: list[float]) -> float:
    """Welch's t and the Welch-Satterthwaite degrees of freedom."""
    va, vb = (np.var(x, ddof=1) / len(x) for x in (a, b))
    t = (np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return 2 * stats.t.sf(abs(t), freedom)


def test_every_cell_is_tested_against_the_baseline_with_as_many_labels_and_corrected() -> None:
    rows = {(row["weights"], row["labels"]): row for row in compare_cells(CELLS, "auc", "random")}
    by_hand = {
        amount: welch_by_hand(rows["dira", amount]["scores"], rows["random", amount]["scores"])
        for amount in ("4", "all")
    }
    assert by_hand["4"] < by_hand["all"]
    for amount in ("4", "all"):
        assert rows["dira", amount]["p"] == pytest.approx(by_hand[amount])
        assert rows["random", amount]["p"] is None
        assert rows["dira", amount]["mean"] == pytest.approx(np.mean(rows["dira", amount]["scores"]))
        assert rows["dira", amount]["std"] == pytest.approx(np.std(rows["dira", amount]["scores"], ddof=1))
    # Benjamini-Hochberg of two tests: twice the smaller p, and the larger as it is
    assert rows["dira", "4"]["p_corrected"] == pytest.approx(min(2 * by_hand["4"], by_hand["all"]))
    assert rows["dira", "all"]["p_corrected"] == pytest.approx(by_hand["all"])


@pytest.mark.parametrize(("ours", "theirs"), [([0.5], [0.6, 0.7]), ([], [0.6, 0.7]), ([0.5, 0.5], [0.5, 0.5])])
def test_what_cannot_be_tested_is_not(ours: list[float], theirs: list[float]) -> None:
    assert math.isnan(welch(ours, theirs))
    rows = compare_cells(cells_of({("a", "all"): theirs, ("b", "all"): ours}), "auc", "a")
    assert [row["p"] for row in rows] == [row["p_corrected"] for row in rows] == [None, None]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    format_table(rows, "auc", "a")


def test_a_table_has_a_line_for_each_amount_and_marks_what_is_significant() -> None:
    lines = format_table(compare_cells(CELLS, "auc", "random"), "auc", "random").splitlines()
    assert lines[0] == "| auc, % | images | random | dira |"
    assert lines[2].startswith("| 4 | 4 | 51.50 ± 1.29 | 60.50 ± 2.08 (p 0.00")
    assert "*" in lines[2]
    assert lines[3].startswith("| all | 4 | 80.75 ± 1.71 | 81.00 ± 2.16 (p 0.8")
    assert "*" not in lines[3]


def test_distances_are_not_shown_in_percent() -> None:
    cells = [Cell("a", "all", {"hausdorff95_px": [3.0, 5.0]}, 4.0)]
    assert "| 4.00 ± 1.41 |" in format_table(compare_cells(cells, "hausdorff95_px", "a"), "hausdorff95_px", "a")


def test_a_chart_shows_higher_bars_for_higher_means(tmp_path: Path) -> None:
    def coloured(scores: list[float]) -> int:
        cells = cells_of({("a", "all"): [0.5, 0.7], ("b", "all"): scores})
        draw_chart(tmp_path / "chart.png", compare_cells(cells, "auc", "a"), "auc")
        orange = np.array([14, 127, 255])  # matplotlib's second colour, BGR
        return int((cv2.imread(str(tmp_path / "chart.png")) == orange).all(axis=2).sum())

    assert coloured([0.69, 0.7]) > 1.5 * coloured([0.5, 0.51])


def test_a_comparison_is_made_goes_on_and_takes_in_more(
    shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(shard_folder, tmp_path / "run")
    compare(settings)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("classifier.pt")}
    assert len(before) == 4
    save_classifier(tmp_path / "given.pt", Classifier("resnet18", 2), ("a", "b"))
    more = replace(settings, weights=("random", f"given={tmp_path / 'given.pt'}"), localize=True)
    capsys.readouterr()
    content = compare(more)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list(tmp_path.rglob("classifier.pt"))) == 8
    folder = tmp_path / "run"
    assert json.loads((folder / "comparison.json").read_text()) == content
    text = (folder / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    assert "| mean_auc, % | images | random | given |" in text
    assert "81.12" in text  # the published figure
    for metric in ("mean_auc", "pointing_game", "accuracy_at_0.1"):
        assert (folder / f"{metric}.png").exists()
    for row in content["metrics"]["mean_auc"]:
        results = json.loads((folder / f"{row['weights']}-{row['labels']}" / "results.json").read_text())
        assert row["scores"] == [run["mean_auc"] for run in results["runs"]]
        assert row["num_train"] == np.mean([run["num_train"] for run in results["runs"]])


def test_each_job_is_the_compared_command_with_its_weights_and_labels(tmp_path: Path) -> None:
    settings = replace(settings_for(Path("set"), tmp_path), weights=("random", "x=x.pt"), amounts=("4", "25%", "all"))
    jobs = plan(settings)
    assert [(job.init, job.amount) for job in jobs] == [(n, a) for a in settings.amounts for n in ("random", "x")]
    assert [job.settings.weights for job in jobs] == ["random", "x.pt"] * 3
    assert [job.settings.num_patients for job in jobs] == [4, 4, None, None, None, None]
    assert [job.settings.label_fraction for job in jobs] == [1, 1, 0.25, 0.25, 1, 1]
    assert len({job.settings.run_dir for job in jobs}) == 6
    assert {(job.settings.arch, job.settings.epochs, job.settings.runs) for job in jobs} == {("resnet18", 1, 2)}
    masks = ("segment", "--images", "i", "--masks", "m")
    (job,) = plan(CompareSettings(masks, weights=("random",), amounts=("16",), run_dir=str(tmp_path)))
    assert job.settings.num_train == 16


def test_weights_that_are_missing_are_told_before_anything_is_trained(shard_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(shard_folder, tmp_path / "run", weights=("random", "x=no.pth"))
    with pytest.raises(UserError, match=r"no\.pth: there is no such file"):
        compare(settings)
    assert not list((tmp_path / "run").glob("random*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"command": ()},
        {"command": ("localize", "set")},
        {"command": ("classify", "set", "--weights", "x")},
        {"weights": ("no/name",)},
        {"weights": ("a b=file",)},
        {"weights": ("random", "random=x.pt")},
        {"amounts": ("half",)},
        {"amounts": ("120%",)},
        {"amounts": ("0",)},
        {"amounts": ("4", "4")},
        {"command": ("segment", "--images", "i", "--masks", "m"), "amounts": ("25%",)},
        {"command": ("segment", "--images", "i", "--masks", "m"), "localize": True},
        {"baseline": "imagenet"},
        {"runs": 0},
    ],
)
def test_comparisons_that_cannot_be_meant_are_bad_usage(changes: dict[str, Any]) -> None:
    values = {"command": ("classify", "set"), "weights": ("random",)}
    CompareSettings(**values)
    with pytest.raises(UsageError):
        CompareSettings(**values | changes)


def test_the_compared_command_follows_two_dashes() -> None:
    line = ["--weights", "random", "x=y.pt", "--amounts", "4", "all", "--", "classify", "set", "--lr", "1e-3"]
    settings = tyro.cli(CompareSettings, args=line)
    assert settings.command == ("classify", "set", "--lr", "1e-3")
    assert settings.amounts == ("4", "all")
    assert settings.sources == {"random": "random", "x": "y.pt"}
