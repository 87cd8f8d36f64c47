"""Fine-tune a classifier of findings on labelled shard sets, and test it; the defaults are the published protocol.

python finetune.py classify SHARDS --weights runs/dira/export/resnet50.pth
python finetune.py classify SHARDS --weights random --label-fraction 0.25 --runs 5 --run-dir runs/random-25
python finetune.py classify SHARDS --weights runs/dira/export/resnet50.pth --knn --linear-probe
torchrun --nproc-per-node 8 finetune.py classify SHARDS --weights runs/dira/export/resnet50.pth
"""

import json
import math
import os
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from downstream.classify_settings import ClassifySettings
from downstream.data import (
    EvaluationLoader,
    LabelledSpec,
    TrainLoader,
    common_label_names,
    part_by_patients,
    whole_split,
)
from downstream.metrics import auc, draw_roc_curves
from downstream.networks import Classifier, load_classifier, open_classifier, save_classifier
from downstream.predictions import (
    Crops,
    Predictions,
    centre_crop,
    gather,
    mean_cross_entropy,
    predict,
    ten_crops,
    write_predictions,
)
from downstream.probe import extract_features, knn_scores, linear_scores
from downstream.runs import summarise, write_json
from errors import UserError
from model import distributed
from model.checkpoint import load_checkpoint, save_checkpoint
from model.device import autocast, choose_device, choose_precision
from model.optim import make_adam
from pipeline.shardset import ShardSet, Split
from rundir import RunLog, claim, lock

ADAM_BETAS = (0.9, 0.999)


@dataclass
class FineTuning:
    """What a run with one seed is made of, on one rank."""

    settings: ClassifySettings
    device: torch.device
    precision: str
    label_names: tuple[str, ...]
    network: Classifier
    averaged: nn.Module
    """`network`, its gradients averaged over the ranks."""
    optimizer: torch.optim.Optimizer
    scheduler: ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    val_loader: EvaluationLoader
    test_loader: EvaluationLoader
    epoch: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or the last ones were in vain."""
        return self.epoch >= self.settings.epochs or self.epoch - self.best_epoch >= self.settings.patience


def classify(settings: ClassifySettings) -> dict[str, Any]:
    """Do every run that the settings ask for; what is done already is not done again.

    Under torchrun every rank calls this, and all train together.

    Returns:
        What results.json holds: the runs' results, the means and standard deviations of their scores, 0..1. On ranks
        but 0 it is empty.

    Raises:
        UserError: Bad input, or a run folder that can't be used.
    """
    device = choose_device(settings.device, distributed.local_rank())
    precision = choose_precision(settings.precision, device)
    folder, is_main = Path(settings.run_dir), distributed.is_main()
    with lock(folder) if is_main else nullcontext():
        if is_main:
            claim(folder, settings, {"device": str(device), "precision": precision})
        seeds = range(settings.seed, settings.seed + settings.runs)
        runs = [run_seed(replace(settings, seed=seed), folder / f"seed-{seed}", device, precision) for seed in seeds]
        if not is_main:
            return {}
        results = {"runs": runs, **summarise(runs, [name for name in runs[0] if name.endswith("mean_auc")])}
        write_json(folder / "results.json", results)
    spreads = {name: "" if std is None else f" ± {std:.4f}" for name, std in results["std"].items()}
    shown = ", ".join(f"{name} {mean:.4f}{spreads[name]}" for name, mean in results["mean"].items())
    say(f"{settings.weights}, {settings.runs} runs: {shown}; all of it in {folder}")
    return results


def say(text: str) -> None:
    """Print a line from the main rank."""
    if distributed.is_main():
        print(text, flush=True)


def open_labelled(settings: ClassifySettings) -> tuple[tuple[ShardSet, ...], tuple[str, ...]]:
    """The shard sets and their findings. Raise UserError where they can't be trained, validated and tested on."""
    shard_sets = tuple(ShardSet.open(path) for path in settings.shards)
    names = common_label_names(shard_sets, ("train", "val", "test"))
    infos = [shard_set.manifest["splits"]["test"] for shard_set in shard_sets]
    num_samples = sum(info["samples"] for info in infos)
    if all(sum(info["labels"][name] for info in infos) in (0, num_samples) for name in names):
        raise UserError(f"{', '.join(settings.shards)}: no finding has positives and negatives in the test split")
    return shard_sets, names


# --- one seed -------------------------------------------------------------------------------------------------------


