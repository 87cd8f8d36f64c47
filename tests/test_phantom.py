import csv
import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from errors import UserError
from pipeline.phantom import FINDING_RATES, Canvas, Phantom, draw_phantom, spline, write_phantoms

REPOSITORY = Path(__file__).parents[1]
CHESTXRAY14_LABELS = {
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
}


@pytest.fixture(scope="module")
def crowd() -> list[Phantom]:
    """One small phantom each of many patients."""
    return [draw_phantom(7, index, 64) for index in range(400)]


@pytest.fixture(scope="module")
def healthy() -> list[Phantom]:
    return [draw_phantom(7, index, 128, findings=set()) for index in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "new" / "set"
    write_phantoms(out, num_images=40, size_px=64, seed=3, num_threads=1)
    return out


def as_bytes(phantom: Phantom) -> bytes:
    return phantom.image.tobytes() + phantom.lung_mask.tobytes() + repr((phantom.labels, phantom.boxes)).encode()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def shrunk(image: np.ndarray, size_px: int) -> np.ndarray:
    return cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA)


def central_gap_px(row: np.ndarray) -> tuple[int, int]:
    """First and last column between the two lungs in a row of a mask that holds both."""
    columns = np.flatnonzero(row)
    widest = np.diff(columns).argmax()
    return columns[widest] + 1, columns[widest + 1] - 1


def rows_with_both_lungs(mask: np.ndarray, upper: float, lower: float) -> np.ndarray:
    """The rows of a mask between two shares of the lungs' height."""
    rows = np.flatnonzero(mask.any(axis=1))
    return mask[int(rows[0] + upper * len(rows)) : int(rows[0] + lower * len(rows))]


def read_table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def read_folder(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_phantom_is_the_same_whatever_was_drawn_before_or_beside_it() -> None:
    requests = [*itertools.product((0, 11), range(6), (48, 224))]
    in_order = {request: as_bytes(draw_phantom(*request)) for request in requests}
    random.Random(0).shuffle(requests)
    with ThreadPoolExecutor(4) as pool:
        beside = dict(zip(requests, pool.map(lambda request: as_bytes(draw_phantom(*request)), requests), strict=True))
    assert beside == in_order


def test_a_phantom_is_the_same_on_a_processor_without_wide_vectors() -> None:
    command = (
        "import hashlib; from tests.test_phantom import *;"
        "drawn = [as_bytes(draw_phantom(2, index, size_px)) for index in range(6) for size_px in (64, 300)];"
        "print(hashlib.sha256(b''.join(drawn)).hexdigest())"
    )
    narrow = {
        "OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,AVX,FP16,SSSE3",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX2 FMA3 X86_V3 X86_V4",
    }
    hashes = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", command],
            env={**os.environ, **extra},
            cwd=REPOSITORY,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for extra in ({}, narrow)
    ]
    assert hashes[0] == hashes[1] != ""


def test_another_seed_index_or_followup_is_another_image() -> None:
    images = [draw_phantom(*request).image.tobytes() for request in ((0, 0, 64), (1, 0, 64), (0, 1, 64), (0, 0, 64, 1))]
    assert len(set(images)) == 4


@pytest.mark.parametrize("size_px", [64, 96, 224, 1024])
def test_another_size_is_the_same_patient(size_px: int) -> None:
    everything = set(FINDING_RATES)
    for index in range(2):
        small, large = sorted(
            (draw_phantom(4, index, size, findings=everything) for size in (size_px, 512)), key=lambda p: p.image.size
        )
        side_px = len(small.image)
        scale = len(large.image) / side_px
        assert correlation(small.image, shrunk(large.image, side_px)) > 0.995
        stranger = draw_phantom(4, index + 2, side_px, findings=everything)
        assert correlation(stranger.image, shrunk(large.image, side_px)) < 0.97
        large_mask = shrunk(large.lung_mask, side_px) > 127
        overlap = (large_mask & (small.lung_mask > 0)).sum() / (large_mask | (small.lung_mask > 0)).sum()
        assert overlap > 0.95
        assert small.labels == large.labels
        assert [box.finding for box in small.boxes] == [box.finding for box in large.boxes]
        corners = [[(b.x, b.y, b.x + b.w, b.y + b.h) for b in phantom.boxes] for phantom in (small, large)]
        assert np.abs(np.array(corners[0]) * scale - corners[1]).max() < 2.5 * scale


