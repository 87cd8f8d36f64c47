import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from downstream.localize import (
    COLUMNS,
    Found,
    LocalizeSettings,
    Marked,
    box_in_original,
    box_in_px,
    format_table,
    heatmaps,
    judge,
    localize,
    read_marked,
    region_box,
    summarise,
)
from downstream.networks import Classifier, SavedClassifier, save_classifier
from errors import UsageError, UserError
from pipeline.phantom import FINDING_RATES, Box, draw_phantom
from pipeline.shardset import ShardSet
from tests.commands import run_command

FINDINGS = tuple(FINDING_RATES)
CPU = torch.device("cpu")


def iou_of(box: np.ndarray, other: np.ndarray) -> float:
    """Of left, top, right and bottom."""
    width, height = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    both = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return both / (sum(areas) - both)


def cropped_phantom(index: int, findings: set[str]) -> tuple[np.ndarray, list[Box]]:
    """A phantom that isn't square, uint8 [200, 256], and its boxes."""
    phantom = draw_phantom(0, index, 256, findings=findings)
    return phantom.image[30:230], [box._replace(y=box.y - 30) for box in phantom.boxes]


@pytest.mark.parametrize(("store", "packed_px"), [("raw", 160), ("png", 120), ("jpeg", 0)])
def test_a_finding_is_drawn_where_its_packed_and_resized_box_says(tmp_path: Path, store: str, packed_px: int) -> None:
    """Where a phantom with a mass differs from the same one without, on the network's 128 px."""
    (tmp_path / "images").mkdir()
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    for index in (1, 2, 3):
        for kind, findings in (("with", {"Mass"}), ("without", set())):
            image, boxes = cropped_phantom(index, findings)
            name = f"{index}{kind}.png"
            assert cv2.imwrite(str(tmp_path / "images" / name), image)
            # NIH's table of boxes has its own name for the finding that the labels call Infiltration
            lines += [f"{name},Infiltrate,{box.x},{box.y},{box.w},{box.h},," for box in boxes]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    (tmp_path / "test.txt").write_text(
        "".join(f"{index}{kind}.png\n" for index in (1, 2) for kind in ("with", "without"))
    )
    done = run_command(
        *("shard_cxr14.py", "pack", tmp_path / "images", "--out", tmp_path / "set", "--store", store),
        *("--size", packed_px, "--boxes", tmp_path / "boxes.csv", "--test-list", tmp_path / "test.txt"),
    )
    assert done.returncode == 0, done.stderr
    shard_set = ShardSet.open(tmp_path / "set")
    marked = {one.key: one for one in read_marked(shard_set, "test", ("Mass", "Infiltration"), 128)}
    assert {(one.key, one.finding) for one in marked.values()} == {("1with", "Infiltration"), ("2with", "Infiltration")}
    for index in (1, 2):
        one = marked[f"{index}with"]
        meta_of = {key: (meta, data) for key, meta, data in shard_set.read_samples("test")}
        plain = network_image(shard_set, *meta_of[f"{index}without"])
        difference = np.abs(one.image.astype(int) - plain) > 12
        y, x = np.nonzero(difference)
        drawn = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert len(one.boxes) == 1
        np.testing.assert_allclose(one.boxes[0], drawn, atol=4)  # a mass fades towards its border
        np.testing.assert_allclose(
            one.boxes[0][:2] + one.boxes[0][2:], drawn[:2] + drawn[2:], atol=2
        )  # twice its middle
        assert np.ptp(drawn) > 8
        (box,) = cropped_phantom(index, {"Mass"})[1]
        np.testing.assert_allclose(box_in_original(one.boxes[0], one.meta, 128), box[1:], atol=1e-9)


def network_image(shard_set: ShardSet, meta: dict, data: bytes) -> np.ndarray:
    """The stored image at 128 px, without the code under test."""
    width_px, height_px = meta["stored_size_px"]
    if shard_set.store == "raw":
        stored = np.frombuffer(data, np.uint8).reshape(height_px, width_px)
    else:
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    return cv2.resize(stored, (128, 128), interpolation=cv2.INTER_AREA).astype(int)


def test_a_box_takes_the_way_of_a_padded_and_scaled_radiograph() -> None:
    meta = {"stored_size_px": [100, 100], "scale": [0.1, 0.1], "offset_px": [0, 20]}  # 1000 x 600 px, padded by 20
    box = {"x": 100, "y": 200, "w": 300, "h": 50}
    mapped = box_in_px(box, meta, 200)
    assert mapped == pytest.approx([20, 80, 80, 90])
    assert box_in_original(mapped, meta, 200) == pytest.approx([100, 200, 300, 50])


