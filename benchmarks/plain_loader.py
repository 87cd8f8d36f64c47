"""The recipe everyone writes, written well: PNG files, PIL, torchvision, NumPy, `DataLoader` workers.

It is what the data path is measured against. As usual, images are RGB and tensors are floats, for the network takes
three channels; `measure_grey` is the same for those who keep to what radiographs are, one channel of 8 bits, up to the
network. Epochs follow each other without a pause.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms import functional

from benchmarks.loader_row import measure_batches, to_device
from benchmarks.timing import Figures
from pipeline.spec import Batch, DistortionSpec, ViewSpec

Block = tuple[int, int, int, int]
"""y, x, height, width."""


class GaussianBlur:
    """Blur with a random sigma, as SimCLR and MoCo v2 do."""

    def __init__(self, sigma_px: tuple[float, float]) -> None:
        self.sigma_px = sigma_px

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the blurred image."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma_px)))


class TwoViews:
    """Two views of a PIL image and the target of the first, each through `to_tensor`: a sample of a `Batch`."""

    def __init__(
        self,
        view: ViewSpec,
        distortion: DistortionSpec | None,
        to_tensor: Callable[[Image.Image], torch.Tensor] = functional.to_tensor,
    ) -> None:
        self.distortion, self.to_tensor = distortion, to_tensor
        self.crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(view.crop_size_px, view.crop_area, view.crop_aspect),
                transforms.RandomHorizontalFlip(view.flip_probability),
            ]
        )
        jitter = transforms.ColorJitter(brightness=view.brightness, contrast=view.contrast)
        self.augment = transforms.Compose(
            [
                transforms.RandomApply([jitter], view.jitter_probability),
                transforms.RandomApply([GaussianBlur(view.blur_sigma_px)], view.blur_probability),
            ]
        )

    def __call__(self, image: Image.Image) -> Batch:
        """Draw the views."""
        target, second = self.crop(image), self.crop(image)
        return Batch(*map(self.to_tensor, (self._damage(target), self._damage(second), target)))

    def _damage(self, image: Image.Image) -> Image.Image:
        image = self.augment(image)
        return Image.fromarray(distort(np.asarray(image), self.distortion)) if self.distortion else image


def distort(image: np.ndarray, spec: DistortionSpec) -> np.ndarray:
    """Return a copy of a square image [S, S, ...] with blocks or all else cut out, with blocks swapped, or as it is."""
    size_px = image.shape[0]
    draw = random.random()
    if draw <= spec.cutout_probability:
        distorted = image.copy()
        for y, x, h, w in _draw_blocks(spec, size_px, *spec.cutout_side_px):
            distorted[y : y + h, x : x + w] = 0
        return distorted
    draw -= spec.cutout_probability
    if draw <= spec.outer_cutout_probability:
        distorted = np.zeros_like(image)
        low, high = spec.outer_margin_px
        for y, x, h, w in _draw_blocks(spec, size_px, 224 - high, 224 - low):
            distorted[y : y + h, x : x + w] = image[y : y + h, x : x + w]
        return distorted
    draw -= spec.outer_cutout_probability
    distorted = image.copy()
    if draw <= spec.shuffle_probability:
        for _ in range(spec.num_swaps):
            (y, x, h, w), (to_y, to_x, _, _) = _draw_swap(spec, size_px)
            distorted[y : y + h, x : x + w] = image[to_y : to_y + h, to_x : to_x + w]
            distorted[to_y : to_y + h, to_x : to_x + w] = image[y : y + h, x : x + w]
    return distorted


def _draw_blocks(spec: DistortionSpec, size_px: int, low_px: int, high_px: int) -> Iterator[Block]:
    for _ in range(spec.max_blocks):
        yield _place_block(spec, size_px, *_draw_sides(size_px, low_px, high_px))
        if random.random() < spec.stop_probability:
            break


def _draw_swap(spec: DistortionSpec, size_px: int) -> tuple[Block, Block]:
    """Draw two disjoint blocks of one size."""
    h, w = _draw_sides(size_px, *spec.shuffle_side_px)
    while True:
        one, other = _place_block(spec, size_px, h, w), _place_block(spec, size_px, h, w)
        if abs(one[0] - other[0]) >= h or abs(one[1] - other[1]) >= w:
            return one, other


def _draw_sides(size_px: int, low_px: int, high_px: int) -> tuple[int, int]:
    low_px, high_px = _scale(low_px, size_px), _scale(high_px, size_px)
    return random.randint(low_px, high_px), random.randint(low_px, high_px)


def _place_block(spec: DistortionSpec, size_px: int, h: int, w: int) -> Block:
    border_px = _scale(spec.border_px, size_px)
    y = random.randint(border_px, size_px - border_px - h)
    x = random.randint(border_px, size_px - border_px - w)
    return y, x, h, w


def _scale(length_px: int, size_px: int) -> int:
    """Lengths are given for views of 224 px."""
    return max(1, round(length_px * size_px / 224))


class PngFolder(Dataset[Batch]):
    """The views of PNG files, opened in PIL's `mode`."""

    def __init__(self, paths: Sequence[Path], mode: Literal["RGB", "L"], views: TwoViews) -> None:
        self.paths, self.mode, self.views = paths, mode, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        """Read, decode and draw."""
        with Image.open(self.paths[index]) as image:
            return self.views(image.convert(self.mode))


def open_plain_loader(dataset: Dataset[Batch], batch_size: int, num_workers: int, device: str) -> Iterator[Batch]:
    """Return an iterator without end over batches of a dataset, shuffled anew for every epoch."""
    sampler = RandomSampler(dataset, num_samples=2**40)  # no pause between epochs
    loader = DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=num_workers, pin_memory=device == "cuda", drop_last=True
    )
    return to_device(iter(loader), device)


def measure(source: str, batch_size: int, num_workers: int, device: str, seconds: float) -> Figures:
    """Measure the recipe on the folder `source` with `num_workers` processes."""
    return _measure("RGB", functional.to_tensor, source, batch_size, num_workers, device, seconds)


def measure_grey(source: str, batch_size: int, num_workers: int, device: str, seconds: float) -> Figures:
    """As `measure`, for the recipe that keeps to grey and 8 bits."""
    return _measure("L", functional.pil_to_tensor, source, batch_size, num_workers, device, seconds)


def _measure(
    mode: Literal["RGB", "L"],
    to_tensor: Callable[[Image.Image], torch.Tensor],
    source: str,
    batch_size: int,
    num_workers: int,
    device: str,
    seconds: float,
) -> Figures:
    def open_batches() -> Iterator[Batch]:
        views = TwoViews(ViewSpec(), DistortionSpec(), to_tensor)
        dataset = PngFolder(sorted(Path(source).glob("*.png")), mode, views)
        return open_plain_loader(dataset, batch_size, num_workers, device)

    return measure_batches(open_batches, batch_size, num_workers, device, seconds)
