import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.io import read_image

from errors import UserError
from rundir import RunLog, check_config, lock, read_metrics, write_config
from settings import Settings

SETTINGS = Settings(shards=("a",), mode="dir")


def line(step: int, **values: float) -> dict[str, object]:
    return {"phase": "train", "step": step, "epoch": 0, "total": 1.0 / step, **values}


def test_a_folder_is_refused_while_a_run_lives_and_free_once_it_has_died(tmp_path: Path) -> None:
    program = (
        f"from rundir import lock; from pathlib import Path; f = lock(Path({str(tmp_path)!r})); print(1, flush=True)"
    )
    command = [sys.executable, "-c", f"{program}; import time; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="in use by another run"):
            lock(tmp_path)
        other.kill()
        other.wait()
    with lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file" / "run")):
        lock(tmp_path / "file" / "run")


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    check_config(tmp_path, SETTINGS)
    write_config(tmp_path, SETTINGS, {"precision": "fp32"})
    check_config(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="--mode dir there, di here"):
        check_config(tmp_path, Settings(shards=("a",), mode="di"))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"is no config\.json of a run"):
        check_config(tmp_path, SETTINGS)


def test_config_holds_settings_versions_and_commit(tmp_path: Path) -> None:
    write_config(tmp_path, SETTINGS, {"precision": "fp32"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"] == SETTINGS.to_dict()
    assert config["chosen"] == {"precision": "fp32"}
    assert config["versions"]["torch"]
    assert "git_commit" in config


def test_a_kill_never_leaves_half_a_config_or_half_the_metrics(tmp_path: Path) -> None:
    """They are replaced, never written over: who has opened the old ones still reads them whole."""
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(line(1))}\n{json.dumps(line(2))}\n")
    write_config(tmp_path, SETTINGS, {})
    paths = [tmp_path / "config.json", tmp_path / "metrics.jsonl"]
    contents, files = [path.read_text() for path in paths], [path.open() for path in paths]
    write_config(tmp_path, SETTINGS, {"precision": "fp32"})
    with RunLog(tmp_path, first_step=1, num_steps=2, is_main=True):
        pass
    assert [file.read() for file in files] == contents
    assert [path.read_text() for path in paths] != contents
    for file in files:
        file.close()


def test_lines_go_to_metrics_and_tensorboard(tmp_path: Path) -> None:
    with RunLog(tmp_path, first_step=0, num_steps=2, is_main=True) as log:
        for step in (1, 2):
            log.write(line(step))
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(1), line(2)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/total")] == [(1, 1.0), (2, 0.5)]


def test_what_an_interrupted_run_logged_too_much_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 2, 3)) + '{"phase": "tra')
    with RunLog(tmp_path, first_step=2, num_steps=4, is_main=True) as log:
        log.write(line(3, lr=0.5))
    assert read_metrics(path) == [line(1), line(2), line(3, lr=0.5)]


def test_ranks_other_than_the_main_one_write_nothing(tmp_path: Path) -> None:
    images = torch.zeros(1, 1, 32, 32)
    with RunLog(tmp_path, first_step=0, num_steps=1, is_main=False) as log:
        log.advance()
        log.write(line(1))
        log.write_reconstructions(1, images, images, images)
        log.draw_curves(now=True)
    assert not list(tmp_path.iterdir())


def test_reconstructions_are_rows_of_inputs_outputs_and_targets(tmp_path: Path) -> None:
    levels = [torch.full((4, 1, 32, 32), value) for value in (0.2, 0.6, 1.0)]
    with RunLog(tmp_path, first_step=0, num_steps=1, is_main=True) as log:
        log.write_reconstructions(7, *levels)
    picture = read_image(str(tmp_path / "reconstructions" / "step-0000007.png"))
    height = picture.shape[1]
    rows = [picture[0, height * (2 * i + 1) // 6, 20].item() for i in range(3)]
    assert rows == pytest.approx([0.2 * 255, 0.6 * 255, 255], abs=1)


def test_curves_are_drawn_from_the_lines(tmp_path: Path) -> None:
    with RunLog(tmp_path, first_step=0, num_steps=1, is_main=True) as log:
        log.write(line(1, mse=0.1, lr=0.03, images_per_second=10.0))
        log.draw_curves()
        assert not (tmp_path / "curves.png").exists(), "not every time it is asked for"
        log.draw_curves(now=True)
    assert read_image(str(tmp_path / "curves.png")).shape[1] > 100
