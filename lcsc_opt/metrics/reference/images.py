"""Sets of real images of one size: a folder, a zip file, or an array. The content identifies them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.files import is_hidden, write_atomically
from lcsc_opt.base.progress import progress

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
DEEP_MODES = ("I", "F")  # more than 8 bits a channel
GREY_MODES = frozenset({"1", "L"})
UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, RuntimeError, MemoryError, zlib.error, zipfile.BadZipFile,
    Image.DecompressionBombError,
)  # fmt: skip
THREADS = min(8, os.cpu_count() or 1)
SCANNED = 256  # files between two steps of the progress bar


class ImageSet(Protocol):
    """Real images of one size."""

    @property
    def count(self) -> int:
        """How many, M."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        ...

    @property
    def content(self) -> str:
        """A SHA-256 of all images in their order."""
        ...

    @property
    def marks(self) -> bytes:
        """Four bytes of the hash of each image's content; those of files and of arrays are different ones."""
        ...

    def part(self, fraction: float, *, held_out: bool) -> ImageSet:
        """The held-out images, about this fraction of all, or the others; the hash of each image's content decides."""
        ...

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The images in order, in parts ``[B, C, H, W]`` in [−1, 1]; C is 1 where all are grey, else 3."""
        ...


@dataclasses.dataclass(frozen=True)
class _Facts:
    """The facts of a set, from reading every file once; ``marks`` are eight hexadecimal digits of each file's hash."""

    count: int
    height: int
    width: int
    grey: bool
    content: str
    marks: str


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One image file: its name, a stamp that changes with it, and what reads its bytes."""

    name: str
    stamp: str
    read: Callable[[], bytes]


class ImageFiles:
    """The images in a folder and its subfolders, or in a zip file, in the order of their names.

    All files are read once for their size and content. The result is kept in ``cache`` until a file changes its name,
    length or time.

    Args:
        path: a folder or a ``.zip``.
        cache: a folder for that result.

    Raises:
        MetricError: there are no images, one cannot be read, or they differ in size.
    """

    def __init__(self, path: Path, *, cache: Path) -> None:
        self._entries = _in_zip(path) if path.is_file() else _in_folder(path)
        if not self._entries:
            raise MetricError(f"{path}: holds no images ({', '.join(sorted(SUFFIXES))})")
        self._facts = _remembered_facts(path, self._entries, cache)

    @property
    def count(self) -> int:
        """How many, M."""
        return self._facts.count

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self._facts.height, self._facts.width

    @property
    def content(self) -> str:
        """A SHA-256 of all files in their order."""
        return self._facts.content

    @property
    def marks(self) -> bytes:
        """Four bytes of each file's hash; none of a part."""
        return bytes.fromhex(self._facts.marks)

    def part(self, fraction: float, *, held_out: bool) -> ImageFiles:
        """The held-out files, about this fraction of all, or the others."""
        facts, chosen = self._facts, _chosen(self.marks, fraction, held_out=held_out)
        part = copy.copy(self)
        part._entries = [entry for entry, taken in zip(self._entries, chosen, strict=True) if taken]
        content = _content_of_part(facts.content, fraction, held_out=held_out)
        part._facts = dataclasses.replace(facts, count=len(part._entries), content=content, marks="")
        return part

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The images in order, ``[B, C, H, W]`` in [−1, 1].

        Raises:
            MetricError: for a file that is broken.
        """
        mode = "L" if self._facts.grey else "RGB"
        with ThreadPoolExecutor(THREADS) as threads:
            for first in range(0, self.count, batch_size):
                part = self._entries[first : first + batch_size]
                yield _scaled(np.stack(list(threads.map(lambda entry: _pixels(entry, mode), part))))


class ImageArray:
    """Images in one array.

    Args:
        pixels: ``[M, H, W, C]`` uint8, C of 1 or 3.
        source: where they come from, for messages.

    Raises:
        MetricError: for any other array.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], *, source: str) -> None:
        if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3) or 0 in pixels.shape:
            raise MetricError(
                f"{source}: expected images [N, H, W, 1 or 3] in uint8, got {list(pixels.shape)} in {pixels.dtype}"
            )
        self._pixels, self._source = pixels, source
        self.count = len(pixels)
        self.size = (int(pixels.shape[1]), int(pixels.shape[2]))

    @property
    def content(self) -> str:
        """A SHA-256 of the shape and all pixels."""
        digest = hashlib.sha256(str(self._pixels.shape).encode())
        digest.update(np.ascontiguousarray(self._pixels).data)
        return digest.hexdigest()

    @property
    def marks(self) -> bytes:
        """Four bytes of the hash of each image's pixels."""
        return b"".join(hashlib.sha256(np.ascontiguousarray(image).data).digest()[:4] for image in self._pixels)

    def part(self, fraction: float, *, held_out: bool) -> ImageArray:
        """The held-out images, about this fraction of all, or the others.

        Raises:
            MetricError: there is none.
        """
        return ImageArray(self._pixels[_chosen(self.marks, fraction, held_out=held_out)], source=self._source)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The images in order, ``[B, C, H, W]`` in [−1, 1]."""
        for first in range(0, self.count, batch_size):
            yield _scaled(self._pixels[first : first + batch_size])


def shared_images(images: ImageSet, other: ImageSet) -> int:
    """How many images of ``other`` are among ``images``, too; up to chance, which is one in 2³² for each pair."""
    known, asked = (np.frombuffer(each.marks, dtype=">u4") for each in (images, other))
    return int(np.isin(asked, known).sum())


def _chosen(marks: bytes, fraction: float, *, held_out: bool) -> npt.NDArray[np.bool_]:
    """``[M]``: whether each image is in the part, from four bytes of its content's hash; copies are in one part."""
    return np.asarray((np.frombuffer(marks, dtype=">u4") < fraction * 2**32) == held_out)


