from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from errors import UsageError, UserError
from pipeline.plan import PackSettings, Plan, Sample, plan_samples
from pipeline.sources import NIH_LABELS, Box, ImageRef


def refs(*paths: str, root: str = "images") -> list[ImageRef]:
    return [ImageRef(Path(root), path, 1) for path in paths]


def plan(images: Sequence[ImageRef], **options: Any) -> Plan:
    return plan_samples(images, PackSettings(images=(Path("images"),), out=Path("out"), **options))


def by_path(planned: Plan) -> dict[str, Sample]:
    return {sample.image.path: sample for samples in planned.splits.values() for sample in samples}


def nih(num_patients: int, num_followups: int = 3) -> list[ImageRef]:
    return refs(*(f"{p:08d}_{f:03d}.png" for p in range(num_patients) for f in range(num_followups)))


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


# --- keys -----------------------------------------------------------------------------------------------------------


def test_key_is_the_stem_where_that_is_unique_and_else_the_path() -> None:
    samples = by_path(plan(refs("a/b.c.png", "p1/view.png", "p2/s.1/view.jpg")))
    assert {path: sample.key for path, sample in samples.items()} == {
        "a/b.c.png": "b_c",
        "p1/view.png": "p1__view",
        "p2/s.1/view.jpg": "p2__s_1__view",
    }


def test_key_has_neither_dots_nor_spaces_nor_more_than_a_tar_name_holds() -> None:
    samples = by_path(
        plan(refs("ü b\t(1).png", "x" * 300 + "1.png", "x" * 300 + "2.png", "é" * 80 + ".png", "\udcff.png"))
    )
    keys = [sample.key for sample in samples.values()]
    assert samples["ü b\t(1).png"].key == "ü_b__1_"
    assert len(set(keys)) == 5
    assert all(len(f"{key}.json".encode()) <= 100 and not set(key) & set(". \t\n/") for key in keys)


@pytest.mark.parametrize(
    "images",
    [
        refs("x.png", "x.jpg"),
        refs("a.b.png", "a_b.png"),
        refs("sub/x.png") + refs("sub/x.png", root="again"),
    ],
)
def test_two_images_with_one_key_are_both_named(images: list[ImageRef]) -> None:
    with pytest.raises(UserError) as error:
        plan(images)
    assert all(str(image) in str(error.value) for image in images)


# --- patients -------------------------------------------------------------------------------------------------------


def test_patient_comes_from_nih_chexpert_and_mimic_names() -> None:
    paths = {
        "images/00000013_026.png": "13",
        "train/patient00042/study1/view1_frontal.jpg": "patient00042",
        "files/p10/p10000032/s50414267/02aa804e.jpg": "p10000032",
        "scan.png": "scan",
    }
    assert {path: sample.patient for path, sample in by_path(plan(refs(*paths))).items()} == paths


def test_patient_folder_may_be_what_was_given() -> None:
    samples = plan(refs("study1/a.jpg", "study2/b.jpg", root="data/patient7") + refs("study1/c.jpg", root="patient8"))
    assert {sample.patient for sample in by_path(samples).values()} == {"patient7", "patient8"}


def test_table_of_labels_knows_the_patient_better(tmp_path: Path) -> None:
    labels = write(tmp_path / "l.csv", "Image Index,Finding Labels,Patient ID", "1_0.png,Mass,0042", "x.png,Mass,")
    samples = by_path(plan(refs("1_0.png", "x.png"), labels=labels))
    assert samples["1_0.png"].patient == "42"
    assert samples["x.png"].patient == "x"


# --- splits ---------------------------------------------------------------------------------------------------------


def split_of_patients(planned: Plan) -> dict[str, set[str]]:
    found = defaultdict(set)
    for sample in by_path(planned).values():
        found[sample.patient].add(sample.split)
    return found


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_validation_takes_exactly_its_fraction_of_the_patients_and_all_their_images(seed: int) -> None:
    planned = plan(nih(40), val_fraction=0.25, seed=seed)
    splits = split_of_patients(planned)
    assert all(len(found) == 1 for found in splits.values())
    assert sum(found == {"val"} for found in splits.values()) == 10
    assert {split: len(samples) for split, samples in planned.splits.items()} == {"train": 90, "val": 30}


def test_choice_of_validation_patients_depends_on_seed_alone() -> None:
    images = nih(40)
    chosen = [plan(images, seed=seed).splits["val"] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] == plan(images[::-1], seed=0).splits["val"]
    assert {sample.patient for sample in chosen[0]} != {sample.patient for sample in chosen[2]}


def test_validation_gets_a_patient_as_soon_as_there_are_two() -> None:
    assert plan(nih(2, 1), val_fraction=0.01).splits.keys() == {"train", "val"}
    assert plan(nih(2, 1), val_fraction=0.99).splits.keys() == {"train", "val"}
    assert plan(nih(2, 1), val_fraction=0).splits.keys() == {"train"}
    assert plan(nih(1, 4)).splits.keys() == {"train"}


