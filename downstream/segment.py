"""Fine-tune a U-Net to segment radiographs, and measure it.

python finetune.py segment --images IMAGES --masks MASKS --weights runs/dira/export/unet.pth
python finetune.py segment SHARDS --masks MASKS --weights random --run-dir runs/lungs-random --runs 3
"""

import json
import math
import os
import shutil
import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
import tyro
from torch import Tensor, nn

from downstream.networks import load_unet
from downstream.pictures import draw_masks, write_png
from downstream.runs import FREE_TO_CHANGE, summarise, write_json
from downstream.segment_data import (
    Batch,
    Pair,
    Splits,
    TrainBatches,
    choose_some,
    plain_batches,
    read_folders,
    read_shards,
    read_split_list,
    split_by_list,
    split_by_seed,
)
from downstream.segment_metrics import pool_scores, score_mask
from errors import UsageError, UserError
from model.checkpoint import load_checkpoint, save_checkpoint
from model.device import autocast, choose_device, choose_precision
from model.optim import make_adam
from model.unet import SIZE_STEP_PX, to_unit_range
from rundir import RunLog, claim, lock
from settings import Arch, Device, Fused, Precision, RunSettings, option

SECONDS_BETWEEN_SAVES = 60
RESULTS = "results.json"
SCORES = ("dice_per_image", "dice_pooled", "iou_per_image", "iou_pooled", "hausdorff95_px")


@dataclass(frozen=True)
class SegmentSettings(RunSettings):
    """Fine-tune a U-Net on radiographs and their masks; the defaults are the published protocol."""

    MAY_CHANGE: ClassVar[frozenset[str]] = FREE_TO_CHANGE | {"data_workers"}

    masks: tuple[str, ...]
    """Folders of masks, PNG or JPEG, named as the images or with a common suffix; of several, the union is taken."""
    weights: str
    """random, imagenet, or a checkpoint or export (unet.pth) to start from."""
    shards: tyro.conf.Positional[str | None] = None
    """A shard set, whose splits are used and whose images without a mask are left out; or else --images."""
    images: str | None = None
    """Folder of PNG or JPEG radiographs."""
    run_dir: str = "runs/segment"
    """Where everything goes. The same command on the same folder goes on where it was."""
    runs: int = 1
    """Seeds to run, counted from --seed."""
    seed: int = 0
    """Of the fresh weights, the choice of --num-train images, their order and augmentation."""
    num_train: int | None = None
    """Train on so few images, chosen by --seed; all of the training split by default."""
    split_list: str | None = None
    """With --images: a file of lines such as `MCUCXR_0001_0 train` (or val, or test); no other image is used."""
    val_fraction: float = 0.1
    """With --images and no --split-list: share for validation, by patients."""
    test_fraction: float = 0.2
    """With --images and no --split-list: share to test on, by patients."""
    split_seed: int = 0
    """Of the choice of these patients."""
    arch: Arch = "resnet50"
    """The encoder."""
    size: int = 224
    """What images are resized to, side in px, a multiple of 32."""
    batch_size: int = 32
    """Images in a step; fewer where there are fewer."""
    lr: float = 1e-3
    """Adam's learning rate."""
    epochs: int = 200
    """At most."""
    patience: int = 20
    """Stop after so many epochs without a lower validation loss."""
    min_steps_per_epoch: int = 1
    """Make an epoch of several passes where it has fewer steps, as with a handful of images."""
    device: Device = "auto"
    """auto: a GPU where there is one."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    fused: Fused = "auto"
    """Whose fused Adam; auto: apex's where installed, else torch's."""
    data_workers: int | None = None
    """Processes that augment; by default up to 8 beside a GPU, and none on a CPU."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        wrong = {
            "name a shard set or --images, one of them": (self.shards is None) == (self.images is None),
            "--masks: name at least one folder": not self.masks,
            "--split-list goes with --images: a shard set has its own splits": self.split_list is not None
            and self.images is None,
            f"--size {self.size}: the U-Net needs a multiple of {SIZE_STEP_PX}": self.size < SIZE_STEP_PX
            or self.size % SIZE_STEP_PX != 0,
            "--val-fraction and --test-fraction: must be more than 0, and less than 1 together": min(
                self.val_fraction, self.test_fraction
            )
            <= 0
            or self.val_fraction + self.test_fraction >= 1,
            "--seed, --split-seed and --data-workers: must be 0 or more": min(
                self.seed, self.split_seed, self.data_workers or 0
            )
            < 0,
        }
        for name in ("runs", "num_train", "batch_size", "lr", "epochs", "patience", "min_steps_per_epoch"):
            value = getattr(self, name)
            wrong[f"{option(name)} {value}: must be more than 0"] = value is not None and value <= 0
        for message, applies in wrong.items():
            if applies:
                raise UsageError(message)


