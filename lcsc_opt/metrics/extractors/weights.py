"""Files with the weights of published networks: found or downloaded, and read without executing anything."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError, TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints import read_checkpoint

ANSWER_SECONDS = 20.0  # for a server to say whether a file is there


def torch_fidelity_module(name: str) -> Any:
    """A module of torch-fidelity, which cannot always be imported as it is.

    Raises:
        MetricError: it cannot be imported at all.
    """
    try:
        return import_module(f"torch_fidelity.{name}")
    except ImportError as error:
        raise MetricError(f"this metric needs torch-fidelity: {error}") from error


class PublishedFile(NamedTuple):
    """Published weights in torch's hub folder, downloaded where they are missing.

    Attributes:
        url: where they are published.
        name: of the file in the folder of torch's hub.
        setting: the extractor's name in the setting ``weights``, for the message.
        hash_prefix: the beginning of the file's SHA-256, where it is known.
    """

    url: str
    name: str
    setting: str
    hash_prefix: str | None = None

    def path(self, *, download: bool = True) -> Path:
        """Where they are; without ``download`` a missing file is only asked for at its address.

        Raises:
            MetricError: it cannot be downloaded; the message says what to fetch and where to put it.
        """
        path = Path(torch.hub.get_dir()) / "checkpoints" / self.name
        if path.exists():
            return path
        try:
            if download:
                notice(f"{self.setting}: downloading its weights from {self.url}")
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.hash_prefix)
            else:
                request = Request(self.url, method="HEAD")  # noqa: S310 - no user gives the address
                urlopen(request, timeout=ANSWER_SECONDS).close()  # noqa: S310
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is another
            raise MetricError(
                f"the weights of {self.setting} cannot be downloaded ({error}); fetch {self.url} and put it at {path}, "
                f"or give its path in the setting weights: {{{self.setting}: PATH}}"
            ) from error
        return path


def read_weights(path: Path, *, what: str) -> dict[str, Tensor]:
    """The state dict in a file of any checkpoint format, such as OpenAI's archive. No code in it is run.

    Args:
        path: the file.
        what: whose weights they are, for messages.

    Raises:
        MetricError: it does not exist, would run code, or holds anything but finite tensors.
    """
    try:
        read = read_checkpoint(path, key="").tensors
    except TrajectoryError as error:
        raise MetricError(f"{str(error).rstrip('.')}; give the weights of {what}") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in read.values()):
        raise MetricError(f"{path}: holds weights that are not finite; fetch the file again")
    return {name: tensor.clone() for name, tensor in read.items()}  # not mapped: the file may be replaced