def run_seed(settings: ClassifySettings, folder: Path, device: torch.device, precision: str) -> dict[str, Any]:
    """Do the run, or read what it has found already; {} on ranks but 0."""
    results = folder / "results.json"
    if results.exists():
        say(f"{folder} is finished")
        return json.loads(results.read_text()) if distributed.is_main() else {}
    if distributed.is_main():
        folder.mkdir(exist_ok=True)
    do_run = check_features if settings.knn or settings.linear_probe else fine_tune
    found = do_run(settings, folder, device, precision)
    if distributed.is_main():
        write_json(results, found)
        (folder / "last.pt").unlink(missing_ok=True)
    distributed.barrier()  # no rank looks for results that are being written
    return found


def fine_tune(settings: ClassifySettings, folder: Path, device: torch.device, precision: str) -> dict[str, Any]:
    """Fine-tune from where `folder` is, and test."""
    with tempfile.TemporaryDirectory() as index_folder:
        run = build(settings, device, precision, Path(index_folder))
        if (folder / "last.pt").exists():
            restore(run, folder / "last.pt")
        step, num_steps = (epochs * run.loader.steps_per_epoch for epochs in (run.epoch, settings.epochs))
        with RunLog(folder, first_step=step, num_steps=num_steps, is_main=distributed.is_main()) as log:
            while not run.is_over:
                train_epoch(run, log)
                finish_epoch(run, folder, log)
        return test(run, folder)


def build(settings: ClassifySettings, device: torch.device, precision: str, index_folder: Path) -> FineTuning:
    """Build everything but what a checkpoint holds; the same on every rank."""
    torch.manual_seed(settings.seed)
    shard_sets, label_names = open_labelled(settings)
    initialised = load_classifier(settings.weights, settings.arch, len(label_names))
    say(f"seed {settings.seed}: {initialised.summary}")
    network = initialised.network.to(device, memory_format=torch.channels_last)
    optimizer = make_adam(network.parameters(), lr=settings.lr, betas=ADAM_BETAS, fused=settings.fused, device=device)
    spec = loader_spec(settings, shard_sets, device)
    loader = TrainLoader(spec, labelled_part(settings, shard_sets, index_folder), settings.min_steps_per_epoch)
    say(f"training on {loader.num_samples} images in steps of {loader.batch_size_per_rank * spec.world_size}")
    return FineTuning(
        settings=settings,
        device=device,
        precision=precision,
        label_names=label_names,
        network=network,
        averaged=distributed.wrap_ddp(network),
        optimizer=optimizer,
        scheduler=ReduceLROnPlateau(optimizer, factor=0.5, patience=settings.lr_patience),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        loader=loader,
        val_loader=EvaluationLoader(spec, whole_split(shard_sets, "val")),
        test_loader=EvaluationLoader(spec, whole_split(shard_sets, "test")),
    )