def _content_of_part(content: str, fraction: float, *, held_out: bool) -> str:
    side = "held out" if held_out else "train"
    return hashlib.sha256(f"{content}\n{side} {fraction!r}".encode()).hexdigest()


def _scaled(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """``[B, H, W, C]`` uint8 → ``[B, C, H, W]`` in [−1, 1]."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return images.float() / 127.5 - 1


def _in_folder(folder: Path) -> list[_Entry]:
    entries = []
    for path in sorted(path for path in folder.rglob("*") if is_image(path.relative_to(folder)) and path.is_file()):
        stat = path.stat()
        entries.append(
            _Entry(path.relative_to(folder).as_posix(), f"{stat.st_size} {stat.st_mtime_ns}", path.read_bytes)
        )
    return entries


def is_image(name: PurePath | str) -> bool:
    """Whether a name, or a relative path, is that of an image that is not hidden."""
    return PurePath(name).suffix.lower() in SUFFIXES and not is_hidden(name)


def _in_zip(path: Path) -> list[_Entry]:
    try:
        archive = zipfile.ZipFile(path)
    except UNREADABLE as error:
        raise MetricError(f"{path}: is no zip file ({error})") from error
    infos = [info for info in sorted(archive.infolist(), key=lambda info: info.filename) if is_image(info.filename)]
    return [
        _Entry(info.filename, f"{info.file_size} {info.CRC}", functools.partial(archive.read, info)) for info in infos
    ]


def _remembered_facts(path: Path, entries: Sequence[_Entry], cache: Path) -> _Facts:
    listing = hashlib.sha256(str(path.resolve()).encode())
    for entry in entries:
        listing.update(f"\n{entry.name}\t{entry.stamp}".encode())
    remembered = cache / f"images-{listing.hexdigest()[:32]}.json"
    try:
        return _Facts(**json.loads(remembered.read_text()))
    except (OSError, ValueError, TypeError):  # not there yet, or broken: look again
        facts = _look_at(path, entries)
    write_atomically(remembered, json.dumps(dataclasses.asdict(facts)).encode(), error=MetricError)
    return facts


def _look_at(path: Path, entries: Sequence[_Entry]) -> _Facts:
    """Read every file once: its header for size and colours, its bytes for the content."""
    digest, marks = hashlib.sha256(), bytearray()
    first: tuple[str, tuple[int, int]] | None = None
    grey = True
    with progress(f"looking at {path.name}", len(entries)) as advance, ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(entries), SCANNED):
            part = entries[start : start + SCANNED]
            for entry, (file_digest, size, mode) in zip(part, threads.map(_header, part), strict=True):
                first = first or (entry.name, size)
                if size != first[1]:
                    raise MetricError(
                        f"{path}: images differ in size: {first[0]} is {first[1][0]}x{first[1][1]} and {entry.name} "
                        f"{size[0]}x{size[1]}; bring them to the size of the samples first, since how they are scaled "
                        "changes FID"
                    )
                if mode.startswith(DEEP_MODES):
                    raise MetricError(f"{path}: {entry.name} has more than 8 bits a channel; write it with 8 first")
                grey = grey and mode in GREY_MODES
                digest.update(file_digest)
                marks += file_digest[:4]
            advance(len(part))
    height, width = first[1] if first else (0, 0)
    return _Facts(len(entries), height, width, grey, digest.hexdigest(), marks.hex())


def _no_image(entry: _Entry, error: Exception) -> MetricError:
    reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else str(error)
    return MetricError(f"{entry.name}: cannot be read as an image ({reason}); remove it or fetch it again")


def _header(entry: _Entry) -> tuple[bytes, tuple[int, int], str]:
    try:
        content = entry.read()
        with Image.open(io.BytesIO(content)) as image:
            return hashlib.sha256(content).digest(), (image.height, image.width), image.mode
    except (*UNREADABLE, UnidentifiedImageError) as error:
        raise _no_image(entry, error) from error


def _pixels(entry: _Entry, mode: str) -> npt.NDArray[np.uint8]:
    """``[H, W, C]`` of one file; a palette or transparency becomes plain colours, as in torch-fidelity."""
    try:
        with Image.open(io.BytesIO(entry.read())) as image:
            pixels = np.asarray(image.convert(mode), dtype=np.uint8)
    except (*UNREADABLE, UnidentifiedImageError) as error:
        raise _no_image(entry, error) from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
