"""The inputs of packing: images in folders and tar archives, and the lists, labels and boxes that go with them."""

import csv
import io
import os
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from errors import UserError

NIH_LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
_EXTENSIONS = (".png", ".jpg", ".jpeg")
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_MAX_IMAGE_BYTES = 2**29
"""Of a file: more than the largest image that is packed has without any compression."""
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAX_HEADER_BYTES = 2**20
_MAX_HEADERS = 16
"""In a row, for one member."""
_ARCHIVE_ERRORS = (tarfile.TarError, ValueError, OverflowError)
"""What tarfile raises at damaged archives: not only its own errors."""


class ImageRef(NamedTuple):
    """Where one image is."""

    root: Path
    """The folder or archive it was found in, as given."""
    path: str
    """Its path in there, with forward slashes."""
    num_bytes: int
    in_archive: bool = False
    offset: int | None = None
    """Where its bytes begin in a plain tar; None in a folder, and in a compressed archive (a stream)."""
    refusal: str = ""
    """Why it must not be read, if so: links and devices in an archive, say, are never followed."""

    @property
    def file_name(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_streamed(self) -> bool:
        """Whether it lies in a compressed archive, which can only be read from its beginning."""
        return self.in_archive and self.offset is None

    def __str__(self) -> str:
        return f"{self.root}:{self.path}" if self.in_archive else str(self.root / self.path)


class Box(NamedTuple):
    """A finding's bounding box, in pixels of the original image."""

    label: str
    x: float
    y: float
    w: float
    h: float


def find_images(roots: Sequence[Path], listings: dict[str, list] | None = None) -> list[ImageRef]:
    """Every PNG and JPEG in folders (searched all the way down) and tar archives, sorted within each of them.

    Hidden files, among them macOS's `._*`, are passed over.

    Args:
        roots: Folders, and `.tar`, `.tar.gz` or `.tgz` archives.
        listings: What compressed archives hold, as earlier calls found it: those that have not changed since
            are not read again. Updated in place; can be stored as JSON.

    Raises:
        UserError: If a root can't be read, an archive is damaged, or there is no image at all.
    """
    listings = {} if listings is None else listings
    with ThreadPoolExecutor() as pool:  # inflating an archive releases the interpreter
        found = list(pool.map(lambda root: _find_in(root, listings), roots))
    images = [image for group in found for image in sorted(group, key=lambda image: image.path)]
    if not images:
        raise UserError(f"no PNG or JPEG images in {', '.join(map(str, roots))}")
    return images


def _find_in(root: Path, listings: dict[str, list]) -> list[ImageRef]:
    try:
        if root.is_dir():
            return list(_walk(root, "", root, frozenset()))
        if root.name.lower().endswith(_ARCHIVES):
            return _list_archive(root, listings)
    except (OSError, EOFError, zlib.error) as error:
        where = getattr(error, "filename", None) or root
        raise UserError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except _ARCHIVE_ERRORS as error:
        raise UserError(f"{root}: damaged or cut short ({error}); download or build the archive again") from None
    what = "is neither a folder nor a .tar or .tar.gz archive" if root.exists() else "does not exist"
    raise UserError(f"{root}: {what}; give folders of images or archives")


def _walk(folder: Path, inside: str, root: Path, above: frozenset[tuple[int, int]]) -> Iterator[ImageRef]:
    """The images in a folder and below. Links are followed, except back to a folder that this one lies in."""
    stat = folder.stat()
    identity = (stat.st_dev, stat.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = inside + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, path + "/", root, above | {identity})
            elif not path.lower().endswith(_EXTENSIONS):
                continue
            elif entry.is_file():
                num_bytes = entry.stat().st_size
                yield ImageRef(root, path, num_bytes, refusal=_size_refusal(num_bytes))
            else:
                yield ImageRef(root, path, 0, refusal="a link to nowhere, or a device")


class _StrictTarInfo(tarfile.TarInfo):
    """What tarfile takes for the archive's end, or follows however far it leads, is an error here.

    A member may be preceded by headers with its long name and the like, which tarfile reads into memory whole, calls
    itself for, and obeys: no archive of radiographs has large ones, many in a row, or sparse files.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            member = super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:
            raise tarfile.SubsequentHeaderError(str(error)) from None
        if member.size < 0:
            raise tarfile.SubsequentHeaderError(f"a member of {member.size} bytes")
        return member

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        is_header = self.type in _HEADER_TYPES
        tarfile_.num_headers = getattr(tarfile_, "num_headers", 0) + 1 if is_header else 0
        if is_header and (self.size > _MAX_HEADER_BYTES or tarfile_.num_headers > _MAX_HEADERS):
            raise tarfile.SubsequentHeaderError("an extended header of unlikely size")
        return super()._proc_member(tarfile_)

    def _proc_sparse(self, _: tarfile.TarFile) -> tarfile.TarInfo:
        raise tarfile.SubsequentHeaderError("a sparse file")

    def _proc_gnusparse_00(self, *_: object) -> None:
        raise tarfile.SubsequentHeaderError("a sparse file")

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


def read_image(image: ImageRef) -> bytes:
    """The bytes of an image that lies in a folder or a plain tar."""
    with (image.root if image.in_archive else image.root / image.path).open("rb") as file:
        file.seek(image.offset or 0)
        return file.read(image.num_bytes if image.in_archive else -1)


def stream_images(archive: Path, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """The paths and bytes of some of an archive's images, in the archive's order.

    Raises:
        UserError: If the archive is damaged or has changed since it was listed.
    """
    try:
        with open_archive(archive) as members:
            for member in members:
                path = member_path(member)
                if path in paths:
                    yield path, members.extractfile(member).read()
                members.members.clear()  # tarfile remembers every member it has seen
    except (OSError, EOFError, zlib.error, *_ARCHIVE_ERRORS) as error:
        raise UserError(f"{archive}: cannot be read ({error})") from None


def is_compressed(archive: Path) -> bool:
    """Whether an archive is gzipped, whatever its name says."""
    with archive.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_archive(path: Path) -> tarfile.TarFile:
    """Open a tar for reading: anywhere if it is plain, from its beginning to its end if it is compressed.

    Not in tarfile's stream mode ("r|gz"): it goes where a member's size leads, even far behind the file's end.
    """
    return tarfile.open(path, "r:gz" if is_compressed(path) else "r:", tarinfo=_StrictTarInfo)


def member_path(member: tarfile.TarInfo) -> str:
    """A member's name without leading `./`, as in `ImageRef.path`."""
    return member.name if member.name.startswith("/") else str(PurePosixPath(member.name))


def _list_archive(root: Path, listings: dict[str, list]) -> list[ImageRef]:
    stat = root.stat()
    key, state = str(root.absolute()), [stat.st_size, stat.st_mtime_ns]
    known = listings.get(key)
    if known and known[0] == state:
        return [ImageRef(root, path, size, in_archive=True, refusal=refusal) for path, size, refusal in known[1]]
    images: dict[str, ImageRef] = {}
    is_stream = is_compressed(root)
    with open_archive(root) as archive:
        for member in archive:
            path = member_path(member)
            parts = path.split("/")
            is_hidden = any(part.startswith(".") and part != ".." for part in parts)
            if member.isdir() or is_hidden or not path.lower().endswith(_EXTENSIONS):
                continue
            offset = None if is_stream else member.offset_data
            refusal = "its name occurs more than once in the archive" if path in images else _refusal(member)
            images[path] = ImageRef(root, path, member.size, in_archive=True, offset=offset, refusal=refusal)
            archive.members.clear()  # tarfile remembers every member it has seen
    if is_stream:
        listings[key] = [state, [[image.path, image.num_bytes, image.refusal] for image in images.values()]]
    return list(images.values())


def _refusal(member: tarfile.TarInfo) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the archive"
    if not member.isreg() or member.issparse():
        return "not a plain file in the archive but a link or device"
    return _size_refusal(member.size)


def _size_refusal(num_bytes: int) -> str:
    return f"too large: {num_bytes} bytes" if num_bytes > _MAX_IMAGE_BYTES else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None


def read_list(path: Path) -> dict[str, tuple[int, ...] | None]:
    """File names of a list, each with the 14 labels (NIH's order) that follow it on its line, or None.

    Raises:
        UserError: If the list can't be read, is empty, or a line has some other number of labels.
    """
    names: dict[str, tuple[int, ...] | None] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, labels = re.fullmatch(r"\s*(.*?)((?:\s+[01])*)\s*", line).groups()
        vector = tuple(map(int, labels.split()))
        if len(vector) not in (0, len(NIH_LABELS)):
            raise UserError(f"{path}:{number}: {len(vector)} labels after the file name; there must be 14 or none")
        names[name] = vector or None
    if not names:
        raise UserError(f"{path}: names no image, which leaves its split empty")
    return names


def _read_csv(path: Path, required: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """A CSV's header, and its rows with their line numbers; all rows are as long as the required columns reach."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in required if name not in header]
        if missing:
            raise UserError(f"{path}: has no column {missing[0]!r}; NIH's own files have {', '.join(required)}")
        rows = [(reader.line_num, [value.strip() for value in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None
    length = 1 + max(header.index(name) for name in required)
    for number, row in rows:
        if len(row) < length:
            raise UserError(f"{path}:{number}: the row is cut short")
    return header, rows


class LabelTable(NamedTuple):
    """What a labels CSV says, by image name."""

    label_names: tuple[str, ...]
    labels: dict[str, tuple[int, ...]]
    patients: dict[str, str]


def read_labels(path: Path) -> LabelTable:
    """Read a CSV such as NIH's `Data_Entry_2017_v2020.csv`: `Image Index`, `Finding Labels` and, maybe, `Patient ID`.

    Findings are separated by `|`; "No Finding" is none. Label names are NIH's 14 in NIH's order where nothing else
    occurs, or else all that occur, sorted.
    """
    header, rows = _read_csv(path, ("Image Index", "Finding Labels"))
    index, labels = header.index("Image Index"), header.index("Finding Labels")
    patient = header.index("Patient ID") if "Patient ID" in header else None
    findings: dict[str, set[str]] = {}
    patients: dict[str, str] = {}
    for number, row in rows:
        found = {label.strip() for label in row[labels].split("|")} - {"No Finding", ""}
        if findings.setdefault(row[index], found) != found:
            raise UserError(f"{path}:{number}: {row[index]} was labelled otherwise further up")
        if patient is not None and len(row) > patient and row[patient]:
            patients[row[index]] = row[patient]
    occurring = set().union(*findings.values())
    names = NIH_LABELS if occurring <= set(NIH_LABELS) else tuple(sorted(occurring))
    vectors = {image: tuple(int(name in found) for name in names) for image, found in findings.items()}
    return LabelTable(names, vectors, patients)


def read_boxes(path: Path) -> dict[str, list[Box]]:
    """Read a CSV such as NIH's `BBox_List_2017.csv`: image, finding, x, y, w, h, in original pixels.

    Columns go by position: NIH's header calls the third to sixth `Bbox [x,y,w,h]`, commas included. NIH's "Infiltrate"
    is the finding that its labels call "Infiltration".
    """
    _, rows = _read_csv(path, ("Image Index", "Finding Label"))
    boxes = defaultdict(list)
    for number, row in rows:
        try:
            x, y, w, h = map(float, row[2:6])
            is_box = 0 < w < float("inf") and 0 < h < float("inf") and abs(x) + abs(y) < float("inf")
        except ValueError:
            is_box = False
        if not is_box:
            raise UserError(f"{path}:{number}: expected image, finding, x, y, width, height; sizes above 0")
        label = "Infiltration" if row[1] == "Infiltrate" else row[1]
        boxes[row[0]].append(Box(label, x, y, w, h))
    return dict(boxes)
