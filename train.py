"""Pre-train a U-Net on shards of chest radiographs with DiRA.

    python train.py SHARDS --mode dir --run-dir runs/dir
    python train.py SHARDS --mode dira --run-dir runs/dira --init-from runs/dir/checkpoints/last.pt --batch-size 16
    torchrun --nproc-per-node 8 train.py SHARDS --mode dir --run-dir runs/dir

The same command on the same run folder goes on where it was. `python train.py --help` explains every option.
"""

import os

# Before torch is loaded: idle OpenMP threads must sleep, or on a CPU they take the cores from the data's threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import math
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from errors import UserError, exits_on_user_error
from model import distributed
from model.checkpoint import FORMAT, VERSION, export_weights, initialise_from, load_checkpoint, save_checkpoint
from model.device import autocast, choose_device, choose_precision
from model.dira import DiRA, Losses, LossWeights
from model.discriminator import discriminator_loss
from model.optim import learning_rate, make_adam, make_sgd
from model.unet import to_unit_range
from pipeline.loader import LoaderSpec, PretrainLoader, ValidationLoader
from pipeline.shardset import ShardSet
from pipeline.spec import Batch, DistortionSpec, ViewSpec
from rundir import RunLog, check_config, link_best, lock, write_config
from settings import Settings, refuse_other_settings

TERMS = {
    "di": ("total", "contrastive"),
    "dir": ("total", "contrastive", "mse"),
    "dira": ("total", "contrastive", "mse", "adversarial", "discriminator"),
}
NUM_RECONSTRUCTIONS = 8


@dataclass
class Run:
    """What a run is made of, on one rank."""

    settings: Settings
    device: torch.device
    precision: str
    model: DiRA
    query: nn.Module
    """`model.query`, its gradients averaged over the ranks; so is `discriminator`."""
    discriminator: nn.Module | None
    optimizer: torch.optim.Optimizer
    disc_optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler
    loader: PretrainLoader
    val_loader: ValidationLoader
    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0

    @property
    def num_steps(self) -> int:
        """Where the run ends."""
        scheduled = self.settings.num_epochs * self.loader.steps_per_epoch
        return min(scheduled, self.settings.max_steps or scheduled)

    @property
    def checkpoints(self) -> Path:
        """Where last.pt and best.pt are."""
        return Path(self.settings.run_path) / "checkpoints"

    def autocast(self) -> AbstractContextManager[None]:
        """Forward passes run in here."""
        return autocast(self.device, self.precision)


class Meter:
    """Means of the loss terms over a log interval, and its speed. Adding to it never waits for the device."""

    def __init__(self, sums: torch.Tensor | None = None, num_steps: int = 0) -> None:
        """Begin an interval, or go on with a saved one."""
        self.sums, self.num_steps = sums, num_steps
        self._num_timed, self._waited_s, self._began_at = 0, 0.0, time.monotonic()

    def add(self, terms: torch.Tensor, waited_s: float) -> None:
        """Count one step."""
        self.sums = terms if self.sums is None else self.sums + terms
        self.num_steps += 1
        self._num_timed += 1
        self._waited_s += waited_s

    def line(self, names: tuple[str, ...], batch_size: int) -> dict[str, float]:
        """Return the interval's means over all ranks, and its speed."""
        means = distributed.all_reduce_mean(self.sums / self.num_steps).tolist()
        seconds = time.monotonic() - self._began_at
        rate = self._num_timed * batch_size / seconds
        return {
            **dict(zip(names, means, strict=True)),
            "images_per_second": rate,
            "images_per_second_per_gpu": rate / distributed.world_size(),
            "data_wait_fraction": self._waited_s / seconds,
        }


