"""Faults of training: kills, deaths of ranks, signals, full disks, ranks that hang."""

import random
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil

from errors import UNFINISHED
from model.checkpoint import is_whole
from tests.faults.report import Tally
from tests.faults.runs import (
    CONFIGS,
    Config,
    Process,
    finish,
    make_shards,
    reference,
    run_difference,
    running,
    train_command,
    wait_for,
    wait_for_moment,
)

KILLS_A_RUN = 5
STOPS_WITHIN_S = 20
"""Signal to exit: some steps and a save, on a machine that may be busy."""


def kill_training(count: int, seed: int, work: Path) -> Tally:
    """Kill runs with all their processes at random moments, restart them, compare what comes out in the end."""
    tally, number = Tally("kill-training"), 0
    while tally.tried < count:
        rng, config = random.Random(f"{seed} {number}"), CONFIGS[number % len(CONFIGS)]
        whole, run_dir = reference(work, config), new_folder(work / f"killed-{config.name}")
        command = train_command(make_shards(work), run_dir, config)
        for _ in range(min(KILLS_A_RUN, count - tally.tried)):
            with running(command) as process:
                moment = wait_for_moment(rng, run_dir, process)
                process.kill()
            if moment:
                tally.count(moment)
        judge(tally, f"run {number} ({config.name})", finish(command) or run_difference(run_dir, whole))
        number += 1
    return tally


def rank_death(count: int, seed: int, work: Path) -> Tally:
    """Kill one worker of two under `torchrun --max-restarts`; the job has to end as if nothing had happened."""
    tally, number = Tally("rank-death"), 0
    while tally.tried < count:
        rng, config = random.Random(f"{seed} {number}"), two_ranks(number)
        whole, run_dir = reference(work, config), new_folder(work / f"death-{config.name}")
        num_deaths = min(2, count - tally.tried)
        with running(train_command(make_shards(work), run_dir, config, max_restarts=3)) as process:
            for _ in range(num_deaths):
                moment = wait_for_moment(rng, run_dir, process)
                workers = process.workers()
                if moment and workers:
                    rank = rng.randrange(len(workers))
                    kill_one(workers[rank])
                    tally.count(f"rank {rank}, {moment}")
            status = process.wait()
            problem = f"torchrun ended with {status}: {process.words()[-500:]}" if status else ""
        judge(tally, f"run {number} ({config.name})", problem or run_difference(run_dir, whole))
        number += 1
    return tally


def stop_signals(count: int, seed: int, work: Path) -> Tally:
    """Ask runs to stop at random moments: they have to say soon that they can go on, and end as they would have."""
    tally, slowest_s, number = Tally("stop-signals"), 0.0, 0
    while tally.tried < count:
        rng, config = random.Random(f"{seed} {number}"), CONFIGS[number % len(CONFIGS)]
        whole, run_dir = reference(work, config), new_folder(work / f"stopped-{config.name}")
        command = train_command(make_shards(work), run_dir, config)
        number_sent, problem = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)), ""
        with running(command) as process:
            moment = wait_for_moment(rng, run_dir, process)
            if moment and moment != "start":  # before its imports are done, Python ends on any signal, losing nothing
                sent_at = time.monotonic()
                ask_to_stop(process, config, number_sent)
                status = process.wait()
                slowest_s = max(slowest_s, time.monotonic() - sent_at)
                problem = stop_problem(process, config, status, run_dir, time.monotonic() - sent_at)
                tally.count(f"{number_sent.name}, {moment}")
        judge(tally, f"run {number} ({config.name})", problem or finish(command) or run_difference(run_dir, whole))
        number += 1
    tally.figures["slowest_exit_s"] = round(slowest_s, 1)
    return tally


def ask_to_stop(process: Process, config: Config, number: signal.Signals) -> None:
    """Send a signal as a scheduler does: torchrun passes on SIGTERM and SIGINT, SIGUSR1 goes to the ranks."""
    if config.ranks > 1 and number == signal.SIGUSR1:
        for worker in process.workers():
            worker.send_signal(number)
    else:
        process.popen.send_signal(number)


