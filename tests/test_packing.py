import contextlib
import hashlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.packing import (
    ShardWriter,
    Store,
    Unusable,
    decode_grey,
    format_index,
    open_meta,
    pack_image,
    parse_index,
    seal_meta,
)

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (48, 64), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height_px: int, width_px: int) -> np.ndarray:
    y, x = np.mgrid[:height_px, :width_px]
    return np.uint8(127.5 + 60 * np.sin(x / 40) + 60 * np.cos(y / 30))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width_px: int, height_px: int, bits: int, color: int, rows: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float64) @ (0.299, 0.587, 0.114)


# --- decoding -------------------------------------------------------------------------------------------------------


def test_grey_png_is_decoded_exactly() -> None:
    assert np.array_equal(decode_grey(encode(GREY)), GREY)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_spans_the_whole_range(bits: int) -> None:
    levels = RNG.integers(0, 2**bits, (48, 64))
    bit_planes = np.stack([levels >> b & 1 for b in reversed(range(bits))], axis=-1).reshape(48, -1)
    rows = b"".join(b"\0" + np.packbits(row.astype(np.uint8)).tobytes() for row in bit_planes)
    assert np.array_equal(decode_grey(raw_png(64, 48, bits, 0, rows)), levels * 255 // (2**bits - 1))


def test_colour_becomes_bt601_luma_and_transparency_is_ignored() -> None:
    rgb = decode_grey(encode(COLOUR))
    assert np.abs(rgb - luma(COLOUR)).max() <= 0.51
    assert np.array_equal(decode_grey(encode(np.dstack([COLOUR, GREY]))), rgb)


def test_equal_channels_as_in_nih_rgba_files_give_exactly_that_grey() -> None:
    assert np.array_equal(decode_grey(encode(np.dstack([GREY] * 3 + [np.full_like(GREY, 255)]))), GREY)
    assert np.array_equal(decode_grey(encode(np.dstack([GREY, 255 - GREY]))), GREY)


def test_palette_is_looked_up() -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    assert np.abs(decode_grey(encode(image)) - luma(np.asarray(image.convert("RGB")))).max() <= 0.51
    assert np.array_equal(decode_grey(encode(image, transparency=3)), decode_grey(encode(image)))


def test_16_bit_is_stretched_from_its_own_minimum_to_its_own_maximum() -> None:
    twelve_bit = RNG.integers(300, 4000, (48, 64)).astype(np.uint16)
    low, high = float(twelve_bit.min()), float(twelve_bit.max())
    exact = 255 * (twelve_bit.astype(np.float64) - low) / (high - low)
    decoded = decode_grey(encode(twelve_bit))
    assert (decoded.min(), decoded.max()) == (0, 255)
    assert np.abs(decoded - exact).max() <= 0.5
    assert not decode_grey(encode(np.full((48, 64), 700, np.uint16))).any()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}])
def test_jpeg_is_decoded_as_pil_does(options: dict[str, object]) -> None:
    data = encode(smooth(48, 64), "jpeg", **options)
    assert np.abs(decode_grey(data) - np.asarray(Image.open(io.BytesIO(data))).astype(int)).max() <= 1
    colour = encode(np.dstack([smooth(48, 64)] * 3), "jpeg", **options)
    assert np.abs(decode_grey(colour) - np.asarray(Image.open(io.BytesIO(colour)).convert("L")).astype(int)).max() <= 2


def test_every_truncation_is_told() -> None:
    for data in (encode(GREY), encode(GREY, "jpeg"), encode(GREY, "jpeg", progressive=True)):
        for length in range(len(data)):
            with pytest.raises(Unusable):
                decode_grey(data[:length])


def test_every_flipped_byte_of_a_png_is_told() -> None:
    data = encode(GREY[:33, :33])
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        with pytest.raises(Unusable):
            decode_grey(bytes(flipped))


def test_damaged_jpeg_never_raises_anything_but_unusable() -> None:
    data = encode(GREY, "jpeg")
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0xFF
        with contextlib.suppress(Unusable):
            assert decode_grey(bytes(flipped)).dtype == np.uint8


