import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.commands import ROOT, run_command


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        blurred = cv2.GaussianBlur(rng.integers(0, 256, (300, 280), dtype=np.uint8), (0, 0), 8)
        cv2.imwrite(str(folder / f"{i // 2:08d}_{i % 2:03d}.png"), cv2.equalizeHist(blurred))
    return folder


@pytest.fixture(scope="module")
def shards(images: Path) -> Path:
    labels = images.with_name("labels.csv")
    rows = [f"{path.name},{'Mass' if path.name.endswith('1.png') else 'No Finding'}" for path in images.iterdir()]
    labels.write_text("\n".join(["Image Index,Finding Labels", *rows]))
    out = images.with_name("shards")
    done = run_command("shard_cxr14.py", "pack", images, "--out", out, "--labels", labels, "--val-fraction", "0.34")
    assert done.returncode == 0, done.stderr
    assert "packing 8 train, 4 val as raw, 512 px" in done.stdout
    assert done.stdout.splitlines()[-1] == f"packed 12 images into {out}"
    assert re.fullmatch(r"packing: 12/12 images, \d+ images/s, 00:00 left\n", done.stderr)
    return out


def test_verify_says_good(shards: Path) -> None:
    done = run_command("shard_cxr14.py", "verify", shards)
    assert (done.returncode, done.stdout) == (0, f"{shards}: good, 12 samples\n")


def test_verify_names_shard_and_key_of_a_flipped_byte(shards: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", shards, tmp_path / "set"], check=True)
    tar = tmp_path / "set" / "train" / "train-000000.tar"
    key = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True).stdout.split(".")[0]
    with tar.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    done = run_command("shard_cxr14.py", "verify", tmp_path / "set")
    assert done.returncode == 1
    assert done.stdout == f"{tar}: sample {key}: its image or JSON is damaged (wrong checksum)\n"
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'set'}: 1 problem, listed above; pack it again"


def test_inspect_says_what_is_in_it(shards: Path) -> None:
    done = run_command("shard_cxr14.py", "inspect", shards)
    assert done.returncode == 0
    table = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines()}
    assert "12 radiographs as raw, 512 px" in done.stdout
    assert table["samples"] == ["8", "4"]
    assert table["patients"] == ["4", "2"]
    assert table["Mass"] == ["4", "2"]


def test_inspect_draws_target_query_and_key_of_eight_samples(shards: Path, tmp_path: Path) -> None:
    done = run_command("shard_cxr14.py", "inspect", shards, "--image", tmp_path / "views.png")
    assert done.returncode == 0, done.stderr
    sheet = cv2.imread(str(tmp_path / "views.png"), cv2.IMREAD_GRAYSCALE)
    assert sheet.shape == (3 * (224 + 4) + 4, 8 * (224 + 4) + 4)
    views = np.stack([[sheet[4 + 228 * r :, 4 + 228 * c :][:224, :224] for c in range(8)] for r in range(3)]).astype(
        int
    )
    assert (sheet[:4] == 255).all()
    target, query, key = views.std(axis=(2, 3))
    assert (target > 10).all()
    assert (query > 5).any()
    assert (key > 5).any()
    assert (np.abs(views[0] - views[1]).mean(axis=(1, 2)) < np.abs(views[0] - views[2]).mean(axis=(1, 2))).mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("pack", "IMAGES", "--out", "OUT", "--size", "0"), "--store raw needs"),
        (("pack", "--out", "OUT"), "at least one folder"),
        (("pack", "IMAGES"), "--out"),
        (("pack", "IMAGES", "--out", "OUT", "--store", "tiff"), "--store"),
        (("unpack",), "unpack"),
        ((), "pack"),
    ],
)
def test_bad_usage_exits_with_2(images: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    given = {"IMAGES": images, "OUT": tmp_path / "out"}
    done = run_command("shard_cxr14.py", *(given.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert reason in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_exits_with_1(images: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("unknown.png\n")
    for arguments, reason in (
        (("pack", tmp_path / "gone", "--out", tmp_path / "out"), f"{tmp_path}/gone: does not exist"),
        (("pack", images, "--out", tmp_path / "out", "--train-list", tmp_path / "list.txt"), "names 1 image"),
        (("pack", images, "--out", tmp_path), f"{tmp_path}: holds something else (list.txt)"),
        (("pack", images, "--out", "/proc/out"), "/proc/out"),
        (("verify", tmp_path), "no shard set"),
        (("inspect", tmp_path / "gone"), "no such folder"),
    ):
        done = run_command("shard_cxr14.py", *arguments)
        assert done.returncode == 1
        assert reason in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_jpeg_leaves_standard_error_to_the_progress(images: Path, tmp_path: Path) -> None:
    """Libjpeg writes `Corrupt JPEG data` there itself."""
    (tmp_path / "images").mkdir()
    image = cv2.imread(str(min(images.iterdir())))
    data = bytearray(cv2.imencode(".jpg", image)[1].tobytes())
    data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\xd9"
    (tmp_path / "images" / "a.jpg").write_bytes(data)
    done = run_command("shard_cxr14.py", "pack", tmp_path / "images", "--out", tmp_path / "out")
    assert done.returncode == 0
    assert re.fullmatch(r"packing: 1/1 images, \d+ images/s, 00:00 left\n", done.stderr)


def test_terminal_gets_a_progress_bar(images: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "shard_cxr14.py", "pack", str(images), "--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal, check=True)
    os.close(terminal)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)
    assert re.search(r"packing: 100%\|.*\| 12/12 \[00:0\d<00:00, .* images/s\]", shown)