def test_arrays_have_the_promised_types_and_values(crowd: list[Phantom]) -> None:
    for phantom in crowd:
        assert phantom.image.dtype == phantom.lung_mask.dtype == np.uint8
        assert phantom.image.shape == phantom.lung_mask.shape == (64, 64)
        assert set(np.unique(phantom.lung_mask)) == {0, 255}


def test_there_are_two_lungs_of_a_plausible_size(crowd: list[Phantom]) -> None:
    for phantom in crowd:
        count, _, stats, _ = cv2.connectedComponentsWithStats(phantom.lung_mask)
        areas = np.sort(stats[1:, cv2.CC_STAT_AREA])[::-1] / 64**2
        assert count >= 3
        assert 0.13 < areas[:2].sum() < 0.45
        assert areas[1] > 0.3 * areas[0], "the heart takes some of the left lung, never most of it"
        assert areas[2:].sum() < 0.005


def test_lungs_are_darker_than_what_lies_between_them(healthy: list[Phantom]) -> None:
    for phantom in healthy:
        lungs = phantom.image[phantom.lung_mask > 0].mean()
        between = []
        for row, mask in zip(phantom.image, phantom.lung_mask, strict=True):
            if np.diff(np.flatnonzero(mask)).max(initial=0) > 1:
                first, last = central_gap_px(mask)
                between.extend(row[first : last + 1])
        assert np.mean(between) - lungs > 50


def test_the_heart_points_to_the_patients_left(healthy: list[Phantom]) -> None:
    shifts_px = []
    for phantom in healthy:
        above, below = (
            np.mean([np.mean(central_gap_px(row)) for row in rows_with_both_lungs(phantom.lung_mask, *span)])
            for span in ((0.1, 0.25), (0.55, 0.7))
        )
        shifts_px.append(below - above)
    assert np.mean(shifts_px) > 1.5
    assert np.mean(np.array(shifts_px) > 0) > 0.8, "few are turned so far that it seems otherwise"


def test_greys_are_spread_like_a_radiographs() -> None:
    images = [draw_phantom(0, index, 128).image for index in range(40)]
    assert 120 < np.mean(images) < 170
    assert 45 < np.std(images) < 80
    dark, bright = np.percentile(images, [5, 95])
    assert dark < 40
    assert 200 < bright < 250


def test_png_files_of_1024_px_are_about_as_large_as_chestxray14s() -> None:
    sizes_kb = [len(cv2.imencode(".png", draw_phantom(0, index, 1024).image)[1]) / 1000 for index in range(4)]
    assert 270 < np.mean(sizes_kb) < 460, "theirs have 365 KB on average"


def test_labels_come_at_their_rates_and_independently(crowd: list[Phantom]) -> None:
    labels = np.array([[phantom.labels[name] for name in FINDING_RATES] for phantom in crowd])
    rates = np.array([*FINDING_RATES.values()])
    assert (np.abs(labels.mean(axis=0) - rates) < 4 * np.sqrt(rates * (1 - rates) / len(crowd))).all()
    between = np.corrcoef(labels.T)[np.triu_indices(len(rates), 1)]
    assert np.abs(between).max() < 4 / np.sqrt(len(crowd))


def test_boxes_are_there_for_exactly_the_labels_and_inside_the_image(crowd: list[Phantom]) -> None:
    for phantom in crowd:
        assert list(phantom.labels) == list(FINDING_RATES)
        assert {box.finding for box in phantom.boxes} == {name for name, label in phantom.labels.items() if label}
        counts = Counter(box.finding for box in phantom.boxes)
        assert counts.pop("Nodule", 1) in {1, 2, 3}
        assert set(counts.values()) <= {1}
        for box in phantom.boxes:
            assert box.w > 0 < box.h
            assert box.x >= 0 <= box.y
            assert box.x + box.w <= 64 >= box.y + box.h


@pytest.mark.parametrize("finding", FINDING_RATES)
def test_a_finding_changes_its_boxes_and_hardly_anything_else(finding: str, healthy: list[Phantom]) -> None:
    for index, without in enumerate(healthy):
        shown = draw_phantom(7, index, 128, findings={finding})
        change = shown.image.astype(int) - without.image
        inside = np.zeros_like(change, bool)
        for box in shown.boxes:
            window = np.s_[box.y : box.y + box.h, box.x : box.x + box.w]
            inside[window] = True
            assert np.abs(change[window]).max() >= 8, "it can be seen"
            if finding not in {"Cardiomegaly", "Pneumothorax"}:
                assert change[window].mean() > 0
        assert np.abs(change[~inside]).mean() < 0.1 * np.abs(change[inside]).mean()
        if finding != "Cardiomegaly":  # a heart's shadow is soft
            assert np.abs(change[inside]).sum() > 0.95 * np.abs(change).sum()
        if finding == "Pneumothorax":
            assert change[inside].mean() < 0
        if finding in {"Nodule", "Mass"}:
            assert all(0.6 < box.w / box.h < 1.7 for box in shown.boxes)
            assert (np.abs(change) >= 2)[inside].mean() > 0.4, "the box is no larger than it must be"