def test_order_is_shuffled_by_seed_and_independent_of_the_input_order() -> None:
    images = nih(100, 1)
    orders = [
        [s.key for s in plan(i, val_fraction=0, seed=seed).splits["train"]]
        for i, seed in [(images, 0), (images[::-1], 0), (images, 1)]
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [image.path.removesuffix(".png") for image in images]
    in_order = sum(a < b for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert 35 < in_order < 65  # about half of all neighbours are in order by chance: binomial, sd 3 (for permutations)


def test_explicit_lists_are_followed_and_the_rest_is_left_out(tmp_path: Path) -> None:
    images = nih(4, 1)
    planned = plan(
        images,
        train_list=write(tmp_path / "a", images[0].path, images[2].path),
        val_list=write(tmp_path / "b", images[1].path),
    )
    assert {path: sample.split for path, sample in by_path(planned).items()} == {
        images[0].path: "train",
        images[2].path: "train",
        images[1].path: "val",
    }
    assert planned.num_left_out == 1


def test_test_list_alone_leaves_the_rest_for_training_and_validation(tmp_path: Path) -> None:
    planned = plan(nih(10), test_list=write(tmp_path / "t", *(image.path for image in nih(3))))
    assert Counter(sample.split for sample in by_path(planned).values()) == {"train": 18, "val": 3, "test": 9}
    assert planned.num_left_out == 0


def test_train_val_list_is_divided_and_the_rest_left_out(tmp_path: Path) -> None:
    listed = write(tmp_path / "tv", *(image.path for image in nih(8)))
    planned = plan(nih(10), train_val_list=listed, val_fraction=0.25)
    assert Counter(sample.split for sample in by_path(planned).values()) == {"train": 18, "val": 6}
    assert planned.num_left_out == 6


def test_names_in_lists_may_be_paths_where_file_names_are_not_enough(tmp_path: Path) -> None:
    images = refs("p1/v.png", "p2/v.png", "p3/w.png")
    planned = plan(images, train_list=write(tmp_path / "l", "p2/v.png", "elsewhere/w.png"))
    assert by_path(planned).keys() == {"p2/v.png", "p3/w.png"}
    with pytest.raises(UserError, match=r"v.png could be images/p1/v.png or images/p2/v.png"):
        plan(images, train_list=write(tmp_path / "l", "v.png"))


def test_unknown_names_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    listed = write(tmp_path / "l", "gone1.png", nih(1)[0].path, "gone2.png", "gone3.png", "gone4.png")
    with pytest.raises(UserError, match=r"l: names 4 images \(gone1.png, gone2.png, gone3.png, \.\.\.\) not found"):
        plan(nih(2), train_list=listed)


def test_image_in_two_lists_is_refused(tmp_path: Path) -> None:
    one = nih(1)[0].path
    with pytest.raises(UserError, match=f"1 image .{one}. in more than one list"):
        plan(nih(2), train_list=write(tmp_path / "a", one), test_list=write(tmp_path / "b", one))


def test_patient_in_two_splits_is_refused_whichever_lists_say_so(tmp_path: Path) -> None:
    first, second, *_ = (image.path for image in nih(2))
    lists = {"train_list": write(tmp_path / "a", first), "val_list": write(tmp_path / "b", second)}
    with pytest.raises(UserError, match=r"1 patient \(0 \(train, val\)\) in more than one split"):
        plan(nih(2), **lists)
    with pytest.raises(UserError, match="1 patient"):
        plan(nih(2), test_list=lists["train_list"])


def test_lists_that_leave_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image to train on"):
        plan(nih(2), test_list=write(tmp_path / "t", *(image.path for image in nih(2))))


# --- labels and boxes -----------------------------------------------------------------------------------------------


def test_labels_in_lists_count_only_without_a_table(tmp_path: Path) -> None:
    images = nih(2, 1)
    listed = write(tmp_path / "l", f"{images[0].path} " + " ".join("1" * 14), images[1].path)
    planned = plan(images, train_list=listed)
    assert planned.label_names == NIH_LABELS
    assert {path: sample.labels for path, sample in by_path(planned).items()} == {
        images[0].path: (1,) * 14,
        images[1].path: None,
    }
    table = write(tmp_path / "t", "Image Index,Finding Labels", *(f"{image.path},Mass" for image in images))
    assert {sample.labels[4] for sample in by_path(plan(images, train_list=listed, labels=table)).values()} == {1}


def test_without_any_labels_there_are_no_label_names() -> None:
    planned = plan(nih(2))
    assert planned.label_names == ()
    assert {sample.labels for sample in by_path(planned).values()} == {None}


def test_images_without_a_row_are_refused_unless_they_are_left_out(tmp_path: Path) -> None:
    images = nih(3, 1)
    table = write(tmp_path / "t", "Image Index,Finding Labels", f"{images[0].path},Mass", "unrelated.png,Mass")
    with pytest.raises(UserError, match=r"no labels for 2 images \(00000001_000.png, 00000002_000.png\)"):
        plan(images, labels=table)
    assert len(by_path(plan(images, labels=table, train_list=write(tmp_path / "l", images[0].path)))) == 1


def test_boxes_go_to_their_images(tmp_path: Path) -> None:
    images = nih(2, 1)
    rows = [f"{images[1].path},Mass,1,2,3,4", f"{images[1].path},Edema,5,6,7,8", "unrelated.png,Mass,1,2,3,4"]
    samples = by_path(plan(images, boxes=write(tmp_path / "b", "Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows)))
    assert samples[images[0].path].boxes == ()
    assert samples[images[1].path].boxes == (Box("Mass", 1, 2, 3, 4), Box("Edema", 5, 6, 7, 8))


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"images": ()},
        {"store": "raw", "size_px": 0},
        {"size_px": 16},
        {"quality": 0},
        {"val_fraction": 1.0},
        {"samples_per_shard": 0},
        {"workers": 0},
        {"max_rejected": -1},
        {"train_val_list": Path("a"), "train_list": Path("b")},
        {"val_list": Path("a")},
    ],
)
def test_settings_that_make_no_sense_are_bad_usage(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PackSettings(**({"images": (Path("i"),), "out": Path("o")} | options))
