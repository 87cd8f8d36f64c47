"""Settings of `finetune.py classify`."""

from dataclasses import dataclass
from typing import ClassVar

import tyro

from downstream.runs import FREE_TO_CHANGE
from errors import UsageError
from pipeline.spec import LabelledViewSpec
from settings import Arch, Device, Fused, Precision, RunSettings, option


@dataclass(frozen=True)
class ClassifySettings(RunSettings):
    """Fine-tune a classifier of the shards' findings; test it on their test split by ten crops."""

    MAY_CHANGE: ClassVar[frozenset[str]] = FREE_TO_CHANGE

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Labelled sets that shard_cxr14.py packed; several are read as one."""
    weights: str
    """Of the encoder: any checkpoint or export; or random; or imagenet, torchvision's supervised weights."""

    # The run
    run_dir: str = "runs/classify"
    """Where everything goes, a folder for each seed. The same command on the same folder goes on where it was."""
    runs: int = 1
    """Do it again with the seeds that follow, for a mean and a standard deviation."""
    seed: int = 0
    """Of the new final layer, of random weights, the data's order, augmentations, and which patients are labelled."""
    linear_probe: bool = False
    """Instead of fine-tuning: a linear model of the frozen encoder's features, in a minute."""
    knn: bool = False
    """Instead of fine-tuning: nearest neighbours among the frozen encoder's features, in a minute."""

    # Labels
    label_fraction: float = 1.0
    """Train on the images of this fraction of the training split's patients, chosen by seed."""
    num_patients: int | None = None
    """Train on the images of this many patients instead. Validation and test splits stay whole."""

    # The network and its images
    arch: Arch = "resnet50"
    """The encoder."""
    crop_size: int = 224
    """Side of a crop in px."""
    resized_size: int | None = None
    """Side in px that a radiograph is scaled to before it is cropped; 8/7 of --crop-size by default (256 for 224)."""

    # Optimisation
    epochs: int = 200
    """At most."""
    patience: int = 10
    """Stop after this many epochs without a lower validation loss."""
    batch_size: int = 32
    """Over all ranks together."""
    lr: float = 2e-4
    """Adam's learning rate at the beginning."""
    lr_patience: int = 5
    """Halve the learning rate after more than this many epochs without a lower validation loss."""
    min_steps_per_epoch: int = 1
    """Make an epoch of several passes where it has fewer steps: with few labels, validating is what takes time."""

    # The machine
    device: Device = "auto"
    """auto: a GPU where there is one."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    fused: Fused = "auto"
    """Whose fused Adam; auto: apex's where installed, else torch's."""
    data_threads: int | None = None
    """CPU threads a rank decodes and augments with; the machine's cores over its ranks by default."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        if not self.shards:
            raise UsageError("name at least one shard set, a folder that shard_cxr14.py packed")
        names = ("runs", "num_patients", "crop_size", "resized_size", "epochs", "patience", "batch_size", "lr")
        for name in (*names, "min_steps_per_epoch", "data_threads"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UsageError(f"{option(name)} {value}: must be more than 0")
        if self.seed < 0 or self.lr_patience < 0:
            raise UsageError("--seed and --lr-patience must be 0 or more")
        if not 0 < self.label_fraction <= 1:
            raise UsageError(f"--label-fraction {self.label_fraction}: must be more than 0 and at most 1")
        if self.num_patients is not None and self.label_fraction != 1:
            raise UsageError("--label-fraction and --num-patients exclude each other")
        if self.view.resized_size_px < self.crop_size:
            raise UsageError(f"--resized-size {self.resized_size}: must not be less than --crop-size {self.crop_size}")

    @property
    def view(self) -> LabelledViewSpec:
        """How radiographs are shown."""
        return LabelledViewSpec(self.resized_size or round(self.crop_size * 8 / 7), self.crop_size)
