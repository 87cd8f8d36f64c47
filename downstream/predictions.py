"""What a classifier says about the radiographs of a split: probabilities, shared out over the ranks and gathered."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, ten_crop

from downstream.data import LabelledBatch
from model import distributed
from model.device import autocast

Crops = Callable[[Tensor, int], Sequence[Tensor]]
"""From images [B, 1, H, W] and a crop's side in px to the crops that are looked at, [B, 1, side, side] each."""


class Predictions(NamedTuple):
    """Of N radiographs."""

    keys: list[str]
    patients: list[str]
    labels: np.ndarray
    """0 or 1, fp32 [N, number of findings]."""
    probabilities: np.ndarray
    """[N, number of findings]."""


def centre_crop(images: Tensor, size_px: int) -> Sequence[Tensor]:
    """The one in the middle."""
    return (center_crop(images, [size_px, size_px]),)


def ten_crops(images: Tensor, size_px: int) -> Sequence[Tensor]:
    """The four corners, the middle, and their mirror images."""
    return ten_crop(images, [size_px, size_px])


@torch.no_grad()
def predict(
    network: nn.Module,
    loader: Iterable[LabelledBatch],
    crops: Crops,
    crop_size_px: int,
    precision: str,
    num_findings: int,
) -> Predictions:
    """This rank's share of the predictions, in eval mode: of each radiograph the mean probability over its crops."""
    network.eval()
    none = np.empty((0, num_findings), np.float32)  # there may be more ranks than samples
    keys, patients, labels, probabilities = [], [], [none], [none]
    for batch in loader:
        with autocast(batch.images.device, precision):
            logits = [network(crop.contiguous()) for crop in crops(batch.images, crop_size_px)]
        probabilities.append(torch.stack(logits).float().sigmoid().mean(dim=0).cpu().numpy())
        labels.append(batch.labels.cpu().numpy())
        keys += batch.keys
        patients += batch.patients
    return Predictions(keys, patients, np.concatenate(labels), np.concatenate(probabilities))


def gather(ours: Predictions) -> Predictions | None:
    """All ranks' predictions on rank 0, in the order of packing; None on the others."""
    shares = distributed.gather_objects(ours)
    if not distributed.is_main():
        return None
    keys, patients = ([name for share in shares for name in share[i]] for i in range(2))
    return Predictions(keys, patients, *(np.concatenate([share[i] for share in shares]) for i in (2, 3)))


def mean_cross_entropy(ours: Predictions, device: torch.device) -> float:
    """Binary cross-entropy over all ranks' predictions, the same on each rank; `device` is where collectives run."""
    probabilities, labels = torch.from_numpy(ours.probabilities), torch.from_numpy(ours.labels)
    total = F.binary_cross_entropy(probabilities, labels, reduction="none").double().sum().item()
    sums = torch.tensor([total, labels.numel()], dtype=torch.float64, device=device)
    total, count = distributed.all_reduce_sum(sums).tolist()
    return total / count


def write_predictions(path: Path, predictions: Predictions, names: tuple[str, ...]) -> None:
    """Write a CSV: key, patient, and of each finding the label and the probability."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = [column for name in names for column in (f"{name} label", f"{name} probability")]
        writer.writerow(["key", "patient", *columns])
        for key, patient, labels, probabilities in zip(*predictions, strict=True):
            pairs = zip(labels, probabilities, strict=True)
            writer.writerow([key, patient, *(cell for label, p in pairs for cell in (int(label), f"{p:.6f}"))])
