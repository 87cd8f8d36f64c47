"""See where a classifier looks: Grad-CAM's heatmaps against the boxes that radiologists drew.

python finetune.py localize SHARDS --weights runs/classify/seed-0/classifier.pt
"""

import csv
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import torch
import torchvision
import tyro
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from downstream.networks import SavedClassifier, open_classifier
from downstream.pictures import draw_boxes, write_png
from downstream.runs import FREE_TO_CHANGE
from errors import UsageError, UserError
from model.device import choose_device
from model.unet import to_unit_range
from pipeline.packing import decode_grey
from pipeline.shardset import ShardSet
from rundir import claim, lock
from settings import Device, RunSettings

IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
COLUMNS = ("image", "finding", "num_boxes", "iou", "is_pointed_at", "x", "y", "w", "h")


@dataclass(frozen=True)
class LocalizeSettings(RunSettings):
    """Measure how well a classifier's Grad-CAM heatmaps find the boxes of a shard set."""

    MAY_CHANGE: ClassVar[frozenset[str]] = FREE_TO_CHANGE | {"batch_size"}

    shards: tyro.conf.Positional[str]
    """A set that shard_cxr14.py packed with --boxes."""
    weights: str
    """The classifier.pt of finetune.py classify."""
    run_dir: str = "runs/localize"
    """Where everything goes."""
    split: str = "test"
    """Of the shard set; ChestX-ray14's boxes are all on test images."""
    threshold: float = 180 / 255
    """What part of a heatmap's maximum belongs to the finding; the box is that of the largest region above it. The
    authors of ChestX-ray14 took 60 and 180 of 255 (https://arxiv.org/abs/1705.02315). At a low threshold, such as
    Grad-CAM's own 15%, boxes cover most of a radiograph, and even random weights look good at an IoU of 0.1."""
    size: int | None = None
    """What radiographs are resized to, side in px; by default, as when the classifier was trained."""
    batch_size: int = 32
    """Heatmaps made at a time."""
    device: Device = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        if not 0 < self.threshold < 1:
            raise UsageError(f"--threshold {self.threshold}: must be between 0 and 1")
        if self.batch_size < 1 or (self.size is not None and self.size < 32):
            raise UsageError("--batch-size must be more than 0, and --size 32 or more")


class Marked(NamedTuple):
    """A radiograph with a finding that has boxes: what one heatmap is made for and measured on."""

    key: str
    finding: str
    image: np.ndarray
    """uint8 grey [S, S], as the network sees it."""
    boxes: np.ndarray
    """float64 [N, 4]: left, top, right and bottom of each box, in px of `image`."""
    meta: dict[str, Any]
    """The sample's JSON."""


class Found(NamedTuple):
    """What a heatmap says about the place of a finding."""

    box: np.ndarray | None
    """float64 [4], as in `Marked`; None if nothing speaks for the finding."""
    iou: float
    """With the box that fits best; 0 without a box."""
    is_pointed_at: bool
    """Whether the heatmap's maximum lies in one of the boxes: the pointing game (https://arxiv.org/abs/1608.00507),
    without its tolerance of 15 px."""


def localize(settings: LocalizeSettings) -> dict[str, Any]:
    """Make the heatmaps, measure them, write results and overlays.

    Returns:
        What results.json holds: the scores of each finding and their means over the findings, all in 0..1.

    Raises:
        UserError: The classifier or the shards can't be used, or no box belongs to a finding that the classifier knows.
    """
    device = choose_device(settings.device, 0)
    classifier = open_classifier(Path(settings.weights))
    size_px = settings.size or classifier.resized_size_px
    shard_set = ShardSet.open(settings.shards)
    folder = Path(settings.run_dir)
    with lock(folder):
        claim(folder, settings, {"device": str(device), "size_px": size_px})
        marked = read_marked(shard_set, settings.split, classifier.label_names, size_px)
        (folder / "overlays").mkdir(exist_ok=True)
        found = []
        for start in range(0, len(marked), settings.batch_size):
            batch = marked[start : start + settings.batch_size]
            for one, heatmap in zip(batch, heatmaps(classifier, batch, device), strict=True):
                found.append(judge(heatmap, one.boxes, settings.threshold))
                picture = draw_boxes(
                    one.image, heatmap, one.boxes, found[-1].box, f"{one.finding} IoU {found[-1].iou:.2f}"
                )
                write_png(folder / "overlays" / f"{one.key}-{one.finding}.png", picture)
            print(f"{len(found)} of {len(marked)} heatmaps", flush=True)
        results = summarise(marked, found)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        _write_csv(folder / "boxes.csv", marked, found)
    print(format_table(results), flush=True)
    return results


def read_marked(shard_set: ShardSet, split: str, label_names: tuple[str, ...], size_px: int) -> list[Marked]:
    """Every radiograph and finding of a split with boxes, of the findings that the classifier knows.

    Raises:
        UserError: There is none.
    """
    marked, unknown = [], set()
    for key, meta, data in shard_set.read_samples(split):
        boxes = defaultdict(list)
        for box in meta["boxes"]:
            boxes[box["label"]].append(box_in_px(box, meta, size_px))
        unknown |= boxes.keys() - set(label_names)
        known = [finding for finding in boxes if finding in label_names]
        if known:
            image = _network_image(shard_set, meta, data, size_px)
            marked += [Marked(key, finding, image, np.array(boxes[finding]), meta) for finding in known]
    if unknown:
        print(f"left out, as the classifier doesn't know them: boxes of {', '.join(sorted(unknown))}", flush=True)
    if not marked:
        raise UserError(
            f"{shard_set.path}: its {split} split has no boxes of {', '.join(label_names)}: "
            "pack with --boxes, or name another --split"
        )
    return marked


