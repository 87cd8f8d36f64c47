"""The usual next step after the plain recipe: the same tar shards through `webdataset`, torchvision's v2 on tensors."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import webdataset
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.loader_row import measure_batches, to_device
from benchmarks.plain_loader import distort
from benchmarks.timing import Figures
from pipeline.packing import EXTENSIONS
from pipeline.shardset import ShardSet
from pipeline.spec import Batch, DistortionSpec, ViewSpec


class TwoTensorViews:
    """As `plain_loader.TwoViews`, from a uint8 tensor [1, H, W]."""

    def __init__(self, view: ViewSpec, distortion: DistortionSpec | None) -> None:
        self.distortion = distortion
        self.crop = v2.Compose(
            [
                v2.RandomResizedCrop(view.crop_size_px, view.crop_area, view.crop_aspect, antialias=True),
                v2.RandomHorizontalFlip(view.flip_probability),
            ]
        )
        jitter = v2.ColorJitter(brightness=view.brightness, contrast=view.contrast)
        blur = v2.GaussianBlur(2 * math.ceil(3 * view.blur_sigma_px[1]) + 1, view.blur_sigma_px)
        self.augment = v2.Compose(
            [v2.RandomApply([jitter], view.jitter_probability), v2.RandomApply([blur], view.blur_probability)]
        )

    def __call__(self, image: torch.Tensor) -> Batch:
        """Draw the views."""
        target = self.crop(image)
        return Batch(self._finish(target), self._finish(self.crop(image)), target)

    def _finish(self, image: torch.Tensor) -> torch.Tensor:
        image = self.augment(image)
        return image if self.distortion is None else torch.from_numpy(distort(image[0].numpy(), self.distortion))[None]


def decode_raw(data: bytes, size_px: int) -> torch.Tensor:
    """Return the pixels of a `raw` sample, uint8 [1, size_px, size_px]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(1, size_px, size_px)


def decode_file(data: bytes) -> torch.Tensor:
    """Decode a PNG or JPEG file to uint8 [1, H, W]."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.GRAY)


def webdataset_batches(
    shard_set: ShardSet,
    view: ViewSpec,
    distortion: DistortionSpec | None,
    batch_size: int,
    num_workers: int,
    device: str,
) -> Iterator[Batch]:
    """Yield batches of a set's split `train` without end; uint8 [batch_size, 1, S, S] each."""
    decode: Callable[[bytes], torch.Tensor] = decode_file
    if shard_set.store == "raw":
        decode = partial(decode_raw, size_px=shard_set.size_px)
    tar_paths = shard_set.split("train").tar_paths
    draw_views = TwoTensorViews(view, distortion)
    dataset = (
        webdataset.WebDataset(tar_paths, shardshuffle=len(tar_paths))
        .repeat()
        .shuffle(1024 // num_workers)
        .to_tuple(EXTENSIONS[shard_set.store])
        .map(lambda sample: draw_views(decode(sample[0])))
    )
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, pin_memory=device == "cuda")
    return to_device(iter(loader), device)


def measure(source: str, batch_size: int, num_workers: int, device: str, seconds: float) -> Figures:
    """Measure the recipe on the shard set `source` with `num_workers` processes."""

    def open_batches() -> Iterator[Batch]:
        return webdataset_batches(ShardSet.open(source), ViewSpec(), DistortionSpec(), batch_size, num_workers, device)

    return measure_batches(open_batches, batch_size, num_workers, device, seconds)