def test_only_an_enlarged_heart_changes_the_lung_mask(healthy: list[Phantom]) -> None:
    def ratio(mask: np.ndarray) -> float:
        """The heart's width over the chest's, between lung borders."""
        rows = rows_with_both_lungs(mask, 0.5, 0.8)
        gaps = [np.diff(central_gap_px(row))[0] for row in rows]
        return max(gaps) / max(np.ptp(np.flatnonzero(row)) for row in rows)

    growth = []
    for index, without in enumerate(healthy[:12]):
        other = draw_phantom(7, index, 128, findings=set(FINDING_RATES) - {"Cardiomegaly"})
        np.testing.assert_array_equal(other.lung_mask, without.lung_mask)
        enlarged = draw_phantom(7, index, 128, findings={"Cardiomegaly"})
        growth.append(ratio(enlarged.lung_mask) - ratio(without.lung_mask))
    assert min(growth) > 0
    assert np.mean(growth) > 0.06


def test_patients_differ_in_build_position_and_exposure(healthy: list[Phantom]) -> None:
    images = np.array([phantom.image for phantom in healthy], float)
    masks = np.array([phantom.lung_mask > 0 for phantom in healthy])
    areas, columns = masks.sum(axis=(1, 2)), [np.flatnonzero(mask.any(axis=0)) for mask in masks]
    assert areas.std() / areas.mean() > 0.06
    assert np.std([c.mean() for c in columns]) > 1
    assert images.mean(axis=(1, 2)).std() > 6
    assert max(correlation(a, b) for a, b in itertools.combinations(images, 2)) < 0.99


def test_followups_share_the_patients_anatomy() -> None:
    def detail(phantom: Phantom) -> np.ndarray:
        image = phantom.image.astype(np.float32)
        return image - cv2.GaussianBlur(image, (0, 0), 6)

    def likeness(fixed: Phantom, moving: Phantom) -> float:
        """Correlation of fine detail (ribs, vessels) after affine registration that starts from the lungs' boxes."""
        (x0, y0, w0, h0), (x1, y1, w1, h1) = (cv2.boundingRect(phantom.lung_mask) for phantom in (fixed, moving))
        start = np.array([[w1 / w0, 0, x1 - x0 * w1 / w0], [0, h1 / h0, y1 - y0 * h1 / h0]], np.float32)
        stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 60, 1e-4)
        return cv2.findTransformECC(detail(fixed), detail(moving), start, cv2.MOTION_AFFINE, stop, None, 9)[0]

    first, second = ([draw_phantom(8, patient, 192, visit, findings=set()) for patient in range(8)] for visit in (0, 1))
    of_one_patient = [likeness(*pair) for pair in zip(first, second, strict=True)]
    of_strangers = [likeness(*pair) for pair in zip(first, second[1:] + second[:1], strict=True)]
    assert min(of_one_patient) > max(of_strangers)


def test_a_folder_is_the_same_for_any_number_of_threads_and_starts_alike_for_any_number_of_images(
    folder: Path, tmp_path: Path
) -> None:
    write_phantoms(tmp_path / "threads", num_images=40, size_px=64, seed=3, num_threads=3)
    assert read_folder(tmp_path / "threads") == read_folder(folder)
    write_phantoms(tmp_path / "fewer", num_images=13, size_px=64, seed=3)
    for name in ("Data_Entry_2017.csv", "BBox_List_2017.csv"):
        assert (folder / name).read_text().startswith((tmp_path / "fewer" / name).read_text())


def test_a_folder_has_chestxray14s_layout(folder: Path) -> None:
    header, *entries = read_table(folder / "Data_Entry_2017.csv")
    assert ",".join(header) == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    names = [entry[0] for entry in entries]
    assert len(names) == len(set(names)) == 40
    assert {path.name for path in (folder / "images").iterdir()} == set(names)
    assert {path.name for path in (folder / "masks").iterdir()} == set(names)
    for name, labels, followup, patient, age, gender, view, width, height, *_ in entries:
        assert name == f"{int(patient):08d}_{int(followup):03d}.png"
        assert labels == "No Finding" or set(labels.split("|")) <= CHESTXRAY14_LABELS
        assert 18 <= int(age) < 90
        assert gender in {"F", "M"}
        assert view in {"PA", "AP"}
        assert width == height == "64"