def stop_problem(process: Process, config: Config, status: int | None, run_dir: Path, took_s: float) -> str:
    """What is wrong with the way in which a run has stopped."""
    words = process.words()
    if (run_dir / "export").exists() and status == 0:
        return ""  # the signal came after its last step
    if status is None or took_s > STOPS_WITHIN_S:
        return f"took {took_s:.0f} s to stop: {words[-500:]}"
    if config.ranks == 1 and status != UNFINISHED:
        return f"ended with {status}: {words[-500:]}"
    if "not finished: " not in words:
        return f"did not say that it goes on: {words[-500:]}"
    last = run_dir / "checkpoints" / "last.pt"
    if "the same command starts anew" in words:
        return "left a checkpoint from before its first step" if last.exists() else ""
    return "" if is_whole(last) else "left no whole last.pt"


def disk_full(count: int, seed: int, work: Path) -> Tally:
    """Let the disk refuse at random moments (RLIMIT_FSIZE): checkpoints alone, or whatever is written."""
    tally, number = Tally("disk-full"), 0
    while tally.tried < count:
        rng, config = random.Random(f"{seed} {number}"), CONFIGS[number % len(CONFIGS)]
        whole, run_dir = reference(work, config), new_folder(work / f"full-{config.name}")
        command, limit_bytes, problem = train_command(make_shards(work), run_dir, config), rng.choice((0, 2**20)), ""
        with running(command) as process:
            moment = wait_for_moment(rng, run_dir, process)
            for worker in process.workers() if moment else []:
                resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
            if moment:
                tally.count(f"{limit_bytes} bytes, {moment}")
                problem = full_problem(process, config, run_dir)
        judge(tally, f"run {number} ({config.name})", problem or finish(command) or run_difference(run_dir, whole))
        number += 1
    return tally


def full_problem(process: Process, config: Config, run_dir: Path) -> str:
    """What is wrong with the way in which a run has met its full disk."""
    status, words, last = process.wait(), process.words(), run_dir / "checkpoints" / "last.pt"
    if status == 0:
        return ""  # all was written by then
    if config.ranks == 1 and status != UNFINISHED:
        return f"ended with {status}: {words[-500:]}"
    if "not finished: " not in words or "File too large" not in words:
        return f"did not say what is wrong: {words[-500:]}"
    return "" if not last.exists() or is_whole(last) else "last.pt is damaged"


def hung_rank(count: int, seed: int, work: Path) -> Tally:
    """Halt one rank of two (SIGSTOP): the run has to end, naming it, and go on later to the same end."""
    tally, number = Tally("hung-rank"), 0
    while tally.tried < count:
        rng, config = random.Random(f"{seed} {number}"), two_ranks(number)
        whole, run_dir = reference(work, config), new_folder(work / f"hung-{config.name}")
        command, problem = train_command(make_shards(work), run_dir, config, "--timeout-s", 6), ""
        with running(command) as process:
            begun = wait_for((run_dir / "metrics.jsonl").exists, process)
            time.sleep(rng.uniform(0.5, 2))
            workers = process.workers()
            if begun and len(workers) == config.ranks:
                rank = rng.randrange(config.ranks)
                workers[rank].suspend()
                tally.count(f"rank {rank}")
                named = f"rank {rank} did not answer"
                if not wait_for(lambda: named in process.words(), process, 60):  # noqa: B023
                    problem = f"{named!r} was not said: {process.words()[-500:]}"
        command = train_command(make_shards(work), run_dir, config)
        judge(tally, f"run {number} ({config.name})", problem or finish(command) or run_difference(run_dir, whole))
        number += 1
    return tally


def two_ranks(number: int) -> Config:
    """The configurations of two ranks in turn."""
    configs = [config for config in CONFIGS if config.ranks > 1]
    return configs[number % len(configs)]


def judge(tally: Tally, what: str, problem: str) -> None:
    """Note a run's end."""
    if problem:
        tally.lose(f"{what}: {problem}")
    tally.tell()


def kill_one(process: psutil.Process) -> None:
    """Kill -9, if it still lives."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def new_folder(path: Path) -> Path:
    """A path where there is nothing."""
    shutil.rmtree(path, ignore_errors=True)
    return path
