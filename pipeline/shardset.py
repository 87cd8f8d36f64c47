"""A packed shard set: open it, read it, verify it. It may lie on `s3://` or wherever else fsspec reaches."""

import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import cv2

from errors import UserError
from pipeline.packing import (
    EXTENSIONS,
    TAR_BLOCK,
    IndexEntry,
    ShardWriter,
    Store,
    Unusable,
    decode_grey,
    format_index,
    open_meta,
    parse_index,
    sample_block,
    tar_header,
)
from pipeline.storage import open_storage, reading

FORMAT = "dira-shard-set"
VERSION = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.csv"
NUM_READERS = 16
"""Small files read at the same time: one after another takes long over a network."""
WORK_FOLDER = ".pack"
"""What `pack` needs until it is done; an interrupted pack leaves it behind."""


class Split(NamedTuple):
    """The shards of one split, as DALI's webdataset reader wants them."""

    tar_paths: list[str]
    index_paths: list[str]
    num_samples: int


class Shard(NamedTuple):
    """A tar and its index, as the manifest describes them."""

    split: str
    name: str
    """Of the tar."""
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def tar(self) -> str:
        """Path in the set."""
        return f"{self.split}/{self.name}"

    @property
    def index(self) -> str:
        """Path in the set."""
        return f"{self.split}/{self.name.removesuffix('.tar')}.idx"