def heatmap_at(*spots: tuple[int, int, float, float]) -> np.ndarray:
    """Gaussians at (x, y) of a width and a height, on 100 x 100 px, as large as 1 together."""
    y, x = np.mgrid[:100, :100]
    heat = sum(top * np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * sigma**2)) for u, v, sigma, top in spots)
    return (heat / heat.max()).astype(np.float32)


def test_the_region_is_the_largest_and_its_box_as_wide_as_the_threshold_says() -> None:
    heat = heatmap_at((30, 60, 6, 0.8), (80, 20, 2, 1))
    for threshold in (0.15, 0.5):
        radius = 6 * np.sqrt(-2 * np.log(threshold / 0.8))
        expected = np.array([30 - radius, 60 - radius, 30 + radius, 60 + radius]) + 0.5  # its pixel's middle
        np.testing.assert_allclose(region_box(heat, threshold), expected, atol=1)


def test_pointing_takes_the_maximum_and_overlap_the_best_box() -> None:
    heat = heatmap_at((30, 60, 6, 0.8), (80, 20, 2, 1))
    around_maximum, around_region, elsewhere = [75, 15, 85, 25], [18, 48, 43, 73], [0, 0, 10, 10]
    box = region_box(heat, 0.15)
    for boxes, is_pointed_at in (
        ([around_maximum], True),
        ([around_region], False),
        ([elsewhere, around_maximum], True),
        ([elsewhere, around_region], False),
    ):
        found = judge(heat, np.array(boxes, float), 0.15)
        assert found.is_pointed_at is is_pointed_at
        np.testing.assert_array_equal(found.box, box)
        assert found.iou == pytest.approx(max(iou_of(box, np.array(other)) for other in boxes))
    assert judge(heat, np.array([around_region], float), 0.15).iou > 0.5


def test_a_heatmap_of_nothing_finds_nothing() -> None:
    assert judge(np.zeros((9, 9), np.float32), np.array([[0.0, 0, 9, 9]]), 0.15) == Found(
        None, 0.0, is_pointed_at=False
    )


