"""scripts/slurm.sh, under stand-ins for srun and scontrol that do on one machine what Slurm's would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from errors import UsageError
from tests.commands import ROOT

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@"; first=$?; wait $!; second=$?
exit $(( first > second ? first : second ))
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1
[ "$1" = requeue ] && echo "requeued $2"
exit 0
"""


def run_script(folder: Path, train: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1", "TRAIN": train}
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "scripts" / "slurm.sh"],
        cwd=ROOT,
        env=os.environ | job | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_task_is_a_rank_of_one_run(tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text(
        "import torch\nfrom model import distributed as d\n"
        "d.init_from_environment(torch.device('cpu'))\n"
        "print(d.rank(), d.local_rank(), d.world_size(), d.local_world_size(), d.gather_objects('here'))\n"
        "d.shutdown()\n"
    )
    done = run_script(tmp_path, str(program))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # of torch 2.10
    assert sorted(lines) == ["0 0 2 2 ['here', 'here']", "1 1 2 2 []"]


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False), (UsageError.exit_status, False), (0, False)])
def test_only_an_unfinished_run_is_put_back_in_the_queue(tmp_path: Path, status: int, requeued: bool) -> None:
    program = tmp_path / "ends.py"
    program.write_text(f"raise SystemExit({status})")
    done = run_script(tmp_path, str(program))
    assert ("requeued 7" in done.stdout) == requeued
    assert done.returncode == (0 if requeued else status)
