"""Small training runs to do harm to, and the comparison with a run that nothing happened to."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from model.checkpoint import load_checkpoint
from tests.commands import ROOT, run_command

NUM_STEPS = 11
STEPS_PER_EPOCH = 4
TIMEOUT_S = 300
"""When a command that should have ended counts as hanging."""


class Config(NamedTuple):
    """A sort of run."""

    mode: str
    ranks: int

    @property
    def name(self) -> str:
        """For folders and reports."""
        return f"{self.mode}-{self.ranks}"


CONFIGS = [Config(mode, ranks) for ranks in (1, 2) for mode in ("dira", "dir", "di")]


def make_shards(work: Path) -> Path:
    """Phantoms of 64 px, packed raw: enough for four steps an epoch, with a validation split."""
    shards = work / "shards"
    if not (shards / "manifest.json").exists():
        phantom = ("-m", "pipeline.phantom", work / "phantoms", "--num-images", "40", "--size-px", "64")
        run_command(*phantom).check_returncode()
        pack = ("shard_cxr14.py", "pack", work / "phantoms" / "images", "--out", shards, "--size", "64")
        run_command(*pack, "--samples-per-shard", "8", "--val-fraction", "0.25").check_returncode()
    return shards


def train_command(shards: Path, run_dir: Path, config: Config, *more: object, max_restarts: int = 0) -> list[str]:
    """The command of a run that takes seconds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", config.ranks]
    launcher += ["--max-restarts", max_restarts, "--monitor-interval", "0.05"]
    sizes = ("--arch", "resnet18", "--crop-size", "32", "--batch-size", "8", "--moco-k", "64", "--epochs", "4")
    pace = ("--max-steps", NUM_STEPS, "--save-every", "3", "--log-every", "2", "--data-threads", "1")
    machine = ("--precision", "fp32", "--device", "cpu")
    command = [sys.executable, *(launcher if config.ranks > 1 else []), "train.py", shards, "--mode", config.mode]
    return list(map(str, [*command, "--run-dir", run_dir, *sizes, *pace, *machine, *more]))