def test_a_folder_holds_what_draw_phantom_draws(folder: Path) -> None:
    header, *boxes = read_table(folder / "BBox_List_2017.csv")
    assert ",".join(header) == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    for name, labels, followup, patient, *_ in read_table(folder / "Data_Entry_2017.csv")[1:]:
        phantom = draw_phantom(3, int(patient), 64, int(followup))
        image, mask = (cv2.imread(str(folder / kind / name), cv2.IMREAD_UNCHANGED) for kind in ("images", "masks"))
        np.testing.assert_array_equal(image, phantom.image)
        np.testing.assert_array_equal(mask, phantom.lung_mask)
        assert [label for label in labels.split("|") if label != "No Finding"] == [
            label for label, present in phantom.labels.items() if present
        ]
        assert [row[1:] for row in boxes if row[0] == name] == [[str(field) for field in box] for box in phantom.boxes]


def test_followups_count_up_from_zero_within_a_patient_who_keeps_age_and_gender(folder: Path) -> None:
    entries = read_table(folder / "Data_Entry_2017.csv")[1:]
    lengths = []
    for _, group in itertools.groupby(entries, key=lambda entry: entry[3]):
        visits = list(group)
        lengths.append(len(visits))
        assert [int(visit[2]) for visit in visits] == list(range(len(visits)))
        assert len({(visit[4], visit[5]) for visit in visits}) == 1
    assert set(lengths) == {1, 2, 3}


def test_lists_split_the_images_by_patient(folder: Path, tmp_path: Path) -> None:
    names = [entry[0] for entry in read_table(folder / "Data_Entry_2017.csv")[1:]]
    train, test = ((folder / f"{name}_list.txt").read_text().splitlines() for name in ("train_val", "test"))
    assert sorted(train + test) == sorted(names)
    assert test
    assert not {name[:8] for name in train} & {name[:8] for name in test}
    write_phantoms(tmp_path / "many", num_images=70, size_px=32, images_per_patient=(1, 1))
    assert len((tmp_path / "many" / "test_list.txt").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    "arguments",
    [{"num_images": 0}, {"size_px": 31}, {"seed": -1}, {"images_per_patient": (0, 2)}, {"images_per_patient": (3, 2)}],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(arguments: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="phantoms: "):
        write_phantoms(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_folder_once_and_never_into_one_that_is_in_use(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.phantom", tmp_path / "out", "--num-images", "3", "--size-px", "32"]
    first, second = (
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False, text=True) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3
    assert second.returncode == 1
    assert second.stderr.splitlines() == [f"error: {tmp_path / 'out'}: is there already; name a new folder"]


@pytest.mark.parametrize("width_px", [0.5, 1.0, 2.0, 5.0, 12.0])
def test_a_stroke_has_the_area_of_its_width(width_px: float) -> None:
    canvas = Canvas(200, np.random.default_rng(0))
    canvas.linear, canvas.middle = np.eye(2), np.array([0.5, 0.5])
    areas_px = []
    for angle in np.linspace(0.1, 3, 15):
        line = np.linspace(-0.4, 0.4, 9)[:, None] * [np.cos(angle), np.sin(angle)] + 0.5
        areas_px.append(canvas.stroke(line[None], width_px / 200).sum() / 255)
    assert np.mean(areas_px) == pytest.approx(160 * width_px, rel=0.12)


def test_soften_spreads_like_a_gaussian_of_its_sigma() -> None:
    canvas = Canvas(256, np.random.default_rng(0))
    block = np.zeros((256, 256), np.uint8)
    block[96:160, 96:160] = 255
    for sigma in (0.005, 0.02, 0.05):
        difference = cv2.GaussianBlur(block.astype(float), (0, 0), sigma * 256) - canvas.soften(block, sigma)
        assert np.abs(difference).max() < 0.06 * 255


def test_a_spline_goes_through_its_knots() -> None:
    knots = np.random.default_rng(0).random((7, 2))
    curve = spline(knots)
    np.testing.assert_allclose(curve[::6], knots)
    assert (
        np.linalg.norm(np.diff(curve, axis=0), axis=1).max()
        < 0.5 * np.linalg.norm(np.diff(knots, axis=0), axis=1).max()
    )
