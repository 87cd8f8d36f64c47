import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from pipeline.pack_job import pack
from pipeline.plan import PackSettings
from pipeline.shardset import ShardSet
from tests.commands import ROOT

PROGRAM = """
import sys
from pathlib import Path
import pipeline.time_limit
pipeline.time_limit.IMAGE_LIMIT_S = 0.02
from pipeline.pack_job import pack
from pipeline.plan import PackSettings
options = {"size_px": 32, "workers": 1, "val_fraction": 0, "max_rejected": 1}
pack(PackSettings(images=(Path(sys.argv[1]),), out=Path(sys.argv[2]), **options))
"""


def test_an_image_that_takes_too_long_ends_the_pack_which_carries_on_without_it(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "set"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        cv2.imwrite(str(images / f"small{i}.png"), rng.integers(0, 256, (40, 40), dtype=np.uint8))
    cv2.imwrite(str(images / "huge.png"), rng.integers(0, 256, (6000, 6000), dtype=np.uint8))
    command = [sys.executable, "-c", PROGRAM, str(images), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert f"error: {images}/huge.png: not decoded within 0.02 s; the same command carries on without it" in done.stderr
    assert json.loads((out / ".pack" / "too-slow.json").read_text()) == [f"{images}/huge.png"]
    settings = {"size_px": 32, "workers": 1, "val_fraction": 0, "max_rejected": 1}
    pack(PackSettings(images=(images,), out=out, **settings))
    assert {key for key, _, _ in ShardSet.open(out).read_samples("train")} == {"small0", "small1", "small2"}
    assert "huge.png,takes too long to decode" in (out / "rejected.csv").read_text()
    assert not (out / ".pack").exists()