def classifier(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier("resnet18", len(FINDINGS)).eval()


def activations(network: Classifier, images: Tensor) -> Tensor:
    seen = []
    handle = network.layer4.register_forward_hook(lambda *call: seen.append(call[-1]))
    network(images)
    handle.remove()
    return seen[0].detach()


def test_heatmaps_are_the_class_activation_maps_that_grad_cam_is_for_pooled_classifiers() -> None:
    """Behind average pooling, Grad-CAM is CAM: activations weighted by the class's weights (arXiv 1610.02391, 3.1)."""
    network, rng = classifier(), np.random.default_rng(0)
    chosen = ("Nodule", "Cardiomegaly", "Mass")
    batch = [Marked(name, name, rng.integers(0, 256, (128, 128), np.uint8), np.zeros((1, 4)), {}) for name in chosen]
    found = heatmaps(SavedClassifier(network, FINDINGS, 128), batch, CPU)
    assert found.shape == (3, 128, 128)
    for one, heatmap in zip(batch, found, strict=True):
        maps = activations(network, torch.from_numpy(one.image)[None, None])[0]
        weights = network.fc.weight[FINDINGS.index(one.finding)].detach()
        cam = (maps * weights[:, None, None]).sum(0).clamp(min=0).double().numpy()
        assert cam.max() > 0
        cam = cv2.resize((cam - cam.min()) / (cam.max() - cam.min()), (128, 128))
        np.testing.assert_allclose(heatmap, (cam - cam.min()) / (cam.max() - cam.min()), atol=1e-4)


def test_scores_are_shares_of_each_finding_and_their_mean_over_the_findings() -> None:
    def one(finding: str) -> Marked:
        return Marked("key", finding, np.zeros((8, 8), np.uint8), np.zeros((1, 4)), {})

    marked = [one("Mass"), one("Mass"), one("Mass"), one("Mass"), one("Nodule")]
    box = np.zeros(4)
    found = [Found(box, 0.75, True), Found(box, 0.3, True), Found(box, 0.1, False), Found(None, 0.0, False)]
    results = summarise(marked, [*found, Found(box, 0.5, is_pointed_at=True)])
    mass, nodule, mean = results["findings"]["Mass"], results["findings"]["Nodule"], results["mean"]
    assert [mass[f"accuracy_at_0.{i}"] for i in range(1, 8)] == [0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert [nodule[f"accuracy_at_0.{i}"] for i in range(1, 8)] == [1, 1, 1, 1, 1, 0, 0]
    assert (mass["num"], mass["pointing_game"], nodule["pointing_game"]) == (4, 0.5, 1)
    assert mean["accuracy_at_0.1"] == pytest.approx((0.75 + 1) / 2)
    assert mean["iou"] == pytest.approx(((0.75 + 0.3 + 0.1) / 4 + 0.5) / 2)
    assert results["num_without_heatmap"] == 1
    *_, last = format_table(results).splitlines()
    assert last.split() == ["mean", "75.0", "39.4", "87.5", "75.0", "75.0", "62.5", "62.5", "12.5", "12.5"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learnt nothing."""
    path = tmp_path_factory.mktemp("weights") / "classifier.pt"
    save_classifier(path, classifier(), FINDINGS, 64)
    return path


def test_what_is_written_agrees_with_the_boxes_as_they_were_given(
    shard_folder: Path, weights: Path, tmp_path: Path
) -> None:
    options = {"split": "train", "batch_size": 3, "device": "cpu"}
    results = localize(LocalizeSettings(str(shard_folder), str(weights), str(tmp_path), **options))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    of_split = {meta["name"] for _, meta, _ in ShardSet.open(shard_folder).read_samples("train")}
    boxes = {}
    with (shard_folder.parent / "BBox_List_2017.csv").open() as file:
        for name, finding, x, y, w, h in list(csv.reader(file))[1:]:
            box = np.array([x, y, w, h], float)
            if name in of_split:
                boxes.setdefault((name.removesuffix(".png"), finding), []).append([*box[:2], *(box[:2] + box[2:])])
    with (tmp_path / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert {(row["image"], row["finding"]) for row in rows} == boxes.keys()
    assert max(map(len, boxes.values())) > 1
    assert all(int(row["num_boxes"]) == len(boxes[row["image"], row["finding"]]) for row in rows)
    assert len(rows) == len(boxes)
    for row in rows:
        truths = np.array(boxes[row["image"], row["finding"]])
        x, y, w, h = (float(row[name]) for name in "xywh")
        iou = max(iou_of(np.array([x, y, x + w, y + h]), truth) for truth in truths)
        assert float(row["iou"]) == pytest.approx(iou, abs=0.01)
        picture = cv2.imread(str(tmp_path / "overlays" / f"{row['image']}-{row['finding']}.png"))
        assert picture.shape == (448, 448, 3)
    for finding, scores in results["findings"].items():
        own = [row for row in rows if row["finding"] == finding]
        assert scores["num"] == len(own)
        assert scores["pointing_game"] == pytest.approx(np.mean([int(row["is_pointed_at"]) for row in own]))
        assert scores["accuracy_at_0.1"] == pytest.approx(np.mean([float(row["iou"]) >= 0.1 for row in own]))


def test_sets_and_classifiers_that_do_not_serve_are_refused(
    shard_folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"run_dir": str(tmp_path / "run"), "device": "cpu"}
    stranger = tmp_path / "stranger.pt"
    save_classifier(stranger, classifier(), ("Hernia", "Mass", "a", "b", "c"), 64)
    localize(LocalizeSettings(str(shard_folder), str(stranger), **options))
    assert (
        "left out, as the classifier doesn't know them: boxes of Effusion, Nodule, Pneumothorax\n"
        in capsys.readouterr().out
    )
    save_classifier(stranger, classifier(), ("Hernia", "a", "b", "c", "d"), 64)
    with pytest.raises(UserError, match=f"{shard_folder}: its test split has no boxes of Hernia"):
        localize(LocalizeSettings(str(shard_folder), str(stranger), **options))
    with pytest.raises(UserError, match="has no split 'tset'"):
        localize(LocalizeSettings(str(shard_folder), str(weights), str(tmp_path / "other"), "tset"))
    torch.save({"conv1.weight": torch.zeros(1)}, stranger)
    with pytest.raises(UserError, match=r"stranger\.pt: no fine-tuned classifier"):
        localize(LocalizeSettings(str(shard_folder), str(stranger), **options))
    for changes in ({"threshold": 0.0}, {"threshold": 1.0}, {"batch_size": 0}, {"size": 16}):
        with pytest.raises(UsageError):
            LocalizeSettings(str(shard_folder), str(weights), **changes)
