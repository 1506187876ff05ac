"""Files of safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.contents import Refused
from lcsc_opt.checkpoints.pickles import MALFORMED

MAX_HEADER = 16 * 2**20  # bytes; 1,000 tensors take some 100,000
MAX_TENSORS = 100_000


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """All tensors, mapped from the file, and the texts of the header.

    Raises:
        Refused: truncated, not safetensors, or made to harm.
        OSError: it cannot be opened.
    """
    file = _opened(path)
    try:
        with file:
            names = file.keys()
            if len(names) > MAX_TENSORS:
                raise Refused(f"holds more than {MAX_TENSORS:,} tensors: leave it out.")
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (Refused, OSError):
        raise
    except Exception as error:  # the parser's own type is private
        raise Refused(MALFORMED) from error


def read_header_texts(path: Path) -> Mapping[str, str]:
    """The texts of the header; the tensors are not read.

    Raises:
        Refused, OSError: as :func:`read_safetensors`.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def write_safetensors(tensors: dict[str, Tensor], path: Path, texts: Mapping[str, str]) -> None:
    """Write tensors, with texts in the header.

    The bytes are the same each time: the texts are sorted, since safetensors leaves their order open.

    Raises:
        TrajectoryError: a tensor has a dtype that safetensors does not know.
        OSError, SafetensorError: the disk refuses.
    """
    try:
        save_file(tensors, path, metadata=dict(texts))
    except KeyError as error:  # of its table of dtypes
        unknown = next((name for name, tensor in tensors.items() if tensor.dtype in error.args), "")
        raise TrajectoryError(
            f"Tensor {unknown!r} is {error.args[0]}, which safetensors cannot hold: write a .pt file (--as pt)."
        ) from error
    with path.open("r+b") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        ordered = {**header, "__metadata__": dict(sorted(texts.items()))}
        content = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(content) == size:  # else the header is written in another way, and is left as it is
            file.seek(8)
            file.write(content)


def _opened(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < size <= min(MAX_HEADER, path.stat().st_size - 8):
        raise Refused(MALFORMED)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except OSError:
        raise
    except Exception as error:
        raise Refused(MALFORMED) from error
