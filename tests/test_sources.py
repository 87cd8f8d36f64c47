import io
import os
import tarfile
from pathlib import Path

import pytest

from errors import UserError
from pipeline.sources import NIH_LABELS, Box, find_images, read_boxes, read_image, read_labels, read_list, stream_images

NAMES = ("b.png", "a/c.JPG", "a/deep/er/d.e.jpeg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files that count, by their names, as images, among others that do not."""
    folder = tmp_path / "images"
    for name in (*NAMES, "a/._c.JPG", ".hidden/x.png", "notes.txt", "a/png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    return folder


def make_tar(path: Path, folder: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname=".")
    return path


def contents(root: Path) -> dict[str, bytes]:
    images = find_images([root])
    if images[0].is_streamed:
        return dict(stream_images(root, {image.path for image in images}))
    return {image.path: read_image(image) for image in images}


def test_folder_is_searched_all_the_way_down_past_hidden_files(folder: Path) -> None:
    assert contents(folder) == {name: name.encode() * 100 for name in NAMES}


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("y.tar.gz", "w")])
def test_archive_holds_what_the_folder_holds(folder: Path, tmp_path: Path, name: str, mode: str) -> None:
    archive = make_tar(tmp_path / name, folder, mode)
    assert contents(archive) == contents(folder)
    assert {image.path: image.num_bytes for image in find_images([archive])} == {n: 100 * len(n) for n in NAMES}


def test_only_some_of_a_stream_can_be_asked_for(folder: Path, tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "x.tar.gz", folder, "w:gz")
    assert list(stream_images(archive, {"b.png"})) == [("b.png", b"b.png" * 100)]


def test_roots_keep_their_order_and_each_is_sorted(folder: Path, tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "x.tar", folder, "w")
    found = [(image.root, image.path) for image in find_images([folder, archive])]
    assert found == [(root, name) for root in (folder, archive) for name in sorted(NAMES)]


def test_links_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.png").write_bytes(b"1")
    (folder / "there").symlink_to(elsewhere)
    (folder / "a" / "back").symlink_to(folder)
    assert {image.path for image in find_images([folder])} == {*NAMES, "there/linked.png"}


def test_what_is_no_file_is_listed_with_a_refusal(folder: Path) -> None:
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    refused = {image.path for image in find_images([folder]) if image.refusal}
    assert refused == {"gone.png", "pipe.png"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_odd_members_of_an_archive_are_listed_with_a_refusal(tmp_path: Path, mode: str) -> None:
    archive = tmp_path / "odd.tar.gz"
    odd = {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "dev.png": tarfile.BLKTYPE}
    odd |= {"/etc/x.png": tarfile.REGTYPE, "a/../../x.png": tarfile.REGTYPE}
    with tarfile.open(archive, mode) as tar:
        for name, kind in {**odd, "good.png": tarfile.REGTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info)
    images = find_images([archive])
    assert {image.path for image in images if image.refusal} == odd.keys()
    assert {image.path for image in images if not image.refusal} == {"good.png"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_archive_cut_short_is_an_error(folder: Path, tmp_path: Path, mode: str, keep: float) -> None:
    for i in range(50):
        (folder / f"{i}.png").write_bytes(os.urandom(3000))
    archive = make_tar(tmp_path / "x.tar.gz", folder, mode)
    archive.write_bytes(archive.read_bytes()[: int(keep * archive.stat().st_size)])
    with pytest.raises(UserError, match=r"x\.tar\.gz: (damaged or cut short|cannot be read)"):
        find_images([archive])


def test_damaged_header_in_the_middle_of_a_tar_is_an_error_not_its_end(folder: Path, tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "x.tar", folder, "w")
    with tarfile.open(archive) as tar:
        second = [member.offset for member in tar if member.isreg()][1]
    content = bytearray(archive.read_bytes())
    content[second] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match="damaged or cut short"):
        find_images([archive])


def test_listing_of_a_compressed_archive_is_used_again_until_the_archive_changes(folder: Path, tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "x.tar.gz", folder, "w:gz")
    listings: dict[str, list] = {}
    first = find_images([archive], listings)
    before = archive.stat()
    archive.write_bytes(b"\x1f\x8b".ljust(before.st_size))
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_images([archive], listings) == first
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(UserError):
        find_images([archive], listings)


@pytest.mark.parametrize(
    ("root", "reason"),
    [("gone", "does not exist"), ("empty", "no PNG or JPEG images"), ("notes.txt", "neither a folder nor")],
)
def test_unusable_root_is_named(tmp_path: Path, root: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=reason) as error:
        find_images([tmp_path / root])
    assert str(tmp_path / root) in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_unreadable_folder_is_named(folder: Path) -> None:
    (folder / "a").chmod(0)
    try:
        with pytest.raises(UserError, match="images/a: cannot be read"):
            find_images([folder])
    finally:
        (folder / "a").chmod(0o755)


def test_list_may_have_labels_blank_lines_bom_and_no_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    vector = (0, 1) * 7
    path.write_bytes("\ufeffa.png\r\n\r\n  b 1.png \r\nc.png 0 1 0 1 0 1 0 1 0 1 0 1 0 1\r\nd.png".encode())
    assert read_list(path) == {"a.png": None, "b 1.png": None, "c.png": vector, "d.png": None}


def test_list_with_another_number_of_labels_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a.png\nb.png 0 1 0\n")
    with pytest.raises(UserError, match=r"list.txt:2: 3 labels"):
        read_list(path)


@pytest.mark.parametrize(("content", "reason"), [(b"\n \n", "names no image"), (b"\xff\xfe\x00", "UTF-8")])
def test_unusable_list_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"list.txt: .*{reason}"):
        read_list(path)
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        read_list(tmp_path / "gone.txt")


NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n"
)


def test_nih_labels_come_in_nih_order(tmp_path: Path) -> None:
    path = tmp_path / "entry.csv"
    rows = "00000004_000.png,Mass|Nodule,0,4,82,M,AP,2500,2048,0.168,0.168\nx.png,No Finding,0,17,1,F,PA,1,1,1,1\n"
    path.write_text(NIH_HEADER + rows)
    table = read_labels(path)
    assert table.label_names == NIH_LABELS
    assert [NIH_LABELS[i] for i, present in enumerate(table.labels["00000004_000.png"]) if present] == [
        "Mass",
        "Nodule",
    ]
    assert table.labels["x.png"] == (0,) * 14
    assert table.patients == {"00000004_000.png": "4", "x.png": "17"}


def test_other_findings_make_their_own_sorted_label_names(tmp_path: Path) -> None:
    path = tmp_path / "entry.csv"
    path.write_text("Image Index,Finding Labels\na.png,Zeta|Mass\nb.png,Alpha\n")
    table = read_labels(path)
    assert table.label_names == ("Alpha", "Mass", "Zeta")
    assert table.labels == {"a.png": (0, 1, 1), "b.png": (1, 0, 0)}
    assert table.patients == {}


def test_unusable_labels_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "entry.csv"
    for content, reason in {
        "a,b\n": "entry.csv: has no column 'Image Index'",
        "Image Index,Finding Labels\na.png\n": "entry.csv:2: the row is cut short",
        "Image Index,Finding Labels\na.png,Mass\n\na.png,Edema\n": "entry.csv:4: a.png was labelled otherwise",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=reason):
            read_labels(path)


def test_boxes_have_nih_header_with_commas_in_its_last_name(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "a.png,Pneumonia,591.075,388.25,244.5,271.75,,,\n"
        "b.png,Mass,1,2,3,4\n"
        "a.png,Infiltrate,0.5,1,2,3\n"
    )
    assert read_boxes(path) == {
        "a.png": [Box("Pneumonia", 591.075, 388.25, 244.5, 271.75), Box("Infiltration", 0.5, 1.0, 2.0, 3.0)],
        "b.png": [Box("Mass", 1.0, 2.0, 3.0, 4.0)],
    }


@pytest.mark.parametrize(
    "row", ["a.png,Mass,1,2,3", "a.png,Mass,1,2,3,x", "a.png,Mass,1,2,0,4", "a.png,Mass,nan,2,3,4"]
)
def test_unusable_box_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(f"Image Index,Finding Label,Bbox [x,y,w,h]\n{row}\n")
    with pytest.raises(UserError, match=r"boxes\.csv:2"):
        read_boxes(path)


def write_members(path: Path, members: list[tuple[dict[str, object], bytes]], mode: str) -> Path:
    """Write an archive member by member, whatever their headers say."""
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for fields, content in members:
            info = tarfile.TarInfo("x.png")
            info.size = len(content)
            for name, value in fields.items():
                setattr(info, name, value)
            tar.addfile(info, io.BytesIO(content))
    return path


GOOD = ({"name": "good.png"}, b"good")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_name_that_occurs_twice_in_an_archive_is_refused(tmp_path: Path, mode: str) -> None:
    archive = write_members(tmp_path / "x.tar.gz", [({}, b"1"), GOOD, ({}, b"2")], mode)
    refusals = {image.path: image.refusal for image in find_images([archive])}
    assert refusals == {"good.png": "", "x.png": "its name occurs more than once in the archive"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    "fields",
    [
        {"pax_headers": {"size": "99999999999999"}},
        {"pax_headers": {"size": "-1"}},
        {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "999999999"}},
        {"type": tarfile.GNUTYPE_SPARSE},
    ],
)
def test_headers_that_lie_are_an_error_at_once(tmp_path: Path, mode: str, fields: dict[str, object]) -> None:
    archive = write_members(tmp_path / "x.tar.gz", [GOOD, (fields, b"x" * 600), GOOD], mode)
    with pytest.raises(UserError, match=r"x\.tar\.gz: (damaged|cannot be read)"):
        find_images([archive])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_headers_of_headers_and_huge_ones_are_an_error_and_not_read(tmp_path: Path, mode: str) -> None:
    chain = [({"type": tarfile.GNUTYPE_LONGNAME}, b"x.png\0")] * 2000
    huge = [({"type": tarfile.GNUTYPE_LONGNAME}, bytes(2**21))]
    for number, members in enumerate((chain, huge)):
        archive = write_members(tmp_path / f"{number}.tar.gz", [GOOD, *members, GOOD], mode)
        with pytest.raises(UserError, match=r"tar\.gz: damaged .*an extended header of unlikely size"):
            find_images([archive])


def test_files_larger_than_any_image_are_refused_unread(folder: Path) -> None:
    with (folder / "huge.png").open("wb") as file:
        file.truncate(2**29 + 1)
    assert {i.path: i.refusal for i in find_images([folder]) if i.refusal} == {"huge.png": "too large: 536870913 bytes"}
