"""What a run leaves on the disk to go on from, and to give away; and when it does so."""

import math
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError

from errors import UNFINISHED, Unfinished, UserError
from model import distributed
from model.checkpoint import (
    FORMAT,
    VERSION,
    export_weights,
    initialise_from,
    is_whole,
    link,
    load_checkpoint,
)
from model.watchdog import Watchdog
from settings import Settings
from training.run import TERMS, Meter, Run, say
from training.stopping import StopRequest
from training.writer import CheckpointWriter

PARTS_OF_A_STEP = 2**20
"""More than there are batches of validation."""


class Keeper:
    """Keeps a run from being lost: saves it, stops it when asked to, and tells when a rank hangs.

    A context manager, to be entered on all ranks.
    """

    def __init__(self, run: Run, request: StopRequest) -> None:
        self._run = run
        self._request = request
        self._votes = distributed.Votes()
        self._watchdog = Watchdog(run.settings.timeout_s)
        self._writer = CheckpointWriter(run.checkpoints, run.device) if distributed.is_main() else None

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this rank has been asked; the others may not know yet."""
        return self._request.is_asked

    def moved(self, num_parts: int = 0) -> None:
        """Tell that this rank has come further: to the end of a step or, after it, through some of what follows."""
        self._watchdog.position = self._run.step * PARTS_OF_A_STEP + min(num_parts, PARTS_OF_A_STEP - 2)

    def has_batch(self) -> None:
        """Tell that this rank has its batch for the next step: none of the others waits for its data."""
        self._watchdog.position = (self._run.step + 1) * PARTS_OF_A_STEP - 1

    def is_to_stop(self) -> bool:
        """Whether all ranks stop here: one was asked to, or something is wrong. To be called by all after a step."""
        return self._votes.exchange(self._request.is_asked or self._problem() is not None)

    def save(self, meter: Meter) -> None:
        """Save the run, and as the best if this is the best validated state so far; the disk is not waited for."""
        state = describe(self._run, meter)
        if self._writer is not None:
            self._writer.write(state, is_best=self._run.best_step == self._run.step)

    def stop(self, meter: Meter) -> None:
        """Save, wait until it is on the disk, and end this rank with a status that says so.

        Before the first step there is nothing to save: what was done until then is done again.

        Raises:
            Unfinished: The run was asked to stop, or the disk refused a save. On ranks but the main one, SystemExit.
            UserError: A shard is not what was packed; the last checkpoint stays as it is. Likewise.
        """
        run = self._run
        problem = distributed.first_given(self._problem())
        try:
            if problem is None and run.step:
                self.save(meter)
            self.finish()
        finally:
            distributed.barrier()
        if not distributed.is_main():
            sys.exit(UserError.exit_status if problem else UNFINISHED)
        if problem:
            raise UserError(f"{problem}; stopped at step {run.step}: pack that set again, or restore it from a copy")
        why = self._request.name or "a signal to another rank"
        goes_on = f"goes on from {run.checkpoints / 'last.pt'}" if run.step else "starts anew"
        raise Unfinished(f"stopped by {why} at step {run.step} of {run.num_steps}: the same command {goes_on}")

    def _problem(self) -> str | None:
        """Why this rank can't go on: a line about a shard; an empty one where a save has failed, as `finish` says."""
        has_failed = self._writer is not None and self._writer.has_failed
        return self._run.check.problem or ("" if has_failed else None)

    def finish(self) -> None:
        """Wait until all is written; raise UserError where it can't be."""
        if self._writer is not None:
            self._writer.wait()

    def __enter__(self) -> Self:
        self._watchdog.__enter__()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                self._votes.close()
            self.finish()  # whatever ends the run: what is being written is the last good state
        finally:
            self._watchdog.__exit__()


def describe(run: Run, meter: Meter) -> dict[str, Any]:
    """All that the run needs to go on, on the main rank; the tensors are the run's own. To be called on all ranks."""
    terms = TERMS[run.settings.mode]
    sums = {} if meter.sums is None else dict(zip(terms, meter.sums.cpu(), strict=True))
    return {
        "meters": distributed.gather_objects(sums),
        "meter_num_steps": meter.num_steps,
        "format": FORMAT,
        "version": VERSION,
        "arch": run.settings.arch,
        "mode": run.settings.mode,
        "settings": run.settings.to_dict(),
        "step": run.step,
        "is_validation_due": run.is_validation_due,
        "best_loss": run.best_loss,
        "best_step": run.best_step,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "disc_optimizer": run.disc_optimizer.state_dict() if run.disc_optimizer else None,
        "scaler": run.scaler.state_dict(),
        "loaders": distributed.gather_objects(run.loader.state_dict()),
    }


class Found(NamedTuple):
    """What a run goes on from, as the main rank has found it."""

    path: Path | None
    """None to start afresh."""
    note: str = ""
    """One line for the user, if there is something to say."""