def train_step(run: Run, batch: Batch) -> torch.Tensor:
    """Take one step on this rank's share of a batch; return the terms of the loss, in the order of `TERMS`."""
    model = run.model
    with run.autocast():
        keys = model.encode_keys(batch.key, shuffle_seed=(run.settings.seed << 32) + run.step)
        embedding, reconstruction = run.query(batch.query)
        losses = model.losses(embedding, reconstruction, keys, batch.target)
    run.optimizer.zero_grad()
    run.scaler.scale(losses.total).backward()
    run.scaler.step(run.optimizer)
    disc_loss = None
    if run.discriminator is not None:
        with run.autocast():
            disc_loss = discriminator_loss(run.discriminator, batch.target, reconstruction)
        run.disc_optimizer.zero_grad()
        run.scaler.scale(disc_loss).backward()
        run.scaler.step(run.disc_optimizer)
    run.scaler.update()
    model.update_key_encoder()
    model.enqueue(keys.all)
    return stack_terms(losses, disc_loss)


def stack_terms(losses: Losses, disc_loss: torch.Tensor | None) -> torch.Tensor:
    """Return the terms that the mode has, fp32, without gradient."""
    return torch.stack([term.detach().float() for term in (*losses, disc_loss) if term is not None])


def train(run: Run, meter: Meter, log: RunLog) -> None:
    """Go from where `run` is to its end: one loop for every mode."""
    settings, names = run.settings, TERMS[run.settings.mode]
    while run.step < run.num_steps:
        epoch = run.step // run.loader.steps_per_epoch
        lr = learning_rate(settings.lr, settings.schedule, epoch, settings.num_epochs, settings.lr_drop_epochs)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        asked_at = time.monotonic()
        for batch in run.loader:
            waited_s = time.monotonic() - asked_at
            meter.add(train_step(run, batch), waited_s)
            run.step += 1
            log.advance()
            ends = run.step == run.num_steps or run.step % run.loader.steps_per_epoch == 0
            if ends or run.step % settings.log_every == 0:
                line = {"phase": "train", "step": run.step, "epoch": epoch, **meter.line(names, settings.batch_size)}
                refuse_divergence(run, line)
                log.write({**line, "lr": lr})
                meter = Meter()
            if ends:
                break
            if run.step % settings.save_every == 0:
                save(run, meter)
            asked_at = time.monotonic()
        finish_epoch(run, epoch, log)
        meter = Meter()