def box_in_px(box: dict[str, float], meta: dict[str, Any], size_px: int) -> np.ndarray:
    """A box's left, top, right and bottom, float64 [4]: from the original radiograph to its stored and resized image.

    Coordinates count from the left upper corner of the first pixel, so that they scale.
    """
    corners = np.array([[box["x"], box["y"]], [box["x"] + box["w"], box["y"] + box["h"]]])
    stored = corners * meta["scale"] + meta["offset_px"]
    return (stored * size_px / meta["stored_size_px"]).ravel()


def box_in_original(box: np.ndarray, meta: dict[str, Any], size_px: int) -> np.ndarray:
    """The way back: x, y, w and h in pixels of the original radiograph, float64 [4]."""
    stored = box.reshape(2, 2) * meta["stored_size_px"] / size_px
    start, end = (stored - meta["offset_px"]) / meta["scale"]
    return np.concatenate([start, end - start])


def _network_image(shard_set: ShardSet, meta: dict[str, Any], data: bytes, size_px: int) -> np.ndarray:
    stored_px = meta["stored_size_px"]
    image = np.frombuffer(data, np.uint8).reshape(stored_px[::-1]) if shard_set.store == "raw" else decode_grey(data)
    shrinks = max(stored_px) > size_px
    return cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def heatmaps(classifier: SavedClassifier, batch: list[Marked], device: torch.device) -> np.ndarray:
    """Grad-CAM on the last convolutional block, for the finding of each: fp32 [B, S, S] in 0..1."""
    images = to_unit_range(torch.from_numpy(np.stack([one.image for one in batch]))[:, None]).to(device)
    targets = [ClassifierOutputTarget(classifier.label_names.index(one.finding)) for one in batch]
    network = classifier.network.to(device)
    with GradCAM(network, [network.layer4[-1]]) as cam:
        return cam(images, targets)


def judge(heatmap: np.ndarray, boxes: np.ndarray, threshold: float) -> Found:
    """Compare a heatmap, [S, S] in 0..1, with boxes, [N, 4]."""
    if not heatmap.max() > 0:
        return Found(None, 0.0, is_pointed_at=False)
    box = region_box(heatmap, threshold)
    iou = torchvision.ops.box_iou(torch.from_numpy(box[None]), torch.from_numpy(boxes)).max().item()
    y, x = np.add(np.unravel_index(heatmap.argmax(), heatmap.shape), 0.5)
    left, top, right, bottom = boxes.T
    is_inside = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
    return Found(box, iou, bool(is_inside.any()))


def region_box(heatmap: np.ndarray, threshold: float) -> np.ndarray:
    """The box around the largest connected region of at least `threshold` times the maximum: float64 [4]."""
    is_hot = (heatmap >= threshold * heatmap.max()).astype(np.uint8)
    _, _, regions, _ = cv2.connectedComponentsWithStats(is_hot)
    largest = regions[1 + regions[1:, cv2.CC_STAT_AREA].argmax()]  # the first is all that is not hot
    left, top, width, height = largest[:4].astype(float)
    return np.array([left, top, left + width, top + height])


def summarise(marked: list[Marked], found: list[Found]) -> dict[str, Any]:
    """Scores of each finding, and their means over the findings."""
    by_finding = defaultdict(list)
    for one, result in zip(marked, found, strict=True):
        by_finding[one.finding].append(result)
    findings = {finding: _scores(by_finding[finding]) for finding in sorted(by_finding)}
    names = ("pointing_game", "iou", *(_accuracy(threshold) for threshold in IOU_THRESHOLDS))
    return {
        "findings": findings,
        "mean": {name: statistics.fmean(scores[name] for scores in findings.values()) for name in names},
        "num_without_heatmap": sum(result.box is None for result in found),
    }


def _scores(found: list[Found]) -> dict[str, float]:
    shares = {_accuracy(t): statistics.fmean(result.iou >= t for result in found) for t in IOU_THRESHOLDS}
    return {
        "num": len(found),
        "pointing_game": statistics.fmean(result.is_pointed_at for result in found),
        "iou": statistics.fmean(result.iou for result in found),
        **shares,
    }


def _accuracy(threshold: float) -> str:
    return f"accuracy_at_{threshold}"


def format_table(results: dict[str, Any]) -> str:
    """The scores in percent, for the terminal: a line for each finding, and the mean."""
    lines = [f"{'finding':20}{'num':>5}{'pointed':>9}{'IoU':>6}" + "".join(f"{f'@{t}':>6}" for t in IOU_THRESHOLDS)]
    for finding, scores in [*results["findings"].items(), ("mean", results["mean"])]:
        shares = "".join(f"{100 * scores[_accuracy(threshold)]:6.1f}" for threshold in IOU_THRESHOLDS)
        num, pointed = scores.get("num", ""), 100 * scores["pointing_game"]
        lines.append(f"{finding:20}{num:>5}{pointed:9.1f}{100 * scores['iou']:6.1f}{shares}")
    return "\n".join(lines)


def _write_csv(path: Path, marked: list[Marked], found: list[Found]) -> None:
    """A line for each heatmap, with the box found, if any, in pixels of the original radiograph."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for one, result in zip(marked, found, strict=True):
            box = [""] * 4
            if result.box is not None:
                box = [f"{edge:.1f}" for edge in box_in_original(result.box, one.meta, len(one.image))]
            table.writerow([one.key, one.finding, len(one.boxes), f"{result.iou:.4f}", int(result.is_pointed_at), *box])