@dataclass
class Process:
    """A command that runs."""

    popen: subprocess.Popen[bytes]
    _words: list[bytes] = field(default_factory=list)

    def descendants(self) -> list[psutil.Process]:
        """It and all that it has started, the oldest first."""
        try:
            this = psutil.Process(self.popen.pid)
            return [this, *this.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """The processes that train, one a rank, in the order of the ranks."""
        found = {}
        for process in self.descendants():
            try:
                command, variables = process.cmdline(), process.environ()
            except (psutil.Error, OSError):
                continue
            if "train.py" in command and "torch.distributed.run" not in command:
                found.setdefault(int(variables.get("RANK", "0")), process)
        return [found[rank] for rank in sorted(found)]

    def kill(self) -> None:
        """End all of it as a power cut would."""
        for process in self.descendants():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.popen.wait()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int | None:
        """Its exit status; None, and it is killed, if it hangs."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def words(self) -> str:
        """What it has said on stderr."""
        return b"".join(self._words).decode(errors="replace")

    def listen(self) -> None:
        """Take down what it says, to its end."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self._words.append(line)


@contextmanager
def running(command: list[str]) -> Iterator[Process]:
    """Start a command; whatever is left of it afterwards is killed."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as popen:
        process = Process(popen)
        listener = threading.Thread(target=process.listen, daemon=True)
        listener.start()
        try:
            yield process
        finally:
            process.kill()
            listener.join()


def finish(command: list[str]) -> str:
    """Run a command to its end; return what is wrong with that, or nothing."""
    with running(command) as process:
        status = process.wait()
        return "" if status == 0 else f"the last command ended with {status}: {process.words()[-500:]}"


def reference(work: Path, config: Config) -> Path:
    """The run folder of a run that nothing happens to; made once."""
    run_dir = work / "reference" / config.name
    if not (run_dir / "export").exists():
        problem = finish(train_command(make_shards(work), run_dir, config))
        if problem:
            raise RuntimeError(f"the reference run {config.name}: {problem}")
    return run_dir


# --- moments --------------------------------------------------------------------------------------------------------


def wait_for(happened: Callable[[], bool], process: Process, timeout_s: float = TIMEOUT_S) -> bool:
    """Wait until something has happened; False if the process has ended before."""
    until = time.monotonic() + timeout_s
    while process.popen.poll() is None and time.monotonic() < until:
        if happened():
            return True
        time.sleep(0.002)
    return False


def wait_for_moment(rng: random.Random, run_dir: Path, process: Process) -> str:
    """Wait for a random moment in a run's life; return what it was, or nothing if the run has ended before."""
    moment = rng.choices(("start", "step", "save", "validation"), (1, 6, 4, 3))[0]
    started = time.time_ns()
    config, partial = run_dir / "config.json", run_dir / "checkpoints" / "last.pt.tmp"
    has_begun = lambda: config.exists() and config.stat().st_mtime_ns > started  # noqa: E731
    if moment == "start":
        time.sleep(rng.uniform(0, 4))
        return moment if process.popen.poll() is None else ""
    if not wait_for(has_begun, process):
        return ""
    if moment == "step":
        time.sleep(rng.uniform(0, 3))
    elif moment == "save":
        if not wait_for(partial.exists, process):
            return ""
        time.sleep(rng.choice((0, rng.uniform(0, 0.3))))
    else:
        if not wait_for(lambda: is_validating(run_dir), process):
            return ""
        time.sleep(rng.uniform(0, 0.1))
    return moment if process.popen.poll() is None else ""


def is_validating(run_dir: Path) -> bool:
    """Whether the last thing that a run has logged is the end of an epoch's training."""
    lines = read_lines(run_dir)
    return bool(lines) and lines[-1]["phase"] == "train" and lines[-1]["step"] % STEPS_PER_EPOCH == 0


# --- comparison -----------------------------------------------------------------------------------------------------


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what a clock says."""
    path = run_dir / "metrics.jsonl"
    texts = path.read_text().split("\n")[:-1] if path.exists() else []
    timed = {"images_per_second", "images_per_second_per_gpu", "data_wait_fraction"}
    return [{name: value for name, value in json.loads(text).items() if name not in timed} for text in texts]


def difference(ours: object, theirs: object, where: str = "") -> str:
    """The first place where nested checkpoints differ, tensors by the bit; empty if they are equal."""
    if type(ours) is not type(theirs):
        return f"{where}: {type(ours).__name__} and {type(theirs).__name__}"
    if isinstance(ours, torch.Tensor):
        return "" if torch.equal(ours, theirs) else f"{where}: other numbers"
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return f"{where}: other keys"
        pairs = [(f"{where}.{key}", ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return f"{where}: {len(ours)} and {len(theirs)} items"
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        return "" if ours == theirs else f"{where}: {ours!r} and {theirs!r}"
    return next((found for name, *pair in pairs if (found := difference(*pair, name))), "")


def run_difference(run_dir: Path, other: Path) -> str:
    """What differs between finished runs: weights, optimizers, queue, place in the data, metrics, exports, files."""
    if found := difference(read_lines(run_dir), read_lines(other), "metrics.jsonl"):
        return found
    names = [{str(p.relative_to(d)) for p in d.rglob("*") if p.is_file()} for d in (run_dir, other)]
    stray = {name for name in names[0] ^ names[1] if not name.startswith("tensorboard/")}
    if stray:
        return f"files of one run only: {', '.join(sorted(stray))}"
    for name in sorted(names[0]):
        if name.startswith("checkpoints/"):
            states = [load_checkpoint(folder / name, torch.device("cpu")) for folder in (run_dir, other)]
            for state in states:
                state["settings"].pop("run_dir")
                state["settings"].pop("timeout_s")
            found = difference(*states, name)
        elif name.startswith("export/"):
            found = "" if (run_dir / name).read_bytes() == (other / name).read_bytes() else f"{name}: other bytes"
        else:
            continue
        if found:
            return found
    return ""
