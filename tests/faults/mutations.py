"""Images and archives that somebody has tampered with, by seed."""

import gzip
import io
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SIZES_PX = (0, 1, 31, 33, 255, 4096, 8191, 65535, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_BOMB_BYTES = 2**28
"""What a deflate bomb inflates to."""


@cache
def good_images() -> dict[str, list[bytes]]:
    """Whole PNGs and JPEGs of every sort that radiographs come in."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 48), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    colour = np.dstack([grey, 255 - grey, grey // 2])
    forms = [
        Image.fromarray(grey),
        Image.fromarray(colour),
        Image.fromarray(np.dstack([colour, grey])),
        Image.fromarray(colour).quantize(16),
        Image.fromarray(grey.astype(np.uint16) * 16),
        Image.fromarray(grey > 128),
        Image.fromarray(np.dstack([grey, grey])),
    ]
    pngs = [_encoded(image, "PNG") for image in forms]
    pngs.append(_encoded(forms[0], "PNG", dpi=(300, 300), icc_profile=b"profile" * 9))
    plain = forms[:2]
    jpegs = [
        _encoded(image, "JPEG", quality=q, progressive=p) for image in plain for q in (60, 95) for p in (False, True)
    ]
    jpegs += [_encoded(forms[1].convert("CMYK"), "JPEG"), _encoded(plain[1], "JPEG", exif=_rotated().tobytes())]
    return {"png": pngs, "jpg": jpegs}


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# --- any bytes ------------------------------------------------------------------------------------------------------


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    """Up to 8 bits, anywhere."""
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Cut off the end."""
    return data[: rng.randrange(len(data))]


def repeat_some(rng: random.Random, data: bytes) -> bytes:
    """A stretch of it twice, or not at all."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 64))
    return data[:start] + data[start:end] * rng.choice((0, 2, 3)) + data[end:]


def append(rng: random.Random, data: bytes) -> bytes:
    """Something after its end."""
    return data + rng.choice((rng.randbytes(rng.randint(1, 2000)), bytes(1024), data))


# --- PNG ------------------------------------------------------------------------------------------------------------

Chunk = tuple[bytes, bytes]


def read_chunks(data: bytes) -> list[Chunk]:
    """Kind and content of each chunk of a whole PNG."""
    chunks, position = [], len(_PNG_SIGNATURE)
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunks.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return chunks


def write_chunks(chunks: list[Chunk]) -> bytes:
    """A PNG whose checksums are right, whatever its chunks hold."""
    parts = [struct.pack(">I", len(c)) + k + c + zlib.crc32(k + c).to_bytes(4) for k, c in chunks]
    return b"".join([_PNG_SIGNATURE, *parts])


def change_png_header(rng: random.Random, data: bytes) -> bytes:
    """Sizes up to 2**32 - 1, and every other field."""
    chunks = read_chunks(data)
    fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    for place in rng.sample(range(7), rng.randint(1, 2)):
        fields[place] = rng.choice(_SIZES_PX) if place < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return write_chunks([(b"IHDR", struct.pack(">IIBBBBB", *fields)), *chunks[1:]])


def change_png_chunks(rng: random.Random, data: bytes) -> bytes:
    """Another order, kind, number or content of chunks."""
    chunks = read_chunks(data)
    i, j = rng.randrange(len(chunks)), rng.randrange(len(chunks))
    kind, content = chunks[i]
    change = rng.randrange(6)
    if change == 0:
        chunks[i], chunks[j] = chunks[j], chunks[i]
    elif change == 1:
        del chunks[i]
    elif change == 2:
        chunks.insert(j, (kind, content))
    elif change == 3:
        letter = rng.randrange(4)
        chunks[i] = (kind[:letter] + bytes([kind[letter] ^ rng.choice((0x20, 1))]) + kind[letter + 1 :], content)
    elif change == 4:
        chunks[i] = (kind, flip_bits(rng, content) if content else b"\0")
    else:
        extra = (rng.choice((b"PLTE", b"tRNS", b"gAMA", b"acTL", b"eXIf", b"sBIT")), rng.randbytes(rng.randint(0, 9)))
        chunks.insert(rng.randint(1, len(chunks)), extra)
    return write_chunks(chunks)


def lie_about_png_length(rng: random.Random, data: bytes) -> bytes:
    """A chunk that says it is longer or shorter than it is."""
    position = 8
    for kind, content in read_chunks(data)[: rng.randint(0, 3)]:
        position += 12 + len(content) * (kind != b"")
    lie = struct.pack(">I", rng.choice((0, 1, 12, 13, 14, 2**16, 2**31 - 1, 2**31, 2**32 - 1)))
    return data[:position] + lie + data[position + 4 :]


@cache
def _bomb() -> bytes:
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(2**20)) for _ in range(_BOMB_BYTES // 2**20)]
    return b"".join([*parts, packer.flush()])


def png_bomb(rng: random.Random, data: bytes) -> bytes:
    """A little file with 256 MiB of pixels, text or colour profile in it."""
    chunks = read_chunks(data)
    kind = rng.choice((b"IDAT", b"zTXt", b"iCCP", b"iTXt"))
    if kind != b"IDAT":
        return write_chunks([chunks[0], (kind, b"bomb\0\0" + _bomb()), *chunks[1:]])
    width_px, height_px = rng.choice(((64, 64), (8192, 8192), (2**14, 2**14), (2**20, 64)))
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, rng.randrange(2))
    return write_chunks([(b"IHDR", header), (b"IDAT", _bomb()), (b"IEND", b"")])


# --- JPEG -----------------------------------------------------------------------------------------------------------


def read_segments(data: bytes) -> tuple[list[bytes], bytes]:
    """A whole JPEG's segments up to its first scan, with their markers, and all the rest."""
    segments, position = [], 2
    while data[position + 1] != 0xDA:
        length = struct.unpack_from(">H", data, position + 2)[0]
        segments.append(data[position : position + 2 + length])
        position += 2 + length
    return segments, data[position:]


def change_jpeg_segments(rng: random.Random, data: bytes) -> bytes:
    """Another order, kind, length, number or content of segments."""
    segments, rest = read_segments(data)
    i, j = rng.randrange(len(segments)), rng.randrange(len(segments))
    segment = bytearray(segments[i])
    change = rng.randrange(6)
    if change == 0:
        segments[i], segments[j] = segments[j], segments[i]
    elif change == 1:
        del segments[i]
    elif change == 2:
        segments.insert(j, bytes(segment))
    elif change == 3:
        segment[1] = rng.randrange(256)
        segments[i] = bytes(segment)
    elif change == 4:
        segment[2:4] = struct.pack(">H", rng.choice((0, 1, 2, 3, len(segment), 65535)))
        segments[i] = bytes(segment)
    else:
        segments[i] = bytes(segment[:4]) + flip_bits(rng, bytes(segment[4:]))
    return b"\xff\xd8" + b"".join(segments) + rest


def change_jpeg_frame(rng: random.Random, data: bytes) -> bytes:
    """Sizes up to 65535, and every other field of the frame's header."""
    segments, rest = read_segments(data)
    for i, segment in enumerate(segments):
        if segment[1] in (0xC0, 0xC1, 0xC2):
            frame = bytearray(segment)
            if rng.random() < 0.5:
                sizes = [size for size in _SIZES_PX if size < 2**16]
                frame[5:9] = struct.pack(">HH", rng.choice(sizes), rng.choice(sizes))
            else:
                place = rng.randrange(4, len(frame))
                frame[place] = rng.choice((0, 1, 2, 3, 4, 8, 12, 0x11, 0x22, 0x44, 255))
            segments[i] = bytes(frame)
    return b"\xff\xd8" + b"".join(segments) + rest


def jpeg_of_many_scans(rng: random.Random, data: bytes) -> bytes:
    """A progressive file whose scans come again and again: each is work for the decoder."""
    segments, rest = read_segments(data)
    scans = rest.removesuffix(b"\xff\xd9")
    if rng.random() < 0.3:
        segments = [change_jpeg_size(segment, 8192, 8192) for segment in segments]
    return b"\xff\xd8" + b"".join(segments) + scans * rng.choice((2, 30, 1000)) + b"\xff\xd9"


def change_jpeg_size(segment: bytes, height_px: int, width_px: int) -> bytes:
    """The segment, with another size where it is a frame's header."""
    is_frame = segment[1] in (0xC0, 0xC1, 0xC2)
    return segment[:5] + struct.pack(">HH", height_px, width_px) + segment[9:] if is_frame else segment


Mutation = Callable[[random.Random, bytes], bytes]
ANY: list[Mutation] = [flip_bits, flip_bits, truncate, repeat_some, append]
IMAGE_MUTATIONS: dict[str, list[Mutation]] = {
    "png": [*ANY, change_png_header, change_png_header, change_png_chunks, change_png_chunks, lie_about_png_length],
    "jpg": [*ANY, change_jpeg_segments, change_jpeg_segments, change_jpeg_frame, change_jpeg_frame],
}
RARE: dict[str, Mutation] = {"png": png_bomb, "jpg": jpeg_of_many_scans}
"""Costly: one file in a hundred."""


def hostile_image(rng: random.Random) -> tuple[str, bytes, str]:
    """An image's extension, its bytes, and what was done to it."""
    extension = rng.choice(("png", "jpg"))
    data = rng.choice(good_images()[extension])
    if rng.random() < 0.01:
        mutation = RARE[extension]
        return extension, mutation(rng, data), mutation.__name__
    mutation = rng.choice(IMAGE_MUTATIONS[extension])
    return rng.choice((extension, extension, extension, "jpeg", "PNG")), mutation(rng, data), mutation.__name__


# --- archives -------------------------------------------------------------------------------------------------------

_NAMES = (
    *(
        "../x.png",
        "a/../../x.png",
        "/etc/x.png",
        "./x.png",
        "x\n.png",
        "x\udcff.png",
        "a" * 300 + ".png",
        ".png",
        "ü x.png",
    ),
    *("good0.png", "good0.png/good1.png", "b/" * 120 + "x.png", "con.png", "-rf.png", "x.png.", " .png"),
)
_TYPES = (
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE),
    *(tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, b"Z", b"V"),
)
_RECORDS = (
    *({"size": "99999999999999"}, {"size": "-1"}, {"size": "x"}, {"path": "../y.png"}, {"path": "good0.png"}),
    *(
        {"path": ""},
        {"mtime": "nan"},
        {"hdrcharset": "BINARY"},
        {"GNU.sparse.map": "0,1,2"},
        {"linkpath": "/etc/passwd"},
    ),
    {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": "99999999999",
        "GNU.sparse.name": "z.png",
    },
    {"GNU.sparse.size": "10", "GNU.sparse.numblocks": "1000000000"},
)