def loader_spec(settings: ClassifySettings, shard_sets: tuple[ShardSet, ...], device: torch.device) -> LabelledSpec:
    """What this rank loads."""
    ranks = distributed.world_size()
    if settings.batch_size % ranks:
        raise UserError(f"--batch-size {settings.batch_size} can't be shared out evenly over {ranks} ranks")
    return LabelledSpec(
        shard_sets=shard_sets,
        view=settings.view,
        batch_size_per_rank=settings.batch_size // ranks,
        seed=settings.seed,
        device=device,
        rank=distributed.rank(),
        world_size=ranks,
        num_threads=settings.data_threads or max(1, (os.cpu_count() or 1) // distributed.local_world_size()),
    )


def labelled_part(settings: ClassifySettings, shard_sets: tuple[ShardSet, ...], index_folder: Path) -> Split:
    """The part of the training split whose labels may be used."""
    if settings.label_fraction == 1 and settings.num_patients is None:
        return whole_split(shard_sets, "train")
    choice = {"fraction": settings.label_fraction, "num_patients": settings.num_patients, "seed": settings.seed}
    return part_by_patients(shard_sets, "train", index_folder, **choice)


def train_epoch(run: FineTuning, log: RunLog) -> None:
    """Go through an epoch's batches."""
    run.network.train()
    loss_sum = torch.zeros((), device=run.device)
    for batch in run.loader.epoch(run.epoch):
        with autocast(run.device, run.precision):
            logits = run.averaged(batch.images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.labels)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        loss_sum += loss.detach()
        log.advance()
    mean_loss = distributed.all_reduce_mean(loss_sum / run.loader.steps_per_epoch).item()
    if not math.isfinite(mean_loss):
        raise UserError(f"the loss diverged in epoch {run.epoch}: try a smaller --lr or --precision fp32")
    log.write(log_line(run, "train", loss=mean_loss, lr=run.optimizer.param_groups[0]["lr"]))


def log_line(run: FineTuning, phase: str, **values: float) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {"phase": phase, "step": (run.epoch + 1) * run.loader.steps_per_epoch, "epoch": run.epoch, **values}


def finish_epoch(run: FineTuning, folder: Path, log: RunLog) -> None:
    """Validate, adapt the learning rate, keep the weights as the best where they are, save."""
    distributed.broadcast(list(run.network.buffers()))  # BN statistics: each rank has had its own
    ours = look(run, run.val_loader, centre_crop)
    loss = mean_cross_entropy(ours, run.device)
    predictions = gather(ours)
    if predictions is not None:
        areas = auc(predictions.labels, predictions.probabilities, run.label_names)
        with_auc = {} if math.isnan(areas.mean) else {"mean_auc": areas.mean}
        log.write(log_line(run, "val", loss=loss, **with_auc))
    run.scheduler.step(loss)
    run.epoch += 1
    is_best = loss < run.best_loss
    if is_best:
        run.best_loss, run.best_epoch = loss, run.epoch
    if distributed.is_main():
        if is_best:
            save_classifier(folder / "classifier.pt", run.network, run.label_names, run.settings.view.resized_size_px)
        save_checkpoint(folder / "last.pt", state_of(run))


def state_of(run: FineTuning) -> dict[str, Any]:
    """All that a run needs to go on."""
    return {
        "network": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "best_loss": run.best_loss,
        "best_epoch": run.best_epoch,
    }


def restore(run: FineTuning, path: Path) -> None:
    """Go on after the epoch that the checkpoint was saved at."""
    state = load_checkpoint(path, run.device)
    for name in ("network", "optimizer", "scheduler", "scaler"):
        getattr(run, name).load_state_dict(state[name])
    run.epoch, run.best_loss, run.best_epoch = state["epoch"], state["best_loss"], state["best_epoch"]
    say(f"going on from {path}, after epoch {run.epoch} of {run.settings.epochs}")


def look(run: FineTuning, loader: EvaluationLoader, crops: Crops) -> Predictions:
    """This rank's share of the predictions with the run's network as it is."""
    return predict(run.network, loader, crops, run.settings.crop_size, run.precision, len(run.label_names))


def test(run: FineTuning, folder: Path) -> dict[str, Any]:
    """Test the best weights by ten crops and write what they predict; return the result, {} on ranks but 0."""
    if distributed.is_main():
        run.network.load_state_dict(open_classifier(folder / "classifier.pt").network.state_dict())
    distributed.broadcast(list(run.network.state_dict().values()))
    predictions = gather(look(run, run.test_loader, ten_crops))
    if predictions is None:
        return {}
    scores = score(predictions, run.label_names, folder)
    for name, area in scores["auc"].items():
        say(f"  {name:20} {area:.4f}")
    if scores["left_out"]:
        say(f"  left out, as the test split has one class only: {', '.join(scores['left_out'])}")
    return {
        "seed": run.settings.seed,
        **scores,
        "num_train": run.loader.num_samples,
        "best_epoch": run.best_epoch,
        "num_epochs": run.epoch,
        "val_loss": run.best_loss,
    }


def score(predictions: Predictions, names: tuple[str, ...], folder: Path, prefix: str = "") -> dict[str, Any]:
    """Write predictions and ROC curves; return the areas under them."""
    write_predictions(folder / f"{prefix}predictions.csv", predictions, names)
    draw_roc_curves(folder / f"{prefix}roc.png", predictions.labels, predictions.probabilities, names)
    areas = auc(predictions.labels, predictions.probabilities, names)
    return {
        f"{prefix}mean_auc": areas.mean,
        f"{prefix}auc": areas.by_finding,
        "left_out": areas.left_out,
        "num_test": len(predictions.keys),
    }


# --- without fine-tuning --------------------------------------------------------------------------------------------


def check_features(settings: ClassifySettings, folder: Path, device: torch.device, precision: str) -> dict[str, Any]:
    """Score the frozen encoder on the test split, by centre crops."""
    torch.manual_seed(settings.seed)
    shard_sets, names = open_labelled(settings)
    initialised = load_classifier(settings.weights, settings.arch, len(names))
    network = initialised.network.to(device, memory_format=torch.channels_last)
    spec = loader_spec(settings, shard_sets, device)
    with tempfile.TemporaryDirectory() as index_folder:
        parts = labelled_part(settings, shard_sets, Path(index_folder)), whole_split(shard_sets, "test")
        train, test = (
            extract_features(network, network.features, EvaluationLoader(spec, part), settings.crop_size, precision)
            for part in parts
        )
    if train is None or test is None:
        return {}
    found = {"seed": settings.seed, "num_train": len(train.keys)}
    for prefix, is_asked, scores in (
        ("knn_", settings.knn, knn_scores),
        ("linear_", settings.linear_probe, linear_scores),
    ):
        if is_asked:
            predictions = Predictions(test.keys, test.patients, test.labels, scores(train, test.features))
            found |= score(predictions, names, folder, prefix)
    return found