@dataclass
class Run:
    """One seed's run."""

    settings: SegmentSettings
    seed: int
    folder: Path
    device: torch.device
    precision: str
    network: smp.Unet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dice_loss: nn.Module
    epoch: int = 0
    """The next one."""
    best_loss: float = math.inf
    best_epoch: int = -1
    best_weights: dict[str, Tensor] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the last epoch has been, or patience is at its end."""
        return self.epoch >= self.settings.epochs or self.epoch - self.best_epoch > self.settings.patience

    def autocast(self) -> AbstractContextManager[None]:
        """Forward passes run in here."""
        return autocast(self.device, self.precision)


def segment(settings: SegmentSettings) -> dict[str, Any]:
    """Fine-tune and test, once for every seed; what is done already is not done again.

    Returns:
        What results.json holds: the runs' scores, their means and standard deviations. Scores lie in 0..1.

    Raises:
        UserError: Bad input, or a run folder that can't be used.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("segment trains on one device, which is plenty for sets of masks: start it without torchrun")
    cv2.setNumThreads(1)  # images are small, and processes or other threads are at work beside
    device = choose_device(settings.device, 0)
    precision = choose_precision(settings.precision, device)
    folder = Path(settings.run_dir)
    with lock(folder):
        claim(folder, settings, {"device": str(device), "precision": precision})
        folders = {seed: folder / f"seed-{seed}" for seed in range(settings.seed, settings.seed + settings.runs)}
        is_finished = all((place / RESULTS).exists() for place in folders.values())
        splits = {} if is_finished else read_splits(settings)
        runs = [_run_seed(settings, splits, seed, place, device, precision) for seed, place in folders.items()]
        results = {"runs": runs, **summarise(runs, SCORES)}
        write_json(folder / RESULTS, results)
    summary = ", ".join(f"{name} {_with_spread(results, name)}" for name in results["mean"])
    print(f"{settings.weights}, {settings.runs} runs: {summary}; all of it in {folder}", flush=True)
    return results


def read_splits(settings: SegmentSettings) -> Splits:
    """Read all pairs, say how many there are, and refuse masks that nothing can be learnt from."""
    if settings.shards:
        splits, num_without = read_shards(settings.shards, settings.masks, settings.size)
        print(f"{settings.shards}: {num_without} images without a mask are left out", flush=True)
    elif settings.split_list:
        split_of = read_split_list(settings.split_list)
        pairs = read_folders(settings.images, settings.masks, settings.size, set(split_of))
        splits = split_by_list(pairs, split_of, settings.split_list)
    else:
        pairs = read_folders(settings.images, settings.masks, settings.size)
        splits = split_by_seed(pairs, settings.val_fraction, settings.test_fraction, settings.split_seed)
    for split, pairs in splits.items():
        num_empty = sum(not pair.mask.any() for pair in pairs)
        print(f"{split}: {len(pairs)} images, {num_empty} of them with an empty mask", flush=True)
        if num_empty == len(pairs):
            raise UserError(f"every mask of the {split} split is empty: nothing can be measured on it")
    return splits


