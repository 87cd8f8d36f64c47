"""One image's way into a shard: check, decode to grey, fit to the stored size, encode, write; and a shard's bytes."""

import hashlib
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import cv2
import numpy as np

Store = Literal["raw", "jpeg", "png"]
EXTENSIONS: dict[Store, str] = {"raw": "raw", "jpeg": "jpg", "png": "png"}

_MIN_SIDE_PX = 32
_MAX_PIXELS = 2**26  # 8192 x 8192; guards against decompression bombs
_MAX_SCANS = 100  # of a progressive JPEG; ten are usual
TAR_BLOCK = 512  # bytes
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")  # length, kind
_PNG_OPTIONS = (  # against OpenCV's defaults: a fifth less time to encode and to decode, and smaller radiographs
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY),
)


class Unusable(Exception):  # noqa: N818 - it says what the image is
    """Why an image can't be packed, in a few words."""


class PackedImage(NamedTuple):
    """An image as it is stored, and how it came from the original."""

    data: bytes
    crc32: int
    """Of `data`."""
    original_size_px: tuple[int, int]
    """Width, height."""
    stored_size_px: tuple[int, int]
    scale: tuple[float, float]
    """Stored x, y = original x, y * `scale` + `offset_px`, counted from the left upper corner of the first pixel."""
    offset_px: tuple[int, int]
    is_padded: bool
    pixel_sum: int
    pixel_sum_of_squares: int


# --- decoding -------------------------------------------------------------------------------------------------------


def decode_grey(data: bytes) -> np.ndarray:
    """Decode a PNG or JPEG file to uint8 grey, [H, W].

    Colour becomes BT.601 luma; transparency and EXIF rotation are ignored. 16-bit pixels are stretched from the image's
    own minimum..maximum to 0..255: radiographs of 12 or 14 significant bits would come out nearly black otherwise.

    Raises:
        Unusable: If the file is neither, is cut short or damaged, or is under 32 px or over 2**26 pixels in size.
    """
    return _to_grey(_decode(_checked(data)[0]))


def _checked(data: bytes) -> tuple[bytes, bool]:
    """What to give to the decoder, and whether that is 8-bit grey, RGB or RGBA in a plain PNG.

    OpenCV returns half-empty images for some damaged files, hence the checks.
    """
    if data.startswith(_PNG_SIGNATURE):
        return _checked_png(data)
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
        return data, False
    raise Unusable("empty file" if not data else "neither PNG nor JPEG")


def _checked_png(data: bytes) -> tuple[bytes, bool]:
    """Walk the chunks; drop those that say nothing about pixels (bad ones make libpng complain on stderr)."""
    view = memoryview(data)
    critical = [view[:8]]
    position, kind = 8, b""
    while kind != b"IEND":
        start = position
        length, kind = _PNG_CHUNK.unpack_from(data, start) if start + 12 <= len(data) else (len(data), b"")
        position += 12 + length
        if position > len(data):
            raise Unusable(f"cut short: no PNG end in its {len(data)} bytes")
        if zlib.crc32(view[start + 4 : position - 4]).to_bytes(4) != data[position - 4 : position]:
            raise Unusable(f"damaged: wrong checksum in the PNG chunk at byte {start}")
        if not kind[0] & 0x20:
            critical.append(view[start:position])
    if data[12:16] != b"IHDR" or len(critical[1]) != 25:
        raise Unusable("damaged: no PNG header")
    width_px, height_px, bits, color, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    _check_size(width_px, height_px)
    return b"".join(critical), bits == 8 and color in (0, 2, 6) and interlace == 0


def _check_jpeg(data: bytes) -> None:
    """Walk the segments up to the scan, which must be followed by an end marker.

    A progressive file may have any number of scans, each of which makes the decoder go over all the pixels.
    """
    position = 2
    has_size = False
    while True:
        if position + 4 > len(data):
            raise Unusable(f"cut short: no JPEG scan in its {len(data)} bytes")
        fill, marker, length = struct.unpack_from(">BBH", data, position)
        if fill != 0xFF:
            raise Unusable(f"damaged: no JPEG marker at byte {position}")
        if marker == 0xFF:
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position + 9 <= len(data):
            height_px, width_px = struct.unpack_from(">HH", data, position + 5)
            _check_size(width_px, height_px)
            has_size = True
        if marker == 0xDA:
            break
        position += 2 + length
    if not has_size:
        raise Unusable("damaged: no JPEG frame header")
    if data.rfind(b"\xff\xd9") < position:
        raise Unusable(f"cut short: no JPEG end in its {len(data)} bytes")
    if (num_scans := data.count(b"\xff\xda", position)) > _MAX_SCANS:
        raise Unusable(f"{num_scans} scans in one JPEG")