def finish_epoch(run: Run, epoch: int, log: RunLog) -> None:
    """Validate, save, and keep the weights as the best where they are."""
    is_last = run.step == run.num_steps
    terms, pictures = validate(run)
    line = {"phase": "val", "step": run.step, "epoch": epoch, **terms}
    refuse_divergence(run, line)
    log.write(line)
    if pictures and (is_last or epoch % max(1, run.settings.num_epochs // 50) == 0):
        log.write_reconstructions(run.step, *pictures)
    log.draw_curves(now=is_last)
    if line["total"] < run.best_loss:
        run.best_loss, run.best_step = line["total"], run.step
    save(run, Meter())


@torch.no_grad()
def validate(run: Run) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Return every term's mean over the validation split, and the first few inputs, outputs and targets.

    Changes neither the networks nor the queue, and sees the same images each time. All ranks use the main one's BN
    statistics, which are those that are saved: in training each has had its own.
    """
    model, names, pictures = run.model, TERMS[run.settings.mode], []
    distributed.broadcast([*model.query.buffers(), *model.key.buffers()])
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=run.device)  # the terms, and the number of images
    model.eval()
    for batch in run.val_loader:
        with run.autocast():
            keys = model.encode_keys(batch.key, shuffle_seed=0)
            embedding, reconstruction = model.query(batch.query)
            losses = model.losses(embedding, reconstruction, keys, batch.target)
            disc_loss = None
            if model.discriminator is not None:
                disc_loss = discriminator_loss(model.discriminator, batch.target, reconstruction)
        num_images = len(batch.query)
        sums[:-1] += stack_terms(losses, disc_loss) * num_images
        sums[-1] += num_images
        if reconstruction is not None and not pictures:
            rows = (to_unit_range(batch.query), reconstruction, to_unit_range(batch.target))
            pictures = [images[:NUM_RECONSTRUCTIONS].cpu() for images in rows]
    model.train()
    *totals, num_images = distributed.all_reduce_sum(sums).tolist()
    return {name: total / num_images for name, total in zip(names, totals, strict=True)}, pictures


def refuse_divergence(run: Run, line: dict[str, Any]) -> None:
    """Raise UserError where a term of the loss is no longer a number."""
    wrong = [name for name in TERMS[run.settings.mode] if not math.isfinite(line[name])]
    if wrong:
        last = run.checkpoints / "last.pt"
        raise UserError(
            f"the loss diverged by step {run.step}: {', '.join(wrong)} not finite; "
            f"{f'{last} is from before' if last.exists() else 'nothing was saved'}: try a smaller --lr or fp32"
        )


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


def build(settings: Settings, device: torch.device) -> Run:
    """Build everything but what a checkpoint holds. Every rank builds the same networks and queue."""
    torch.manual_seed(settings.seed)
    ranks = distributed.world_size()
    if settings.batch_size % ranks:
        raise UserError(f"--batch-size {settings.batch_size} can't be shared out evenly over {ranks} ranks")
    spec = LoaderSpec(
        shard_sets=tuple(ShardSet.open(path) for path in settings.shards),
        view=ViewSpec(crop_size_px=settings.crop_size),
        distortion=None if settings.mode == "di" else DistortionSpec(),
        batch_size_per_rank=settings.batch_size // ranks,
        seed=settings.seed,
        device=device,
        target=settings.target,
        rank=distributed.rank(),
        world_size=ranks,
        num_threads=settings.data_threads or max(1, (os.cpu_count() or 1) // distributed.local_world_size()),
    )
    loader, val_loader = PretrainLoader(spec), ValidationLoader(spec)
    model = DiRA(
        arch=settings.arch,
        mode=settings.mode,
        moco_dim=settings.moco_dim,
        moco_k=settings.moco_k,
        moco_m=settings.moco_m,
        moco_t=settings.moco_t,
        key_bn_groups=settings.key_bn_groups,
        weights=LossWeights(settings.contrastive_weight, settings.mse_weight, settings.adv_weight),
    ).to(device, memory_format=torch.channels_last)
    if settings.compile:
        for network in filter(None, (model.query, model.key, model.discriminator)):
            network.compile()
    fused = {"fused": settings.fused, "device": device}
    precision = choose_precision(settings.precision, device)
    disc = model.discriminator
    return Run(
        settings=settings,
        device=device,
        precision=precision,
        model=model,
        query=distributed.wrap_ddp(model.query),
        discriminator=disc and distributed.wrap_ddp(disc),
        optimizer=make_sgd(
            model.query.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            **fused,
        ),
        disc_optimizer=disc and make_adam(disc.parameters(), lr=settings.disc_lr, betas=(0.5, 0.999), **fused),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        loader=loader,
        val_loader=val_loader,
    )


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


def say(text: str) -> None:
    """Print a line from the main rank."""
    if distributed.is_main():
        print(text, flush=True)


def pretrain(settings: Settings, device: torch.device) -> None:
    """Run, from whatever the run folder holds to the exports."""
    folder = Path(settings.run_path)
    is_main = distributed.is_main()
    with lock(folder) if is_main else nullcontext():
        if is_main:
            check_config(folder, settings)
        run = build(settings, device)
        meter = begin(run)
        if run.step >= run.num_steps and (folder / "export").exists():
            say(f"{folder} is finished at step {run.step}: its weights are in {folder / 'export'}")
            return
        if is_main:
            chosen = {"device": str(device), "precision": run.precision, "num_steps": run.num_steps}
            write_config(folder, settings, chosen)
        with RunLog(folder, first_step=run.step, num_steps=run.num_steps, is_main=is_main) as log:
            train(run, meter, log)
        if is_main:
            say(f"done: step {run.step}, best validation loss {run.best_loss:.4f} at step {run.best_step}")
            say(f"weights in {export_best(run)}, curves in {folder / 'curves.png'}")
        distributed.barrier()


@exits_on_user_error
def main() -> None:
    """Parse the command line, join the ranks, run."""
    settings = tyro.cli(Settings, description=__doc__)
    device = choose_device(settings.device, distributed.local_rank())
    distributed.init_from_environment(device)
    pretrain(settings, device)
    distributed.shutdown()


if __name__ == "__main__":
    main()
