"""Sets of real images of one size from a folder, a zip file, an array or a data set, identified by their content.

A folder is read as torchvision's ``ImageFolder`` reads it: files with its endings, through symbolic links. But a
photograph that its camera marked as turned (EXIF) is turned upright, as viewers and Hugging Face's ``datasets`` do it.
Of a file with several frames, the first one is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.progress import progress
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")  # torchvision's
_OF_TORCHVISION = {  # name → class in torchvision, and whether it is the part for training
    f"{kind}-{split}".lower(): (kind, split == "train")
    for kind in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST")
    for split in ("train", "test")
}
DATASETS = (*_OF_TORCHVISION, *get_args(Bundled))
"""The data sets of torchvision that hold all images in one array, and check the MD5 of their files; bundled images."""
_EXIF_IN_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_LYING = (5, 6, 7, 8)  # orientations of EXIF with height and width exchanged
THREADS = min(8, os.cpu_count() or 1)
MIXER = np.uint32(2654435761)  # odd, so that no two products are equal (Knuth, Computer Programming, Section 6.4)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Real images of one size, identified by their content.

    Attributes:
        size: height and width.
        content: a SHA-256 of all images in their order.
        hash_prefixes: ``[M]``, four bytes of the hash of each image: of its file, or of its pixels in an array.
        pixels: reads the images at some indices among all, ``[B, H, W, C]`` in uint8; C is 1 if all are grey, else 3.
        chosen: ``[M]``, the indices among all of the images of a part; ``None`` for all.
    """

    size: tuple[int, int]
    content: str
    hash_prefixes: npt.NDArray[np.uint32]
    pixels: Callable[[npt.NDArray[np.intp]], npt.NDArray[np.uint8]]
    chosen: npt.NDArray[np.intp] | None = None

    @classmethod
    def of_array(cls, pixels: npt.NDArray[np.uint8], *, source: str) -> ImageSet:
        """The images ``[M, H, W, 1 or 3]`` uint8 of an array; ``source`` says where they come from, for messages.

        Raises:
            MetricError: the array has another shape or type.
        """
        if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3) or 0 in pixels.shape:
            raise MetricError(
                f"{source}: expected images [N, H, W, 1 or 3] in uint8, got {list(pixels.shape)} in {pixels.dtype}"
            )
        digest = hashlib.sha256(str(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        hash_prefixes = b"".join(hashlib.sha256(np.ascontiguousarray(image).data).digest()[:4] for image in pixels)
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        return cls(size, digest.hexdigest(), _as_prefixes(hash_prefixes), lambda rows: pixels[rows])

    @classmethod
    def of_files(cls, path: Path, *, folder: Path, most_decoded: int = 2**26) -> ImageSet:
        """The images in a folder and its subfolders, or in a zip file, in the order of their names.

        All files are read once for their size and content. The result is kept in ``folder`` until a file changes its
        name, length or time. Images are decoded once if all have at most ``most_decoded`` bytes.

        Raises:
            MetricError: there are no images, one cannot be read, or they differ in size.
        """
        files = _in_zip(path) if path.is_file() else _in_folder(path)
        entries = sorted((file for file in files if _is_image(file.name)), key=lambda entry: entry.name)
        if not entries:
            raise MetricError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        listing = hashlib.sha256(b"upright " + os.fsencode(path.resolve()))  # and of what shows that a file changed
        for entry in entries:
            listing.update(os.fsencode(f"\n{entry.name}\t{entry.stamp}"))
        kept_file = folder / f"images-{listing.hexdigest()[:32]}.json"
        try:
            (height, width), mode, content, prefixes = json.loads(kept_file.read_text())
        except (OSError, ValueError, TypeError):  # not kept yet, or damaged
            (height, width), mode, content, prefixes = scan = _scan(path, entries)
            write_atomically(kept_file, json.dumps(scan).encode(), error=MetricError)

        def pixels(rows: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
            with ThreadPoolExecutor(THREADS) as threads:
                return np.stack(list(threads.map(lambda row: _pixels(entries[row], mode), rows)))

        hash_prefixes = _as_prefixes(bytes.fromhex(prefixes))
        if len(entries) * height * width * len(mode) > most_decoded:
            return cls((height, width), content, hash_prefixes, pixels)
        # small enough to stay in memory: every extractor sees them
        decoded = functools.cache(lambda: pixels(np.arange(len(entries))))
        return cls((height, width), content, hash_prefixes, lambda rows: decoded()[rows])

    @classmethod
    def of_dataset(cls, name: str, *, root: Path) -> ImageSet:
        """The images of one of :data:`DATASETS`; torchvision stores its own in ``root``, and downloads what is missing.

        Raises:
            MetricError: its files cannot be downloaded, or are broken.
        """
        name = name.lower()
        if name not in _OF_TORCHVISION:
            images, _ = bundled_images(cast("Bundled", name))
            pixels = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
            return cls.of_array(pixels, source=name)
        kind, train = _OF_TORCHVISION[name]
        try:
            dataset = getattr(import_extra("torchvision.datasets"), kind)(str(root), train=train, download=True)
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: missing, or with another MD5
            raise MetricError(f"reference: {name} cannot be read from {root} ({error})") from error
        pixels = np.asarray(dataset.data)
        if pixels.ndim == 3:  # grey, as MNIST's
            pixels = pixels[..., None]
        return cls.of_array(pixels, source=name)

    @property
    def count(self) -> int:
        """How many, M."""
        return len(self.hash_prefixes)

    def part(self, fraction: float, *, held_out: bool) -> ImageSet:
        """The held-out images, about this fraction of all, or the rest.

        The hash of an image decides which part it belongs to, so copies of an image are never in both. All hashes of
        held-out images are small, so those of a part are mixed: it can be divided again.
        """
        [chosen] = np.nonzero((self.hash_prefixes < fraction * 2**32) == held_out)
        side = "held out" if held_out else "train"
        content = hashlib.sha256(f"{self.content}\n{side} {fraction!r}".encode()).hexdigest()
        mixed = self.hash_prefixes[chosen] * MIXER  # modulo 2**32
        indices = chosen if self.chosen is None else self.chosen[chosen]
        return dataclasses.replace(self, content=content, hash_prefixes=mixed, chosen=indices)

    def without(self, other: ImageSet) -> ImageSet:
        """The images that ``other`` does not have, by their hashes; all where no more are alike than by chance."""
        is_shared = np.isin(self.hash_prefixes, other.hash_prefixes)
        by_chance = self.count * other.count / 2**32
        if is_shared.sum() <= 10 * by_chance:
            return self
        [rest] = np.nonzero(~is_shared)
        content = hashlib.sha256(f"{self.content}\nwithout {other.content}".encode()).hexdigest()
        indices = rest if self.chosen is None else self.chosen[rest]
        return dataclasses.replace(self, content=content, hash_prefixes=self.hash_prefixes[rest], chosen=indices)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The images in order, in parts ``[B, C, H, W]`` in [−1, 1]. Raises MetricError for a broken file."""
        rows = self._rows()
        for first in range(0, self.count, batch_size):
            yield self._read(rows[first : first + batch_size])

    def evenly_spaced(self, count: int) -> Tensor:
        """At most ``count`` of the images ``[B, C, H, W]`` in [−1, 1]. Raises MetricError for a broken file."""
        chosen = np.linspace(0, self.count - 1, min(count, self.count)).astype(int)
        return self._read(self._rows()[chosen])

    def _rows(self) -> npt.NDArray[np.intp]:
        """``[M]``: the index of each image among all."""
        if self.chosen is None:
            return np.arange(self.count)
        return self.chosen

    def _read(self, rows: npt.NDArray[np.intp]) -> Tensor:
        """The images at these indices among all: ``[B, C, H, W]`` float32 in [−1, 1]."""
        pixels = self.pixels(rows)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def _as_prefixes(content: bytes) -> npt.NDArray[np.uint32]:
    """Four bytes for each image → ``[M]``, the same numbers on machines of either byte order."""
    return np.frombuffer(content, dtype=">u4").astype(np.uint32)


class _Entry(NamedTuple):
    """One file: its name, a stamp that changes when it changes, and a function that reads its bytes."""

    name: str
    stamp: str
    read: Callable[[], bytes]


def _in_folder(folder: Path) -> Iterator[_Entry]:
    """All files of a folder and its subfolders."""
    for path in _files_below(folder, above=frozenset()):
        stat = path.stat()
        stamp = f"{stat.st_size} {stat.st_mtime_ns}"
        yield _Entry(path.relative_to(folder).as_posix(), stamp, path.read_bytes)


def _files_below(folder: Path, *, above: frozenset[Path]) -> Iterator[Path]:
    """The files of a folder and its subfolders, through links.

    ``above`` are the real paths of the folders that led here: a link back to one of them would give its files again.
    """
    real = folder.resolve()
    if real in above:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files_below(path, above=above | {real})
        elif path.is_file():
            yield path


def _in_zip(path: Path) -> Iterator[_Entry]:
    """All files of an archive, which stays open while they are used."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a parser of foreign bytes may raise anything
        raise MetricError(f"{path}: is not a zip file ({error})") from error
    for info in archive.infolist():
        if not info.is_dir():
            yield _Entry(info.filename, f"{info.file_size} {info.CRC}", functools.partial(archive.read, info))


def _is_image(name: str) -> bool:
    """Whether it ends as an image does, and is not hidden: macOS and image viewers hide files beside images."""
    path = PurePath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _scan(path: Path, entries: Sequence[_Entry]) -> tuple[tuple[int, int], str, str, str]:
    """Read every file once; there is at least one. Raises MetricError if they differ in size, or one is unreadable.

    Returns:
        Height and width; Pillow's mode of all; a SHA-256 of all; and four bytes of each one's, in hexadecimal.
    """
    digest = hashlib.sha256()
    prefixes = bytearray()
    mode = "L"  # of all, if all are grey
    first_size, _, _ = _header(entries[0])
    with progress(f"reading {path.name}", len(entries)) as advance, ThreadPoolExecutor(THREADS) as threads:
        for entry, (size, is_grey, sha256) in zip(entries, threads.map(_header, entries), strict=True):
            if size != first_size:
                raise MetricError(
                    f"{path}: images differ in size: {entries[0].name} is {first_size[0]}x{first_size[1]} and "
                    f"{entry.name} {size[0]}x{size[1]}; bring them to the size of the samples first: how "
                    "they are scaled changes FID"
                )
            if not is_grey:
                mode = "RGB"
            digest.update(sha256)
            prefixes += sha256[:4]
            advance()
    return first_size, mode, digest.hexdigest(), prefixes.hex()


def _header(entry: _Entry) -> tuple[tuple[int, int], bool, bytes]:
    """Height and width, whether it is grey, and a SHA-256 of one file. Raises MetricError for more than 8 bits."""
    with _opened(entry) as (image, content):
        # of deep colours Pillow drops the lower bits, and only its decoder's name tells, such as RGB;16B
        is_deep = image.mode.startswith(("I", "F")) or ";16" in str(image.tile)
        orientation = _orientation(image, content)
        width, height = image.size
        if orientation in _LYING and image.format == "TIFF":  # newer Pillow gives their size as it is upright
            width, height = ImageOps.exif_transpose(image).size
        elif orientation in _LYING:
            width, height = height, width
        digest = hashlib.sha256(content)
        if orientation != 1:
            digest.update(b"turned upright")
        header = (height, width), image.mode in ("1", "L"), digest.digest()
    if is_deep:
        raise MetricError(f"{entry.name} has more than 8 bits per channel; convert it to 8 bits first")
    return header


def _pixels(entry: _Entry, mode: str) -> npt.NDArray[np.uint8]:
    """``[H, W, C]`` of one file; a palette or transparency becomes plain colours, as in torch-fidelity."""
    with _opened(entry) as (image, content):
        if _orientation(image, content) != 1:
            ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image.convert(mode), dtype=np.uint8).reshape(image.height, image.width, -1)


def _orientation(image: Image.Image, content: bytes) -> int:
    """How a file says that its pixels are turned: EXIF's numbers 1 (upright) to 8.

    Pillow decodes a PNG to look for that, so only those are asked whose bytes ``content`` may say something.
    """
    if image.format == "PNG" and not any(mark in content for mark in _EXIF_IN_PNG):
        return 1
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


@contextlib.contextmanager
def _opened(entry: _Entry) -> Iterator[tuple[ImageFile.ImageFile, bytes]]:
    """An image and the bytes of its file; errors while this is open become a MetricError that names the file."""
    try:
        content = entry.read()
        with Image.open(io.BytesIO(content)) as image:
            yield image, content
    except UnidentifiedImageError as error:  # it names no file
        raise MetricError(f"{entry.name}: cannot be read as an image; remove it or fetch it again") from error
    except Exception as error:  # damaged files make Pillow raise anything
        raise MetricError(f"{entry.name}: cannot be read as an image ({error}); remove it or fetch it again") from error