def _run_seed(
    settings: SegmentSettings, splits: Splits, seed: int, folder: Path, device: torch.device, precision: str
) -> dict[str, Any]:
    """Train, test and write what came out; or read it, where the folder holds it."""
    results = folder / RESULTS
    if results.exists():
        print(f"{folder} is finished", flush=True)
        return json.loads(results.read_text())
    folder.mkdir(exist_ok=True)
    train_pairs = splits["train"]
    if settings.num_train:
        train_pairs = choose_some(train_pairs, settings.num_train, seed)
    if not any(pair.mask.any() for pair in train_pairs):
        raise UserError(
            f"seed {seed}: every mask of the {len(train_pairs)} to train on is empty: nothing can be learnt"
        )
    run = _build(settings, seed, folder, device, precision)
    _train(run, train_pairs, splits["val"])
    run.network.load_state_dict(run.best_weights)
    found = _test(run, splits["test"])
    found = {"seed": seed, "num_train": len(train_pairs), "best_epoch": run.best_epoch, **found}
    weights = {name: tensor.cpu().contiguous() for name, tensor in run.network.state_dict().items()}
    save_checkpoint(folder / "unet.pth", weights)
    write_json(results, found)
    (folder / "last.pt").unlink()
    return found


def _build(settings: SegmentSettings, seed: int, folder: Path, device: torch.device, precision: str) -> Run:
    """Build the run and, where it was interrupted, restore it."""
    torch.manual_seed(seed)
    network, summary = load_unet(settings.weights, settings.arch)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = make_adam(network.parameters(), lr=settings.lr, betas=(0.9, 0.999), fused=settings.fused, device=device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dice_loss = smp.losses.DiceLoss(mode="binary", from_logits=True)
    run = Run(settings, seed, folder, device, precision, network, optimizer, scaler, dice_loss)
    last = folder / "last.pt"
    if last.exists():
        state = load_checkpoint(last, device)
        for part in ("network", "optimizer", "scaler"):
            getattr(run, part).load_state_dict(state[part])
        run.epoch, run.best_loss, run.best_epoch = state["epoch"], state["best_loss"], state["best_epoch"]
        run.best_weights = state["best_weights"]
        print(f"going on from {last}, epoch {run.epoch}", flush=True)
    else:
        print(f"seed {seed} starts from {summary}", flush=True)
    return run


def _train(run: Run, train_pairs: list[Pair], val_pairs: list[Pair]) -> None:
    """Go from where `run` is to its end."""
    settings = run.settings
    on_gpu = run.device.type == "cuda"
    num_workers = settings.data_workers
    if num_workers is None:
        num_workers = min(8, os.cpu_count() or 1) if on_gpu else 0
    batches = TrainBatches(
        train_pairs, settings.batch_size, settings.min_steps_per_epoch, run.seed, num_workers, pin_memory=on_gpu
    )
    steps = len(batches)
    saved_at = time.monotonic()
    with RunLog(run.folder, first_step=run.epoch * steps, num_steps=settings.epochs * steps, is_main=True) as log:
        while not run.is_over:
            began_at, sum_loss = time.monotonic(), torch.zeros((), device=run.device)
            for batch in batches.epoch(run.epoch):
                sum_loss += _step(run, batch)
                log.advance()
            where = {"step": (run.epoch + 1) * steps, "epoch": run.epoch}
            loss = sum_loss.item() / steps
            log.write({"phase": "train", **where, "loss": loss, "seconds": time.monotonic() - began_at})
            val = _validate(run, val_pairs)
            if not math.isfinite(val["loss"]):
                raise UserError(f"the loss diverged by epoch {run.epoch}: try a smaller --lr or --precision fp32")
            log.write({"phase": "val", **where, **val})
            if val["loss"] < run.best_loss:
                run.best_loss, run.best_epoch = val["loss"], run.epoch
                run.best_weights = {name: t.to("cpu", copy=True) for name, t in run.network.state_dict().items()}
            run.epoch += 1
            if run.is_over or time.monotonic() > saved_at + SECONDS_BETWEEN_SAVES:
                _save(run)
                saved_at = time.monotonic()
        log.say(f"best validation loss {run.best_loss:.4f} at epoch {run.best_epoch} of {run.epoch}")


def _step(run: Run, batch: Batch) -> Tensor:
    """Take one step; return its loss."""
    images, masks = (part.to(run.device, non_blocking=True) for part in batch)
    with run.autocast():
        logits = run.network(to_unit_range(images))
    loss = run.dice_loss(logits.float(), masks)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.detach()


def _save(run: Run) -> None:
    state = {
        "network": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "best_loss": run.best_loss,
        "best_epoch": run.best_epoch,
        "best_weights": run.best_weights,
    }
    save_checkpoint(run.folder / "last.pt", state)


@torch.no_grad()
def _predict(run: Run, pairs: list[Pair]) -> Tensor:
    """Logits of all pairs' images, fp32 [N, 1, S, S] on the CPU."""
    run.network.eval()
    logits = []
    for batch in plain_batches(pairs, run.settings.batch_size):
        with run.autocast():
            logits.append(run.network(to_unit_range(batch.images.to(run.device))).float().cpu())
    run.network.train()
    return torch.cat(logits)


def _validate(run: Run, pairs: list[Pair]) -> dict[str, float]:
    """The loss over all pairs as if they were one batch, and the pooled Dice."""
    logits = _predict(run, pairs)
    masks = np.stack([pair.mask for pair in pairs])
    loss = run.dice_loss(logits, torch.from_numpy(masks)[:, None]).item()
    return {"loss": loss, "dice": pool_scores(logits[:, 0].numpy() > 0, masks == 1).dice}


def _test(run: Run, pairs: list[Pair]) -> dict[str, Any]:
    """Score the test images at the network's size and write predictions and overlays."""
    probabilities = torch.sigmoid(_predict(run, pairs))[:, 0].numpy()
    predictions, truths = probabilities > 0.5, np.stack([pair.mask for pair in pairs]) == 1
    for name in ("predictions", "overlays"):
        shutil.rmtree(run.folder / name, ignore_errors=True)
        (run.folder / name).mkdir()
    images = {}
    for pair, probability, prediction, truth in zip(pairs, probabilities, predictions, truths, strict=True):
        pixel_size_px = (pair.size_px[1] / run.settings.size, pair.size_px[0] / run.settings.size)
        images[pair.name] = score_mask(prediction, truth, pixel_size_px)
        full = cv2.resize(probability, pair.size_px, interpolation=cv2.INTER_LINEAR) > 0.5
        write_png(run.folder / "predictions" / f"{pair.name}.png", full * np.uint8(255))
        overlay = draw_masks(pair.image, truth, prediction, f"Dice {images[pair.name].dice:.3f}")
        write_png(run.folder / "overlays" / f"{pair.name}.png", overlay)
    distances = [scores.hausdorff95_px for scores in images.values() if scores.hausdorff95_px is not None]
    pooled = pool_scores(predictions, truths)
    return {
        "dice_per_image": statistics.fmean(scores.dice for scores in images.values()),
        "dice_pooled": pooled.dice,
        "iou_per_image": statistics.fmean(scores.iou for scores in images.values()),
        "iou_pooled": pooled.iou,
        "hausdorff95_px": statistics.fmean(distances) if distances else None,
        "num_without_hausdorff95": len(images) - len(distances),
        "images": {name: scores._asdict() for name, scores in images.items()},
    }


def _with_spread(results: dict[str, Any], name: str) -> str:
    mean, std = results["mean"][name], results["std"][name]
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"