def _check_size(width_px: int, height_px: int) -> None:
    if min(width_px, height_px) < _MIN_SIDE_PX:
        raise Unusable(f"too small: {width_px} x {height_px} px")
    if width_px * height_px > _MAX_PIXELS:
        raise Unusable(f"too large: {width_px} x {height_px} px")


def _decode(data: bytes) -> np.ndarray:
    """uint8 or uint16, [H, W] or [H, W, 3 or 4] in OpenCV's order of colours."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise Unusable("damaged: the decoder refuses it")
    return pixels


def _to_grey(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGRA2GRAY if pixels.shape[2] == 4 else cv2.COLOR_BGR2GRAY)
    if pixels.dtype == np.uint8:
        return pixels
    low, high = int(pixels.min()), int(pixels.max())
    span = max(high - low, 1)
    levels = np.arange(2**16, dtype=np.int64).clip(low, high) - low
    return ((255 * levels + span // 2) // span).astype(np.uint8)[pixels]


# --- fitting and encoding -------------------------------------------------------------------------------------------


def pack_image(data: bytes, store: Store, size_px: int, quality: int) -> PackedImage:
    """Decode an image file, fit it to `size_px` and encode it.

    - `raw`: the long side becomes `size_px`, black borders make it a centred square; `data` is its pixels by rows.
    - `jpeg`, `png`: the short side becomes `size_px`, unless it is shorter already. With `size_px` 0 nothing is scaled,
      and `png` keeps the file's own bytes where it is a plain 8-bit grey, RGB or RGBA PNG.

    The same input gives the same bytes.

    Raises:
        Unusable: As `decode_grey`.
    """
    checked, is_plain_png = _checked(data)
    grey = _to_grey(_decode(checked))
    height_px, width_px = grey.shape
    fitted, (scaled_width_px, scaled_height_px), offset_px = _fit(grey, store, size_px)
    if store == "raw":
        encoded = fitted.tobytes()
    elif store == "jpeg":
        encoded = cv2.imencode(".jpg", fitted, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()
    elif size_px == 0 and is_plain_png:
        encoded = data
    else:
        encoded = cv2.imencode(".png", fitted, _PNG_OPTIONS)[1].tobytes()
    return PackedImage(
        encoded,
        zlib.crc32(encoded),
        original_size_px=(width_px, height_px),
        stored_size_px=(fitted.shape[1], fitted.shape[0]),
        scale=(scaled_width_px / width_px, scaled_height_px / height_px),
        offset_px=offset_px,
        is_padded=fitted.shape != (scaled_height_px, scaled_width_px),
        pixel_sum=round(cv2.sumElems(fitted)[0]),
        pixel_sum_of_squares=round(cv2.norm(fitted, cv2.NORM_L2SQR)),
    )


def _fit(grey: np.ndarray, store: Store, size_px: int) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """The image to store; width and height of the radiograph in it; and where its left upper corner lies."""
    height_px, width_px = grey.shape
    if store == "raw":
        factor = size_px / max(width_px, height_px)
    else:
        factor = min(1.0, size_px / min(width_px, height_px)) if size_px else 1.0
    scaled_px = max(1, round(width_px * factor)), max(1, round(height_px * factor))
    if scaled_px != (width_px, height_px):
        # INTER_AREA averages all the pixels that fall into one: antialiasing
        grey = cv2.resize(grey, scaled_px, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    if store != "raw" or scaled_px == (size_px, size_px):
        return grey, scaled_px, (0, 0)
    left_px, top_px = (size_px - scaled_px[0]) // 2, (size_px - scaled_px[1]) // 2
    square = np.zeros((size_px, size_px), np.uint8)
    square[top_px : top_px + scaled_px[1], left_px : left_px + scaled_px[0]] = grey
    return square, scaled_px, (left_px, top_px)


# --- a shard's bytes ------------------------------------------------------------------------------------------------


def seal_meta(meta: dict[str, Any], image_crc32: int) -> bytes:
    """Encode a sample's JSON with one more entry: `crc32` (hex), of the image's bytes and then the JSON without it."""
    crc32 = zlib.crc32(json.dumps(meta).encode(), image_crc32)
    return json.dumps({**meta, "crc32": f"{crc32:08x}"}).encode()


def open_meta(sealed: bytes, image: bytes) -> dict[str, Any]:
    """Decode what `seal_meta` encoded.

    Raises:
        ValueError: If it or the image's bytes have changed since.
    """
    meta = json.loads(sealed)
    if not isinstance(meta, dict) or meta.pop("crc32", None) is None or seal_meta(meta, zlib.crc32(image)) != sealed:
        raise ValueError("checksum mismatch")
    return meta


class IndexEntry(NamedTuple):
    """Where a sample's image and JSON lie in its tar, in bytes: a line of DALI's index, version 1.2."""

    key: str
    extension: str
    image_offset: int
    image_size: int
    meta_offset: int
    meta_size: int

    def to_line(self) -> str:
        """As DALI reads it: extension, offset, size and name of each file."""
        image = f"{self.extension} {self.image_offset} {self.image_size} {self.key}.{self.extension}"
        return f"{image} json {self.meta_offset} {self.meta_size} {self.key}.json"


def sample_block(key: str, extension: str, image: bytes, meta: bytes) -> tuple[bytes, int, int]:
    """A sample's two files as they stand in a tar (ustar), and the offsets of their contents in there."""
    files = []
    for name, data in ((f"{key}.{extension}", image), (f"{key}.json", meta)):
        files += [tar_header(name, len(data)), data, bytes(-len(data) % TAR_BLOCK)]
    return b"".join(files), TAR_BLOCK, sum(map(len, files[:3])) + TAR_BLOCK


