"""What a run is: a frozen dataclass, whose fields are a command line's options and config.json's keys."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_type_hints

import typeguard
import tyro

from errors import UsageError, UserError

PUBLISHED_EPOCHS = {"di": 1200, "dir": 1200, "dira": 400}
Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Fused = Literal["auto", "apex", "torch"]


@dataclass(frozen=True)
class RunSettings:
    """What the settings of every kind of run can do; a field is an option and a key."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()
    """Names of the fields that do not make it another run."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, of JSON's types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Self:
        """Settings as `source` holds them; options that are younger than it have their defaults, so that runs go on.

        Raises:
            UserError: A key is unknown or has the wrong type, or there is none for what has no default.
        """
        required = {field.name for field in fields(cls) if field.default is field.default_factory is MISSING}
        known = {field.name for field in fields(cls)}
        if wrong := sorted((values.keys() - known) | (required - values.keys())):
            raise UserError(f"{source}: settings {', '.join(wrong)} are unknown or missing: another version wrote it")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        hints = get_type_hints(cls)
        for name, value in values.items():
            try:
                typeguard.check_type(value, hints[name])
            except typeguard.TypeCheckError as error:
                raise UserError(f"{source}: setting {name}: {error}") from None
        return cls(**values)

    def refuse_other(self, theirs: Self, source: str) -> None:
        """Raise UserError where a run that `source` belongs to can't be gone on with under our settings."""
        differing = [
            f"{option(field.name)} {getattr(theirs, field.name)} there, {getattr(self, field.name)} here"
            for field in fields(self)
            if field.name not in self.MAY_CHANGE and getattr(theirs, field.name) != getattr(self, field.name)
        ]
        if differing:
            raise UserError(
                f"{source} belongs to a run with other settings ({'; '.join(differing)}): "
                "use the same ones, or another --run-dir"
            )


def option(name: str) -> str:
    """Return the command line's spelling of a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Settings(RunSettings):
    """Pre-train a ResNet U-Net with DiRA on one or several shard sets."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        (
            *("run_dir", "resume", "max_steps", "save_every", "log_every", "probe_every"),
            *("device", "compile", "timeout_s", "trust_shards", "cuda_graphs", "data_threads"),
        )
    )

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Sets that shard_cxr14.py packed, folders or s3://BUCKET/FOLDER; several are read as one, by their sizes."""
    mode: Literal["di", "dir", "dira"]
    """Terms of the loss: discriminative; and restorative; and adversarial."""

    # The run
    run_dir: str | None = None
    """Where everything goes; runs/MODE by default. The same command on the same folder goes on where it was."""
    init_from: str | None = None
    """Start from the weights of this checkpoint (ours or the original code's) or export."""
    resume: str = "auto"
    """auto: from the run folder's last checkpoint if there is one; never; or a checkpoint's path."""
    epochs: int | None = None
    """As published by default: di and dir 1200, dira 400."""
    max_steps: int | None = None
    """End the run after this many steps, with validation and exports."""
    seed: int = 0
    """Of the initial weights, the data's order and every augmentation."""
    save_every: int = 1000
    """Steps between checkpoints; there is one at each epoch's end too."""
    log_every: int = 50
    """Steps between lines of metrics; there is one at each epoch's end too."""
    probe_every: int | None = None
    """Epochs between scores of the query encoder by nearest neighbours and a linear probe, on shards with labels."""

    # The network
    arch: Arch = "resnet50"
    """The encoder."""
    crop_size: int = 224
    """Side of a view in px, a multiple of 32."""

    # The terms of the loss
    moco_dim: int = 128
    """Length of an embedding."""
    moco_k: int = 65536
    """Keys in the queue."""
    queue_start: Literal["keys", "random"] = "keys"
    """What the queue holds at first: keys of radiographs, an epoch's at most; or, as in MoCo, random directions."""
    moco_m: float = 0.999
    """Momentum of the key encoder's moving average."""
    moco_t: float = 0.2
    """Temperature of InfoNCE."""
    key_bn_groups: int = 4
    """On one rank, groups in which the shuffled keys go through batch normalisation."""
    contrastive_weight: float = 1.0
    """Weight of InfoNCE in the total loss."""
    mse_weight: float = 10.0
    """Weight of the restorative term."""
    adv_weight: float = 0.001
    """Weight of the adversarial term."""
    target: Literal["aligned", "unflipped"] = "aligned"
    """What is restored: the query's crop, flipped as the query is; or, as the original code did, not flipped."""

    # Optimisation
    batch_size: int = 256
    """Over all ranks together."""
    lr: float = 0.03
    """SGD's learning rate at the beginning, for the network."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 1e-4
    """SGD's weight decay."""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: to 0 over the epochs; step: a tenth of it from each of --lr-drop-epochs on."""
    lr_drop_epochs: tuple[int, ...] = ()
    """Epochs, counted from 0, from which on --schedule step takes a tenth of the learning rate."""
    disc_lr: float = 2e-4
    """Adam's learning rate for the discriminator."""

    # The machine
    device: Device = "auto"
    """auto: a GPU where there is one."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    fused: Fused = "auto"
    """Whose fused optimizers; auto: apex's where installed, else torch's."""
    accumulate: int = 1
    """Micro-batches that a step's batch goes through the network in, for cards that can't hold it in one."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    timeout_s: float = 1800.0
    """With several ranks: end the run, naming the rank, when one hangs for this many seconds."""
    cuda_graphs: bool = False
    """Replay each step as one CUDA graph, for batches so small that launching kernels takes the time. One GPU."""
    trust_shards: bool = False
    """Don't compare the tars with their checksums in the background, once at each start."""
    data_threads: int | None = None
    """CPU threads a rank decodes and augments with; the machine's cores over its ranks by default."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        positive = (
            "epochs",
            "max_steps",
            "save_every",
            "log_every",
            "moco_dim",
            "moco_k",
            "moco_t",
            "key_bn_groups",
            "accumulate",
            "probe_every",
        )
        for name in (*positive, "batch_size", "lr", "disc_lr", "data_threads", "crop_size", "timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{option(name)} {value}: must be more than 0")
        for name in ("contrastive_weight", "mse_weight", "adv_weight", "momentum", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{option(name)} {getattr(self, name)}: must be 0 or more")
        if not 0 <= self.moco_m <= 1:
            raise UsageError(f"--moco-m {self.moco_m}: a moving average's momentum lies between 0 and 1")
        if self.crop_size % 32:
            raise UsageError(f"--crop-size {self.crop_size}: the U-Net needs a multiple of 32")
        if not self.shards:
            raise UsageError("name at least one shard set, a folder that shard_cxr14.py packed")
        if (self.schedule == "step") != bool(self.lr_drop_epochs):
            raise UsageError("--schedule step and --lr-drop-epochs E1 E2 ... go together")

    @property
    def num_epochs(self) -> int:
        """Epochs of the schedule."""
        return self.epochs or PUBLISHED_EPOCHS[self.mode]

    @property
    def run_path(self) -> str:
        """The run folder."""
        return self.run_dir or f"runs/{self.mode}"
