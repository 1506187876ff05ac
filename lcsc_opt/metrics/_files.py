"""Writing a file so that readers see either the old one or the whole new one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from lcsc_opt.errors import MetricError


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Write the parts of ``content`` to ``path``, whose folder is created.

    Raises MetricError when the disk refuses.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise MetricError(f"{path}: cannot be written ({error.strerror or error})") from error
