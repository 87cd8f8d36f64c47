"""What a frozen encoder's features know about the findings: nearest neighbours and a linear probe."""

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop

from downstream.data import EvaluationLoader, LabelledBatch, LabelledSpec, common_label_names, part_of_size, whole_split
from downstream.metrics import auc
from model import distributed
from model.device import autocast
from model.unet import to_unit_range
from pipeline.shardset import ShardSet
from pipeline.spec import LabelledViewSpec

NUM_NEIGHBOURS = 200
NEIGHBOUR_TEMPERATURE = 0.07
RIDGE_STRENGTHS = np.logspace(0, 6, 13)


class Features(NamedTuple):
    """Of N radiographs."""

    features: np.ndarray
    """fp32 [N, C]."""
    labels: np.ndarray
    """0 or 1, fp32 [N, number of findings]."""
    keys: list[str]
    patients: list[str]


@torch.no_grad()
def extract_features(
    network: nn.Module,
    embed: Callable[[Tensor], Tensor],
    loader: Iterable[LabelledBatch],
    crop_size_px: int,
    precision: str,
) -> Features | None:
    """Features of the centre crops, gathered on rank 0 in the order of the ranks; None on the others.

    `network` is in eval mode meanwhile; each of its modules is then in the mode in which it was. Every rank has to call
    this, with the same weights and statistics.

    Args:
        network: What `embed` uses.
        embed: From images [B, 1, crop_size_px, crop_size_px], fp32 in 0..1, to features [B, C].
        loader: This rank's share.
        crop_size_px: Side of the crop.
        precision: bf16, fp16 or fp32, of the forward pass.
    """
    was_training = {module: module.training for module in network.modules()}
    network.eval()
    features, labels, keys, patients = [], [], [], []
    for batch in loader:
        images = to_unit_range(center_crop(batch.images, [crop_size_px, crop_size_px]))
        with autocast(images.device, precision):
            features.append(embed(images).float().cpu())
        labels.append(batch.labels.cpu())
        keys += batch.keys
        patients += batch.patients
    for module, mode in was_training.items():
        module.training = mode
    gathered = distributed.gather_objects((features, labels, keys, patients))
    if not distributed.is_main():
        return None
    features, labels, keys, patients = ([part for rank in gathered for part in rank[i]] for i in range(4))
    return Features(torch.cat(features).numpy(), torch.cat(labels).numpy(), keys, patients)


def knn_scores(train: Features, test: np.ndarray) -> np.ndarray:
    """Share of neighbours with each finding, [M, number of findings], for features [M, C].

    The 200 nearest by cosine similarity s, or all where there are fewer, weighted by exp(s / 0.07) (Wu et al., CVPR
    2018, https://arxiv.org/abs/1805.01978, section 3.4).
    """
    neighbours = KNeighborsRegressor(
        n_neighbors=min(NUM_NEIGHBOURS, len(train.features)),
        metric="cosine",
        weights=lambda distances: np.exp(-distances / NEIGHBOUR_TEMPERATURE),
    )
    return neighbours.fit(train.features, train.labels).predict(test)


def linear_scores(train: Features, test: np.ndarray) -> np.ndarray:
    """A linear function of the features for each finding, [M, number of findings], for features [M, C].

    Ridge regression of the labels on standardised features; its strength is chosen for each finding by leave-one-out
    error, so that it suits 16 radiographs as well as 10,000.
    """
    scaler = StandardScaler().fit(train.features)
    ridge = RidgeCV(RIDGE_STRENGTHS, alpha_per_target=True).fit(scaler.transform(train.features), train.labels)
    return ridge.predict(scaler.transform(test))


def pooled_features(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
    """The global average [B, C] of the last map of an encoder that returns its maps as a list, as smp's do."""
    return lambda images: encoder(images)[-1].mean(dim=(2, 3))


class Probe:
    """Scores an encoder while it is being pre-trained, on the validation split from a part of the training split.

    It has loaders of its own and draws no random numbers; the encoder comes back in the mode in which it was.
    """

    def __init__(
        self,
        shard_sets: tuple[ShardSet, ...],
        crop_size_px: int,
        batch_size_per_rank: int,
        device: torch.device,
        *,
        precision: str = "fp32",
        max_train_samples: int = 5000,
        num_threads: int = 2,
    ) -> None:
        """Look whether the sets can be probed.

        Args:
            shard_sets: Labelled ones; they are read as one.
            crop_size_px: Side of the centre crops, of radiographs scaled to 8/7 of it.
            batch_size_per_rank: Images in a forward pass.
            device: Of the encoder.
            precision: bf16, fp16 or fp32, of the forward passes.
            max_train_samples: About so many radiographs of the training split are used, always the same ones.
            num_threads: CPU threads that decode.

        Raises:
            UserError: A set has no labels, no validation split, or not the findings of the others.
        """
        self._label_names = common_label_names(shard_sets, ("train", "val"))
        self._crop_size_px, self._precision, self._max_train_samples = crop_size_px, precision, max_train_samples
        self._spec = LabelledSpec(
            shard_sets=shard_sets,
            view=LabelledViewSpec(round(crop_size_px * 8 / 7), crop_size_px),
            batch_size_per_rank=batch_size_per_rank,
            seed=0,
            device=device,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_threads=num_threads,
        )

    def run(self, encoder: nn.Module) -> dict[str, float]:
        """Mean areas under the ROC curve by nearest neighbours and by a linear probe.

        Every rank calls this, with the same weights and BN statistics, and reads its share.

        Args:
            encoder: From images [B, 1, crop_size_px, crop_size_px] in 0..1 to a list of maps, as `model.unet.UNet`'s.

        Returns:
            `probe_knn_auc` and `probe_linear_auc` on rank 0, unless no finding has positives and negatives in the
            validation split; else nothing.
        """
        shard_sets, embed = self._spec.shard_sets, pooled_features(encoder)
        with tempfile.TemporaryDirectory() as folder:
            parts = (
                part_of_size(shard_sets, "train", Path(folder), self._max_train_samples),
                whole_split(shard_sets, "val"),
            )
            train, val = (
                extract_features(
                    encoder, embed, EvaluationLoader(self._spec, part), self._crop_size_px, self._precision
                )
                for part in parts
            )
        if train is None or val is None:
            return {}
        scores = {"knn": knn_scores(train, val.features), "linear": linear_scores(train, val.features)}
        areas = {f"probe_{name}_auc": auc(val.labels, found, self._label_names).mean for name, found in scores.items()}
        return {name: area for name, area in areas.items() if math.isfinite(area)}
