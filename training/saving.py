"""What a run leaves on the disk to go on from, and to give away."""

import math
import shutil
from pathlib import Path

from errors import UserError
from model import distributed
from model.checkpoint import FORMAT, VERSION, export_weights, initialise_from, load_checkpoint, save_checkpoint
from rundir import link_best
from settings import Settings, refuse_other_settings
from training.run import Meter, Run, say


def save(run: Run, meter: Meter) -> None:
    """Write last.pt from the main rank, and best.pt if this is the best validated state so far."""
    loaders = distributed.gather_objects(run.loader.state_dict())
    if not distributed.is_main():
        return
    state = {
        "format": FORMAT,
        "version": VERSION,
        "arch": run.settings.arch,
        "mode": run.settings.mode,
        "settings": run.settings.to_dict(),
        "step": run.step,
        "best_loss": run.best_loss,
        "best_step": run.best_step,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "disc_optimizer": run.disc_optimizer.state_dict() if run.disc_optimizer else None,
        "scaler": run.scaler.state_dict(),
        "meter": (meter.sums, meter.num_steps),
        "loaders": loaders,
    }
    run.checkpoints.mkdir(exist_ok=True)
    save_checkpoint(run.checkpoints / "last.pt", state)
    if run.best_step == run.step:
        link_best(run.checkpoints)


def restore(run: Run, path: Path) -> Meter:
    """Go on where the checkpoint was taken; return its part of the current log interval."""
    state = load_checkpoint(path, run.device)
    if state.get("format") != FORMAT or "loaders" not in state:
        raise UserError(f"{path} is no checkpoint to resume from: to start from its weights use --init-from")
    refuse_other_settings(run.settings, Settings.from_dict(state["settings"], str(path)), str(path))
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.disc_optimizer is not None:
        run.disc_optimizer.load_state_dict(state["disc_optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.best_loss, run.best_step = state["step"], state["best_loss"], state["best_step"]
    if len(state["loaders"]) == distributed.world_size():
        run.loader.load_state_dict(state["loaders"][distributed.rank()])
    else:
        run.loader.start_anew(run.step)
        say(f"{path} is from {len(state['loaders'])} ranks: from here on the data comes in another order")
    if path != run.checkpoints / "last.pt":
        run.best_loss, run.best_step = math.inf, 0  # the best weights so far are in the other folder
    elif run.best_step == run.step and distributed.is_main():
        link_best(run.checkpoints)  # in case the kill came between the two
    return Meter(*state["meter"])


def begin(run: Run) -> Meter:
    """Restore or initialise the run as its settings say; return what there is of the current log interval."""
    settings = run.settings
    last = run.checkpoints / "last.pt"
    if settings.resume == "never" and last.exists():
        raise UserError(f"{last} is from an earlier run: leave out --resume never, or use another --run-dir")
    path = last if settings.resume in {"auto", "never"} else Path(settings.resume)
    if path.exists() or settings.resume not in {"auto", "never"}:
        meter = restore(run, path)
        say(f"going on from {path}, step {run.step} of {run.num_steps}")
        return meter
    if settings.init_from:
        say(initialise_from(run.model, Path(settings.init_from), settings.arch, settings.mode))
    return Meter()


def export_best(run: Run) -> Path:
    """Write the weights with the lowest validation loss for others to use, the whole folder at once."""
    folder = Path(run.settings.run_path) / "export"
    temporary = folder.with_name("export.tmp")
    run.model.load_state_dict(load_checkpoint(run.checkpoints / "best.pt", run.device)["model"])
    shutil.rmtree(temporary, ignore_errors=True)
    export_weights(run.model, run.settings.arch, run.settings.mode, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    return temporary.rename(folder)