def begin(run: Run) -> Meter:
    """Restore or initialise the run as its settings say; return what there is of the current log interval."""
    found = distributed.broadcast_object(find_checkpoint(run) if distributed.is_main() else None)
    if isinstance(found, UserError):
        raise found
    if found.note:
        say(found.note)
    if found.path:
        meter = restore(run, found.path)
        say(f"going on from {found.path}, step {run.step} of {run.num_steps}")
        return meter
    if run.settings.init_from:
        line, run.has_queue = initialise_from(
            run.model, Path(run.settings.init_from), run.settings.arch, run.settings.mode
        )
        say(line)
    return Meter()


def find_checkpoint(run: Run) -> Found | UserError:
    """Find what the settings ask to go on from; a damaged last.pt is put aside for the one before."""
    resume, folder = run.settings.resume, run.checkpoints
    for partial in folder.glob("*.tmp"):
        partial.unlink()  # of a run that was killed
    last, previous, damaged = folder / "last.pt", folder / "previous.pt", folder / "damaged.pt"
    if resume not in {"auto", "never"}:
        return Found(Path(resume))
    if not (last.exists() or previous.exists()):
        return Found(None)
    if resume == "never":
        return UserError(f"{last} is from an earlier run: leave out --resume never, or use another --run-dir")
    if is_whole(last) or not previous.exists():
        return Found(last)
    if not is_whole(previous):
        return UserError(f"{last} and {previous} are damaged: take copies from elsewhere, or another --run-dir")
    note = f"{last} is missing: {previous} takes its place"
    if last.exists():
        last.replace(damaged)  # or the next save would keep it instead of the good one
        note = f"{last} was damaged (now {damaged.name}): {previous} takes its place"
    return Found(previous, note)


def restore(run: Run, path: Path) -> Meter:
    """Go on where the checkpoint was taken; return its part of the current log interval.

    Raises:
        UserError: It is none, is damaged, or is of another run.
    """
    state = load_checkpoint(path, run.device)
    if state.get("format") != FORMAT or "loaders" not in state:
        raise UserError(f"{path} is no checkpoint to resume from: to start from its weights use --init-from")
    if state.get("version") != VERSION:
        raise UserError(f"{path}: a checkpoint of version {state.get('version')}; this program reads {VERSION}")
    try:
        run.settings.refuse_other(Settings.from_dict(state["settings"], str(path)), str(path))
        meter = _restore(run, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path}: does not fit this run ({what})") from None
    _start_loader(run, path, state["loaders"])
    _settle_best(run, path)
    return meter


def _restore(run: Run, state: dict[str, Any]) -> Meter:
    run.model.load_state_dict(state["model"])
    run.has_queue = True
    run.optimizer.load_state_dict(state["optimizer"])
    if run.disc_optimizer is not None:
        run.disc_optimizer.load_state_dict(state["disc_optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.best_loss, run.best_step = state["step"], state["best_loss"], state["best_step"]
    run.is_validation_due = state["is_validation_due"]
    if not state["meter_num_steps"]:
        return Meter()
    meters = torch.stack([torch.stack([sums[term] for term in TERMS[run.settings.mode]]) for sums in state["meters"]])
    is_same_ranks = len(meters) == distributed.world_size()
    return Meter(meters[distributed.rank()] if is_same_ranks else meters.mean(dim=0), state["meter_num_steps"])


def _start_loader(run: Run, path: Path, loaders: list[dict[str, Any]]) -> None:
    ranks, now = len(loaders), distributed.world_size()
    if ranks == now:
        run.loader.load_state_dict(loaders[distributed.rank()])
        return
    run.loader.start_anew(run.step)
    say(
        f"{path} is from {ranks} ranks, these are {now}: same step, schedule and global batch of "
        f"{run.settings.batch_size}; from here on the data comes in another order"
    )


def _settle_best(run: Run, path: Path) -> None:
    """Make best.pt and what the run knows of it agree again, after whatever came between."""
    best = run.checkpoints / "best.pt"
    if path.parent != run.checkpoints:
        run.best_loss, run.best_step = math.inf, 0  # the best weights so far are in the other folder
    elif not distributed.is_main():
        return  # only the main rank writes it
    elif path.name == "previous.pt":  # best.pt may be younger, or damaged as last.pt was: they can be one file
        whole = is_whole(best)
        state = load_checkpoint(best, torch.device("cpu")) if whole else {}
        run.best_loss, run.best_step = state.get("best_loss", math.inf), state.get("best_step", 0)
        if best.exists() and not whole:
            say(f"{best} was damaged too: the best weights are sought anew from here on")
            best.unlink()
    elif run.best_step == run.step:
        link(path, best)  # in case the kill came between the two


def export_last(run: Run) -> Path:
    """Write the run's last weights for others to use, the whole folder at once.

    Not those of the lowest validation loss, which can be early ones: InfoNCE is low while the network changes so much
    that older keys in the queue differ from newer ones, and rises when only the radiograph tells keys apart.
    """
    folder = Path(run.settings.run_path) / "export"
    temporary = folder.with_name("export.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        export_weights(run.model, run.settings.arch, run.settings.mode, temporary)
    except SafetensorError as error:  # smp's and safetensors' own writing does not raise OSError
        raise OSError(0, str(error), str(temporary)) from None
    shutil.rmtree(folder, ignore_errors=True)
    return temporary.rename(folder)
