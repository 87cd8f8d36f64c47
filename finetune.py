"""Fine-tune what train.py has pre-trained, and compare it with other initialisations.

    python finetune.py classify SHARDS --weights runs/dira/export/resnet50.pth
    python finetune.py segment --images IMAGES --masks MASKS --weights runs/dira/export/unet.pth
    python finetune.py localize SHARDS --weights runs/classify/seed-0/classifier.pt
    python finetune.py compare --weights random dira=runs/dira/export/resnet50.pth --amounts 1% all -- classify SHARDS
    torchrun --nproc-per-node 8 finetune.py classify SHARDS --weights runs/dira/export/resnet50.pth

The same command on the same run folder goes on where it was. `python finetune.py classify --help` explains it.
"""

import os

# Before torch is loaded: idle OpenMP threads must sleep, or on a CPU they take the cores from the data's threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from typing import Annotated

import tyro

from downstream.classify import classify
from downstream.classify_settings import ClassifySettings
from downstream.compare import CompareSettings, compare
from downstream.localize import LocalizeSettings, localize
from downstream.segment import SegmentSettings, segment
from errors import exits_on_user_error
from model import distributed
from model.device import choose_device
from settings import RunSettings

COMMANDS: dict[type[RunSettings], Callable[..., object]] = {
    ClassifySettings: classify,
    SegmentSettings: segment,
    LocalizeSettings: localize,
    CompareSettings: compare,
}
Command = (
    Annotated[ClassifySettings, tyro.conf.subcommand("classify")]
    | Annotated[SegmentSettings, tyro.conf.subcommand("segment")]
    | Annotated[LocalizeSettings, tyro.conf.subcommand("localize")]
    | Annotated[CompareSettings, tyro.conf.subcommand("compare")]
)


@exits_on_user_error
def main() -> None:
    """Parse the command line, join the ranks, run."""
    settings = tyro.cli(Command, description=__doc__)
    distributed.init_from_environment(choose_device(settings.device, distributed.local_rank()))
    COMMANDS[type(settings)](settings)
    distributed.shutdown()


if __name__ == "__main__":
    main()