def hostile_archive(rng: random.Random) -> tuple[str, bytes, str]:
    """An archive's ending, its bytes, and what was done to it: odd members, damaged headers, damaged compression."""
    file, done = io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for i in range(3):
            _add(tar, tarfile.TarInfo(f"good{i}.png"), rng.choice(good_images()["png"]))
        if rng.random() < 0.6:
            done.append(_add_odd_member(rng, tar))
    data = file.getvalue()
    if not done or rng.random() < 0.4:
        change = rng.choice((change_tar_header, change_tar_header, flip_bits, truncate, repeat_some, append))
        data = change(rng, data)
        done.append(change.__name__)
    if rng.random() < 0.5:
        return rng.choice((".tar", ".tar.gz")), data, " ".join(done)
    packed = gzip.compress(data, 1, mtime=0)
    if rng.random() < 0.3:
        change = rng.choice((flip_bits, truncate, append, repeat_some))
        packed = change(rng, packed)
        done.append(f"gzip {change.__name__}")
    return rng.choice((".tar.gz", ".tgz", ".tar")), packed, " ".join(done)


def _add(tar: tarfile.TarFile, info: tarfile.TarInfo, data: bytes) -> None:
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _add_odd_member(rng: random.Random, tar: tarfile.TarFile) -> str:
    kind = rng.choices(("name", "type", "record", "chain", "bomb"), (8, 8, 8, 1, 0.3))[0]
    info, data = tarfile.TarInfo("odd.png"), rng.choice(good_images()["png"])
    if kind == "name":
        info.name = rng.choice(_NAMES)
    elif kind == "type":
        info.type, info.linkname = rng.choice(_TYPES), rng.choice(("/etc/passwd", "good0.png", "../x", ""))
        data = rng.choice((b"", data))
    elif kind == "record" and tar.format == tarfile.PAX_FORMAT:
        info.pax_headers = dict(rng.choice(_RECORDS))
    elif kind == "chain":  # headers for headers for headers
        for _ in range(rng.choice((10, 3000))):
            _add(tar, _of_type(rng.choice((tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME))), b"11 path=a.p\n")
    elif kind == "bomb":
        big = _of_type(rng.choice((tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE)))
        big.size = _BOMB_BYTES
        tar.addfile(big, io.BytesIO(bytes(_BOMB_BYTES)))
    _add(tar, info, data)
    return kind


def _of_type(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("header.png")
    info.type = kind
    return info


def change_tar_header(rng: random.Random, data: bytes) -> bytes:
    """Bytes of one header, its checksum made right again."""
    starts = [start for start in range(0, len(data) - 512, 512) if data[start + 257 : start + 262] == b"ustar"]
    start = rng.choice(starts)
    header = bytearray(data[start : start + 512])
    sizes = (b"77777777777\0", b"00000000000\0", b"\x80" + b"\0" * 7 + b"\xff" * 4, b"\xff" * 12, b"abcdefghijk\0")
    if rng.random() < 0.5:
        header[124:136] = rng.choice(sizes)
    else:
        header[rng.randrange(512)] = rng.randrange(256)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]