def test_png_whose_pixels_end_early_is_told_though_all_its_checksums_are_right() -> None:
    with pytest.raises(Unusable, match="decoder refuses"):
        decode_grey(raw_png(64, 48, 8, 0, bytes(20 * 65)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "neither PNG nor JPEG"),
        (raw_png(31, 48, 8, 0, bytes(48 * 32)), "too small: 31 x 48 px"),
        (raw_png(100_000, 100_000, 8, 0, bytes(10)), "too large: 100000 x 100000 px"),
        (
            b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x01\x01\x11\x00\xff\xda\xff\xd9",
            "too large: 65535 x 65535 px",
        ),
        (b"\xff\xd8" + bytes(100), "no JPEG marker"),
    ],
)
def test_reason_says_what_is_wrong(data: bytes, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        decode_grey(data)


def test_damaged_png_text_does_not_reach_the_decoder() -> None:
    """OpenCV's libpng would complain on stderr about NIH's RGBA files, among others."""
    data = encode(GREY)
    data = data[:33] + chunk(b"iCCP", b"bad") + chunk(b"gAMA", b"\0") + data[33:]
    code = "import sys; from pipeline.packing import decode_grey; decode_grey(sys.stdin.buffer.read())"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], input=data, cwd=root, capture_output=True, check=True)
    assert done.stderr == b""


# --- fitting and encoding -------------------------------------------------------------------------------------------


def stored_pixels(data: bytes, store: Store, size_px: int, quality: int = 95) -> np.ndarray:
    packed = pack_image(data, store, size_px, quality)
    assert packed.crc32 == zlib.crc32(packed.data)
    if store == "raw":
        return np.frombuffer(packed.data, np.uint8).reshape(packed.stored_size_px[::-1])
    return np.asarray(Image.open(io.BytesIO(packed.data)))


def test_shrinking_averages_the_pixels_that_fall_into_one() -> None:
    noise = RNG.integers(0, 256, (256, 256), dtype=np.uint8)
    means = noise.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    for store in ("raw", "png"):
        assert np.abs(stored_pixels(encode(noise), store, 64) - means).max() <= 0.51


@pytest.mark.parametrize(
    ("store", "size_px", "original_px", "stored_px", "scaled_px"),
    [
        ("raw", 64, (128, 128), (64, 64), (64, 64)),
        ("raw", 64, (200, 100), (64, 64), (64, 32)),
        ("raw", 64, (100, 203), (64, 64), (32, 64)),
        ("raw", 64, (40, 32), (64, 64), (64, 51)),
        ("png", 64, (200, 100), (128, 64), (128, 64)),
        ("jpeg", 64, (100, 203), (64, 130), (64, 130)),
        ("png", 64, (40, 300), (40, 300), (40, 300)),
        ("png", 0, (200, 100), (200, 100), (200, 100)),
    ],
)
def test_image_is_fitted_without_stretching(
    store: Store, size_px: int, original_px: tuple[int, int], stored_px: tuple[int, int], scaled_px: tuple[int, int]
) -> None:
    packed = pack_image(encode(smooth(*original_px[::-1])), store, size_px, 95)
    assert (packed.original_size_px, packed.stored_size_px) == (original_px, stored_px)
    assert packed.is_padded == (scaled_px != stored_px)
    assert packed.scale == pytest.approx([scaled_px[0] / original_px[0], scaled_px[1] / original_px[1]])
    assert [2 * offset for offset in packed.offset_px] == pytest.approx(np.subtract(stored_px, scaled_px), abs=1)
    pixels = stored_pixels(encode(smooth(*original_px[::-1])), store, size_px)
    assert pixels.shape == stored_px[::-1]
    left_px, top_px = packed.offset_px
    inside = np.zeros_like(pixels, bool)
    inside[top_px : top_px + scaled_px[1], left_px : left_px + scaled_px[0]] = True
    assert pixels[inside].min() > 0
    assert not pixels[~inside].any()


@pytest.mark.parametrize(("store", "size_px"), [("raw", 96), ("png", 96), ("png", 0), ("raw", 400)])
def test_scale_and_offset_take_a_point_of_the_original_to_its_place(store: Store, size_px: int) -> None:
    x, y, side = 120, 60, 24
    image = np.zeros((150, 300), np.uint8)
    image[y : y + side, x : x + side] = 255
    packed = pack_image(encode(image), store, size_px, 95)
    pixels = stored_pixels(encode(image), store, size_px).astype(np.float64)
    rows, columns = np.indices(pixels.shape) + 0.5
    centre = (pixels * columns).sum() / pixels.sum(), (pixels * rows).sum() / pixels.sum()
    expected = np.array([x, y]) + side / 2
    assert centre == pytest.approx(expected * packed.scale + packed.offset_px, abs=0.1)


def test_pixel_sums_are_those_of_the_stored_image() -> None:
    data = encode(smooth(100, 203))
    pixels = stored_pixels(data, "raw", 64).astype(np.int64)
    packed = pack_image(data, "raw", 64, 95)
    assert packed.pixel_sum == pixels.sum()
    assert packed.pixel_sum_of_squares == (pixels**2).sum()


@pytest.mark.parametrize(
    "image", [Image.fromarray(GREY), Image.fromarray(COLOUR), Image.fromarray(np.dstack([COLOUR, GREY]))]
)
def test_png_at_size_0_keeps_the_bytes_of_plain_8_bit_files(image: Image.Image) -> None:
    data = encode(image)
    assert pack_image(data, "png", 0, 95).data == data