@dataclass(frozen=True)
class ShardSet:
    """What `shard_cxr14.py pack` wrote."""

    path: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a shard set and look whether all its files are there, as long as they should be, and indexed.

        It takes the index files' bytes, which must be those that were packed, and the headers of each tar's first and
        last sample: about a second for a million samples. Only `verify_shard_set` sees what has changed in images.

        Raises:
            UserError: If not; one line that says what is wrong.
        """
        shard_set = cls.with_manifest(path)
        of_shards = {n: p for n, p in shard_set.find_file_problems().items() if n.endswith((".tar", ".idx"))}
        indexed = [shard for shard in shard_set.shards if not {shard.index, shard.tar} & of_shards.keys()]
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for problems in pool.map(shard_set.find_index_problem, indexed):
                of_shards |= problems
        if of_shards:
            more = f" (and {len(of_shards) - 1} more)" if len(of_shards) > 1 else ""
            raise UserError(f"{next(iter(of_shards.values()))}{more}; run shard_cxr14.py verify {path}, or pack again")
        return shard_set

    @classmethod
    def with_manifest(cls, path: str | Path) -> Self:
        """Open a shard set by its manifest alone, whatever has become of its other files."""
        path = str(path).rstrip("/")
        manifest = read_manifest(path)
        if manifest is None:
            filesystem, root = open_storage(path)
            with reading(path):
                is_folder = filesystem.isdir(root)
            what = f"no shard set ({MANIFEST} is missing)" if is_folder else "no such folder"
            raise UserError(f"{path}: {what}; make one with shard_cxr14.py pack")
        shard_set = cls(path, manifest)
        try:
            is_complete = shard_set.store in EXTENSIONS and shard_set.size_px >= 0 and bool(shard_set.shards)
            is_complete &= all(isinstance(name, str) for name in shard_set.label_names)
        except (KeyError, TypeError, AttributeError):
            is_complete = False
        if not is_complete:
            raise UserError(f"{path}/{MANIFEST}: damaged; pack again")
        return shard_set

    @property
    def store(self) -> Store:
        """How images are stored."""
        return self.manifest["store"]

    @property
    def size_px(self) -> int:
        """Side (`raw`) or short side of the stored images; 0 for their original size."""
        return self.manifest["size_px"]

    @property
    def label_names(self) -> tuple[str, ...]:
        """What the entries of a sample's `labels` stand for; empty if no labels are known."""
        return tuple(self.manifest["label_names"])

    @property
    def shards(self) -> list[Shard]:
        """All of them, split by split."""
        return [Shard(split, **shard) for split, info in self.manifest["splits"].items() for shard in info["shards"]]

    def split(self, name: str) -> Split:
        """The files of a split.

        Raises:
            UserError: If the set has no such split.
        """
        shards = self._shards_of(name)
        return Split(
            [f"{self.path}/{shard.tar}" for shard in shards],
            [f"{self.path}/{shard.index}" for shard in shards],
            sum(shard.samples for shard in shards),
        )

    def _shards_of(self, split: str) -> list[Shard]:
        if split not in self.manifest["splits"]:
            raise UserError(f"{self.path}: has no split {split!r}, only {', '.join(self.manifest['splits'])}")
        return [shard for shard in self.shards if shard.split == split]

    def read_samples(self, split: str) -> Iterator[tuple[str, dict[str, Any], bytes]]:
        """Each sample's key, JSON (see `packing.seal_meta`) and stored image, in the order of packing.

        Raises:
            UserError: If the set has no such split, cannot be read, or a sample's checksum is wrong.
        """
        for shard in self._shards_of(split):
            entries = parse_index(self.read(shard.index))
            with self.open_file(shard.tar) as tar:
                for entry in entries:
                    tar.seek(entry.image_offset)
                    image = tar.read(entry.image_size)
                    tar.seek(entry.meta_offset)
                    try:
                        meta = open_meta(tar.read(entry.meta_size), image)
                    except ValueError:
                        raise UserError(f"{self.path}/{shard.tar}: sample {entry.key} is damaged; pack again") from None
                    yield entry.key, meta, image

    @contextmanager
    def open_file(self, name: str) -> Iterator[BinaryIO]:
        """A file of the set, for reading; what keeps us from it, then or later, is a UserError."""
        filesystem, root = open_storage(self.path)
        with reading(f"{self.path}/{name}"), filesystem.open(f"{root}/{name}", "rb") as file:
            yield file

    def read(self, name: str) -> bytes:
        """The content of a file of the set."""
        filesystem, root = open_storage(self.path)
        with reading(f"{self.path}/{name}"):
            return filesystem.cat_file(f"{root}/{name}")

    def find_file_problems(self) -> dict[str, str]:
        """What is missing, surplus or not as long as it should be: a line for each file, by its name in the set."""
        filesystem, root = open_storage(self.path)
        with reading(self.path):
            found = filesystem.find(root, detail=True)
        sizes = {name.removeprefix(root).lstrip("/"): info["size"] for name, info in found.items()}
        shards = self.shards
        known = {MANIFEST, REJECTED} | {name for shard in shards for name in (shard.tar, shard.index)}
        problems = dict.fromkeys(sorted(known - sizes.keys()), "missing")
        surplus = sorted(name for name in sizes.keys() - known if not name.startswith(f"{WORK_FOLDER}/"))
        problems |= dict.fromkeys(surplus, "not in the manifest")
        for shard in shards:
            if sizes.get(shard.tar, shard.bytes) != shard.bytes:
                problems[shard.tar] = f"{sizes[shard.tar]} bytes instead of {shard.bytes}"
        return {name: f"{self.path}/{name}: {problem}" for name, problem in problems.items()}

    def find_index_problem(self, shard: Shard) -> dict[str, str]:
        """What is wrong with a shard's index, or with its tar as far as two samples tell: a line by the file's name."""
        index = self.read(shard.index)
        if hashlib.sha256(index).hexdigest() != shard.index_sha256:
            return {shard.index: f"{self.path}/{shard.index}: can't be the index of its tar"}
        first_line, last_line = index.split(b"\n", 2)[1], index[:-1].rpartition(b"\n")[2]
        filesystem, root = open_storage(self.path)
        for entry in parse_index(b"v1.2 2\n%s\n%s\n" % (first_line, last_line)):
            offset, header = (
                entry.image_offset - TAR_BLOCK,
                tar_header(f"{entry.key}.{entry.extension}", entry.image_size),
            )
            with reading(f"{self.path}/{shard.tar}"):
                found = filesystem.cat_file(f"{root}/{shard.tar}", start=offset, end=offset + TAR_BLOCK)
            if found != header:
                return {shard.tar: f"{self.path}/{shard.tar}: sample {entry.key} is not where it was packed"}
        return {}


