"""Reading members of foreign zip files, such as ``.npz``, without trusting their headers.

A few megabytes can inflate to a thousand times their size, so the sizes in a header are checked before anything is
read.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import MetricError

FREE_BYTES = 2**26  # a member up to this size is read, however well it is compressed
MOST_INFLATED = 200  # times its compressed size; pixels and floats stay far below, zeros reach 1,030
HEADER_BYTES = 2**16
ENCRYPTED = 1  # among a member's flags
READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
Shape = tuple[int, ...]


def check_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, *, most: int | None = None) -> None:
    """Raise MetricError for a member that cannot be read safely, or that has more than ``most`` bytes."""
    if info.flag_bits & ENCRYPTED:
        raise MetricError(f"{info.filename} is encrypted; write the archive without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others cannot be read in parts
        raise MetricError(f"{info.filename} is compressed in a rare way; write the archive with deflate or without")
    if info.compress_size > Path(archive.filename or "").stat().st_size:
        raise MetricError(f"{info.filename} is cut off; copy the file again")
    if info.file_size > max(FREE_BYTES, MOST_INFLATED * info.compress_size):
        raise MetricError(
            f"{info.filename} would take {info.file_size:,} bytes out of {info.compress_size:,}; if that is meant, "
            "write it without compression"
        )
    if most is not None and info.file_size > most:
        raise MetricError(f"{info.filename} has {info.file_size:,} bytes, at most {most:,} are read; leave it out")


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The content of a checked member, at most as many bytes as its header states."""
    with archive.open(info) as stream:  # the length is given, since read() alone inflates everything at once
        return stream.read(info.file_size)


def array_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Name → member of an ``.npz``."""
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def array_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[Shape, np.dtype[Any]]:
    """Shape and type of an array in an ``.npz``; nothing else of it is read.

    Raises:
        MetricError: the member's header is impossible.
        ValueError: it is not an array, it holds objects, or its length does not fit its shape.
    """
    check_member(archive, info)
    with archive.open(info) as stream:
        start = io.BytesIO(stream.read(HEADER_BYTES))
    return _header(start, info.file_size)


def read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """An array in an ``.npz``. Raises as :func:`array_header`."""
    array_header(archive, info)
    with archive.open(info) as stream:
        array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _header(start: IO[bytes], size: int) -> tuple[Shape, np.dtype[Any]]:
    version = np.lib.format.read_magic(start)
    if version not in READ_HEADER:
        raise ValueError(f"an array of version {version} is no plain one")
    try:
        shape, _, dtype = READ_HEADER[version](start)
    except (RecursionError, MemoryError) as error:  # of Python's parser
        raise ValueError("an array with a header that is none") from error
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not read")
    if start.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array {list(shape)} in {dtype} is not {size:,} bytes long")
    return shape, dtype