@pytest.mark.parametrize(
    "data",
    [
        encode(smooth(48, 64), "jpeg"),
        encode(GREY.astype(np.uint16) * 16),
        encode(Image.fromarray(COLOUR).quantize(16)),
        encode(np.dstack([GREY, GREY])),
    ],
    ids=["jpeg", "16-bit", "palette", "grey and alpha"],
)
def test_png_at_size_0_stores_everything_else_as_lossless_8_bit_grey(data: bytes) -> None:
    packed = pack_image(data, "png", 0, 95)
    stored = Image.open(io.BytesIO(packed.data))
    assert (stored.format, stored.mode) == ("PNG", "L")
    assert np.array_equal(np.asarray(stored), decode_grey(data))


def test_jpeg_quality_trades_bytes_for_fidelity() -> None:
    data = encode(GREY)
    sizes = [len(pack_image(data, "jpeg", 0, quality).data) for quality in (10, 50, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2
    assert np.abs(stored_pixels(encode(smooth(48, 64)), "jpeg", 0, 95).astype(int) - smooth(48, 64)).max() <= 4


# --- a shard's bytes ------------------------------------------------------------------------------------------------

SAMPLES = [(f"key_{i}-x", bytes(range(256)) * i + b"x", seal_meta({"n": i}, i)) for i in range(5)]


def write_shard(folder: Path) -> ShardWriter:
    with ShardWriter(folder / "train-000000") as writer:
        for key, image, meta in SAMPLES:
            writer.add(key, "raw", image, meta)
    return writer


def test_shard_is_a_tar_of_image_and_json_by_turns(tmp_path: Path) -> None:
    writer = write_shard(tmp_path)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar.getmembers()} == {(0, 0, 0, 0o644, "")}
    assert found == [f for key, image, meta in SAMPLES for f in ((f"{key}.raw", image), (f"{key}.json", meta))]
    content = (tmp_path / "train-000000.tar").read_bytes()
    assert writer.num_samples == len(SAMPLES)
    assert writer.num_bytes == len(content)
    assert writer.sha256 == hashlib.sha256(content).hexdigest()
    assert writer.index_sha256 == hashlib.sha256((tmp_path / "train-000000.idx").read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-000000.idx", "train-000000.tar"]


def test_index_is_byte_for_byte_what_dali_itself_makes_of_the_tar(tmp_path: Path) -> None:
    write_shard(tmp_path)
    from wds2idx import IndexCreator

    with IndexCreator(str(tmp_path / "train-000000.tar"), str(tmp_path / "dali.idx"), verbose=False) as creator:
        creator.create_index()
    ours = (tmp_path / "train-000000.idx").read_bytes()
    assert ours == (tmp_path / "dali.idx").read_bytes()
    assert format_index(parse_index(ours)) == ours


def test_shard_that_fails_or_stays_empty_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train-000000") as writer:
        pass
    assert (writer.num_samples, writer.sha256) == (0, "")
    with pytest.raises(ValueError, match="too long"), ShardWriter(tmp_path / "train-000000") as writer:
        writer.add("k" * 101, "raw", b"", b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "index", [b"", b"v1.1 0\n", b"v1.2 1\n", b"v1.2 1\nraw 512 1 a.raw json x 2 a.json\n", b"\xff"]
)
def test_other_indexes_are_refused(index: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any of its kinds
        parse_index(index)


def test_every_flipped_byte_of_json_or_image_is_told() -> None:
    image, meta = b"pixels", {"patient": "12", "boxes": [{"x": 0.1}], "labels": None}
    sealed = seal_meta(meta, zlib.crc32(image))
    assert open_meta(sealed, image) == meta
    assert json.loads(sealed)["crc32"] == f"{zlib.crc32(image + json.dumps(meta).encode()):08x}"
    for position in range(len(sealed)):
        for bit in range(8):
            flipped = bytearray(sealed)
            flipped[position] ^= 1 << bit
            with pytest.raises(ValueError):  # noqa: PT011 - any of its kinds
                open_meta(bytes(flipped), image)
    with pytest.raises(ValueError, match="checksum"):
        open_meta(sealed, b"pixelz")


def test_a_jpeg_of_more_scans_than_any_needs_is_refused_undecoded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    progressive = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_PROGRESSIVE, 1))[1].tobytes()
    assert decode_grey(progressive).shape == (64, 64)
    scans = progressive[progressive.index(b"\xff\xda") : -2]
    with pytest.raises(Unusable, match=r"\d+ scans in one JPEG"):
        decode_grey(progressive[:-2] + scans * 100 + progressive[-2:])