def read_manifest(path: str) -> dict[str, Any] | None:
    """A shard set's manifest, or None if there is none.

    Raises:
        UserError: If it cannot be reached, or is not one that this version can read.
    """
    where = f"{path}/{MANIFEST}"
    filesystem, root = open_storage(path)
    with reading(where):
        try:
            content = filesystem.cat_file(f"{root}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        manifest = json.loads(content)
    except ValueError:
        raise UserError(f"{where}: damaged; pack again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{where}: not the manifest of a shard set")
    if manifest.get("version") != VERSION:
        raise UserError(f"{where}: has version {manifest.get('version')}, this program reads {VERSION}; pack again")
    return manifest


# --- verification ---------------------------------------------------------------------------------------------------


def verify_shard_set(
    path: str | Path, num_workers: int = 1, advance: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Check every byte of a shard set against its checksums, and that every image decodes.

    Args:
        path: The shard set.
        num_workers: Shards looked at at the same time.
        advance: Called with the number of samples that have been dealt with since the last call.

    Returns:
        What is wrong, a line each, with the shard and, where the damage lies in a sample, its key.

    Raises:
        UserError: If it has no manifest that can be read.
    """
    cv2.setNumThreads(1)
    shard_set = ShardSet.with_manifest(path)
    problems = shard_set.find_file_problems()
    shards = [shard for shard in shard_set.shards if shard.tar not in problems]
    with ThreadPoolExecutor(num_workers) as pool:
        verify = lambda shard: verify_shard(  # noqa: E731
            shard_set, shard, has_index=shard.index not in problems, advance=advance
        )
        found = list(pool.map(verify, shards))
    return [*problems.values(), *(problem for group in found for problem in group)]


def verify_shard(
    shard_set: ShardSet, shard: Shard, *, has_index: bool = True, advance: Callable[[int], None] = lambda _: None
) -> list[str]:
    """What is wrong with one shard, a line each; arguments as in `verify_shard_set`."""
    tar, index = f"{shard_set.path}/{shard.tar}", f"{shard_set.path}/{shard.index}"
    problems = []
    content = shard_set.read(shard.index) if has_index else b""
    if hashlib.sha256(content).hexdigest() == shard.index_sha256:
        entries = parse_index(content)
    else:
        entries = _list_tar(shard_set, shard)
        if has_index:
            problems.append(f"{index}: {_index_problem(entries, content)}")
    digest, position, num_checked = hashlib.sha256(), 0, 0
    with shard_set.open_file(shard.tar) as file:
        for entry in entries:
            end = entry.meta_offset + entry.meta_size + -entry.meta_size % 512
            block = file.read(end - position)
            digest.update(block)
            problem = _sample_problem(shard_set, entry, block, position)
            if problem:
                problems.append(f"{tar}: sample {entry.key}: {problem}")
            position = end
            num_checked += 1
            advance(1)
        rest = file.read()
    digest.update(rest)
    if rest != ShardWriter.END:
        problems.append(f"{tar}: damaged after its last readable sample")
    if digest.hexdigest() != shard.sha256 and not problems:
        problems.append(f"{tar}: not what was packed")
    if num_checked < shard.samples:
        advance(shard.samples - num_checked)
    return problems


def _sample_problem(shard_set: ShardSet, entry: IndexEntry, block: bytes, start: int) -> str | None:
    """What is wrong with a sample, given its bytes in the tar and where they start."""
    image = block[entry.image_offset - start :][: entry.image_size]
    sealed = block[entry.meta_offset - start :][: entry.meta_size]
    try:
        meta = open_meta(sealed, image)
    except ValueError:
        return "its image or JSON is damaged (wrong checksum)"
    if sample_block(entry.key, entry.extension, image, sealed)[0] != block:
        return "the tar is damaged around it"
    if shard_set.store == "raw":
        stored_size_px = [shard_set.size_px, shard_set.size_px] if len(image) == shard_set.size_px**2 else None
    else:
        try:
            stored_size_px = list(decode_grey(image).shape[::-1])
        except Unusable as error:
            return str(error)
    return None if meta.get("stored_size_px") == stored_size_px else "its image is not of the size that its JSON says"


def _list_tar(shard_set: ShardSet, shard: Shard) -> list[IndexEntry]:
    """A tar's index by its own headers, as far as they can be read."""
    entries: list[IndexEntry] = []
    try:
        with shard_set.open_file(shard.tar) as file, tarfile.open(fileobj=file) as archive:
            files = iter(archive)
            for image, meta in zip(files, files, strict=False):
                key, _, extension = image.name.partition(".")
                entries.append(IndexEntry(key, extension, image.offset_data, image.size, meta.offset_data, meta.size))
    except (tarfile.TarError, UnicodeDecodeError):
        pass
    return entries


def _index_problem(entries: list[IndexEntry], content: bytes) -> str:
    """Where an index departs from the one that its tar should have."""
    lines = itertools.zip_longest(format_index(entries).split(b"\n"), content.split(b"\n"))
    line = next((number for number, (expected, found) in enumerate(lines) if expected != found), None)
    if line is None:
        return "its checksum in the manifest is wrong"
    return (
        f"damaged at sample {entries[min(line, len(entries)) - 1].key}" if line and entries else "damaged at its start"
    )