def tar_header(name: str, num_bytes: int) -> bytes:
    """What precedes a file's content in a tar (ustar)."""
    info = tarfile.TarInfo(name)  # time, owner and group are 0
    info.size = num_bytes
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8")


class ShardWriter:
    """Writes `NAME.tar` and `NAME.idx`, in one pass; they get these names only when whole and on the disk.

    A context manager; nothing is left of a shard without samples. Afterwards `num_samples`, `num_bytes`, `sha256` and
    `index_sha256` describe it.
    """

    END = bytes(2 * TAR_BLOCK)

    def __init__(self, path: Path) -> None:
        """`path` without an ending."""
        self._tar_path, self._index_path = path.with_suffix(".tar"), path.with_suffix(".idx")
        self._entries: list[IndexEntry] = []
        self._digest = hashlib.sha256()
        self.num_samples = self.num_bytes = 0
        self.sha256 = self.index_sha256 = ""

    def __enter__(self) -> Self:
        self._file = partial_path(self._tar_path).open("wb")
        return self

    def add(self, key: str, extension: str, image: bytes, meta: bytes) -> None:
        """Append a sample."""
        block, image_offset, meta_offset = sample_block(key, extension, image, meta)
        start = self.num_bytes
        self._entries.append(
            IndexEntry(key, extension, start + image_offset, len(image), start + meta_offset, len(meta))
        )
        self._write(block)

    def _write(self, block: bytes) -> None:
        self._file.write(block)
        self._digest.update(block)
        self.num_bytes += len(block)

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if error_type or not self._entries:
                partial_path(self._tar_path).unlink()
                return
            self._write(self.END)
            self._file.flush()
            os.fsync(self._file.fileno())
        index = format_index(self._entries)
        write_whole(self._index_path, index)
        partial_path(self._tar_path).replace(self._tar_path)
        sync_folder(self._tar_path.parent)
        self.num_samples = len(self._entries)
        self.sha256, self.index_sha256 = self._digest.hexdigest(), hashlib.sha256(index).hexdigest()


def format_index(entries: list[IndexEntry]) -> bytes:
    """DALI's index of a tar."""
    return "".join(f"{line}\n" for line in [f"v1.2 {len(entries)}", *(e.to_line() for e in entries)]).encode()


def parse_index(index: bytes) -> list[IndexEntry]:
    """The entries of an index that `format_index` wrote.

    Raises:
        ValueError: If anything in it is otherwise.
    """
    entries = []
    for line in index.decode().removesuffix("\n").split("\n")[1:]:
        extension, image_offset, image_size, name, _, meta_offset, meta_size, _ = line.split(" ")
        numbers = map(int, (image_offset, image_size, meta_offset, meta_size))
        entries.append(IndexEntry(name.removesuffix(f".{extension}"), extension, *numbers))
    if format_index(entries) != index:
        raise ValueError("not an index of version 1.2")
    return entries


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is, whatever happens, either the old one or the new one."""
    with partial_path(path).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial_path(path).replace(path)
    sync_folder(path.parent)


def partial_path(path: Path) -> Path:
    """The name of a file that is not whole yet."""
    return path.with_name(path.name + ".part")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
