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
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import tyro

from errors import UserError, exits_on_user_error
from model import distributed
from model.device import choose_device
from model.discriminator import discriminator_loss
from model.optim import learning_rate, set_learning_rate
from model.unet import to_unit_range
from rundir import RunLog, check_config, lock, write_config, writing
from settings import Settings
from training.graphs import GraphedStep
from training.loss_scale import SkippedSteps
from training.queue_start import fill_queue
from training.run import TERMS, Meter, Run, build, say
from training.saving import Keeper, begin, export_last
from training.step import stack_terms, train_step
from training.stopping import StopRequest

NUM_RECONSTRUCTIONS = 8


def train(run: Run, meter: Meter, log: RunLog, keeper: Keeper) -> None:
    """Go from where `run` is to its end: one loop for every mode."""
    settings, names = run.settings, TERMS[run.settings.mode]
    skipped = SkippedSteps(run.scaler, run.device)
    if settings.queue_start == "keys" and not run.has_queue:
        fill_queue(run, keeper)
        meter = Meter()
    if run.is_validation_due:
        finish_epoch(run, log, keeper)
    take_step = GraphedStep(run) if settings.cuda_graphs else train_step
    while run.step < run.num_steps:
        epoch = run.step // run.loader.steps_per_epoch
        lr = learning_rate(settings.lr, settings.schedule, epoch, settings.num_epochs, settings.lr_drop_epochs)
        set_learning_rate(run.optimizer, lr)
        asked_at = time.monotonic()
        for batch in run.loader:
            waited_s = time.monotonic() - asked_at
            keeper.has_batch()
            meter.add(take_step(run, batch), waited_s)
            skipped.add_step()
            run.step += 1
            keeper.moved()
            log.advance()
            ends = run.step == run.num_steps or run.step % run.loader.steps_per_epoch == 0
            if ends or run.step % settings.log_every == 0:
                line = {"phase": "train", "step": run.step, "epoch": epoch, **meter.line(names, settings.batch_size)}
                refuse_divergence(run, line)
                log.write({**line, **skipped.line(), "lr": lr})
                meter = Meter()
            if ends:
                break
            if keeper.is_to_stop():
                keeper.stop(meter)
            if run.step % settings.save_every == 0:
                keeper.save(meter)
            asked_at = time.monotonic()
        finish_epoch(run, log, keeper)
        meter = Meter()


def finish_epoch(run: Run, log: RunLog, keeper: Keeper) -> None:
    """Validate, save, and keep the weights as the best where they are."""
    epoch, is_last = (run.step - 1) // run.loader.steps_per_epoch, run.step == run.num_steps
    terms, pictures = validate(run, keeper)
    run.is_validation_due = terms is None
    if terms is None:
        keeper.stop(Meter())
    line = {"phase": "val", "step": run.step, "epoch": epoch, **terms}
    refuse_divergence(run, line)
    line["queue_similarity"] = run.model.queue_similarity().item()
    if run.probe is not None and (is_last or (epoch + 1) % run.settings.probe_every == 0):
        line |= run.probe.run(run.model.query.encoder)
    log.write(line)
    if pictures and (is_last or epoch % max(1, run.settings.num_epochs // 50) == 0):
        log.write_reconstructions(run.step, *pictures)
    log.draw_curves(now=is_last)
    if line["total"] < run.best_loss:
        run.best_loss, run.best_step = line["total"], run.step
    keeper.save(Meter())


@torch.no_grad()
def validate(run: Run, keeper: Keeper) -> tuple[dict[str, float] | None, list[torch.Tensor]]:
    """Return every term's mean over the validation split, and the first few inputs, outputs and targets.

    Where any rank is asked to stop meanwhile, there are no means on any.

    Changes neither the networks nor the queue, and sees the same images each time. All ranks use the main one's BN
    statistics, which are those that are saved: in training each has had its own.
    """
    model, names, pictures = run.model, TERMS[run.settings.mode], []
    distributed.broadcast([*model.query.buffers(), *model.key.buffers()])
    # The terms, the number of images, and of ranks that were asked to stop
    sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=run.device)
    model.eval()
    for i, batch in enumerate(run.val_loader):
        if keeper.is_asked_to_stop:
            sums[-1] = 1
            break
        with run.autocast():
            keys = model.encode_keys(batch.key)
            embedding, reconstruction = model.query(batch.query)
            losses = model.losses(embedding, reconstruction, keys, batch.target)
            disc_loss = None
            if model.discriminator is not None:
                disc_loss = discriminator_loss(model.discriminator, batch.target, reconstruction)
        num_images = len(batch.query)
        sums[:-2] += stack_terms(losses, disc_loss) * num_images
        sums[-2] += num_images
        keeper.moved(i + 1)
        if reconstruction is not None and not pictures:
            rows = (to_unit_range(batch.query), reconstruction, to_unit_range(batch.target))
            pictures = [images[:NUM_RECONSTRUCTIONS].cpu() for images in rows]
    model.train()
    *totals, num_images, num_asked = distributed.all_reduce_sum(sums).tolist()
    if num_asked:
        return None, []
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


def pretrain(settings: Settings, device: torch.device) -> None:
    """Run, from whatever the run folder holds to the exports."""
    folder = Path(settings.run_path)
    is_main = distributed.is_main()
    with StopRequest() as request, lock(folder) if is_main else nullcontext(), writing(folder):
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
        with (
            RunLog(folder, first_step=run.step, num_steps=run.num_steps, is_main=is_main) as log,
            Keeper(run, request) as keeper,
            run.check,
        ):
            train(run, meter, log, keeper)
            if run.check.num_unchecked:
                say(f"{run.check.num_unchecked} tars were not compared with their checksums: see shard_cxr14.py verify")
        if is_main:
            say(f"done: step {run.step}, best validation loss {run.best_loss:.4f} at step {run.best_step}")
            say(f"weights in {export_last(run)}, curves in {folder / 'curves.png'}")
        distributed.barrier()


@exits_on_user_error
def main() -> None:
    """Parse the command line, join the ranks, run."""
    settings = tyro.cli(Settings, description=__doc__)
    device = choose_device(settings.device, distributed.local_rank())
    distributed.init_from_environment(device, settings.timeout_s)
    pretrain(settings, device)
    distributed.shutdown()


if __name__ == "__main__":
    main()
