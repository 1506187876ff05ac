"""Scores a model by a command that reads it from the disk, such as an evaluation harness."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.checkpoints.lora import ADAPTER_CONFIG
from lcsc_opt.checkpoints.names import TORCH_SUFFIXES
from lcsc_opt.checkpoints.weights import write_safetensors
from lcsc_opt.objective.command_output import json_of_command, last_number, metrics_in_json
from lcsc_opt.objective.command_process import run_command
from lcsc_opt.objective.model_files import digests
from lcsc_opt.objective.scorer import Draw, metrics_of

_OF_DRAW = ("group", "seed", "size")
_PLACEHOLDERS = ("model", "out", "python", *_OF_DRAW)
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_WEIGHT_SUFFIXES = (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", *TORCH_SUFFIXES)
_LARGEST_DIGESTED = 2**24  # bytes; larger files are not compared when a study continues


class CommandScorer:
    """Writes each merged model to a temporary folder, runs a command on it, and reads its number.

    In the command, ``{model}`` is a folder like ``folder`` with the merged weights; or a ``.safetensors`` file if
    there is no folder. ``{out}`` is a path at which nothing exists yet; for ``{out}/name.json`` the folder exists.
    ``{group}``, ``{seed}`` and ``{size}`` are those of the :class:`Draw`. ``{python}`` is the Python that runs this
    search, with its packages. No shell is involved.

    Args:
        command: split into words as by a shell.
        context: finds the files that the command names.
        read: where the number is: keys with dots between them, in the newest JSON below ``{out}``, else in the JSON
            on the standard output. ``{group}``, ``{seed}`` and ``{size}`` may be in it. ``None`` uses the last number
            on the standard output.
        folder: a model's folder, with its configuration and tokenizer.

    Raises:
        ObjectiveError: the command cannot be split or found, has no ``{model}``, or an unknown name in braces.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        command: str,
        context: BuildContext,
        *,
        read: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self._command = command
        self._read = read
        try:
            self._words = [_located(word, context) for word in shlex.split(command)]
        except ValueError as error:
            raise ObjectiveError(f"command: cannot be split into words: {error}") from error
        used = _placeholders("command", command, _PLACEHOLDERS)
        if "model" not in used:
            raise ObjectiveError("command: does not say where the model goes; put {model} there")
        used |= _placeholders("read", read or "", _OF_DRAW)
        self.takes_draw = not used.isdisjoint(_OF_DRAW)
        self.takes_group = "group" in used
        program = self._words[0].replace("{python}", sys.executable)
        if shutil.which(program) is None:
            raise ObjectiveError(
                f"command: {self._words[0]} does not exist, or cannot be run; check the name and its path"
            )
        self._is_folder = folder is not None
        self._weights_name = "model.safetensors"
        self._copied_files: list[Path] = []
        if folder is not None:
            self._weights_name, self._copied_files = _model_files(folder)

    def measure(
        self, weights: dict[str, Tensor], draw: Draw, varying: Collection[str] | None = None
    ) -> tuple[dict[str, float], Mapping[str, Tensor]]:
        """Write the model, run the command, read its number, and remove all files.

        Raises:
            ObjectiveError: the command failed or gave no number; or a gradient is asked for.
        """
        if varying is not None:
            raise ObjectiveError(f"a gradient was asked for, and {self.why_no_gradient(varying, draw.size)}")
        with tempfile.TemporaryDirectory(prefix="lcsc-", ignore_cleanup_errors=True) as place:
            model = self._write_model(weights, Path(place) / "model")
            out = Path(place) / "out" / "out"
            out.parent.mkdir()
            if any("{out}/" in word for word in self._words):
                out.mkdir()
            values = {"model": str(model), "out": str(out), "python": sys.executable, **_values_of(draw)}
            output = run_command([_filled(word, values) for word in self._words])
            if self._read is None:
                return metrics_of(last_number(output), "score"), {}
            content = json_of_command(out, output)
            path = _filled(self._read, _values_of(draw))
            return metrics_in_json(content, path, name=_metric_name(self._read)), {}

    def why_no_gradient(self, varying: Collection[str] | None, size: int | None) -> str | None:  # noqa: ARG002 - Scorer's
        """Why there is no gradient, as the end of a sentence."""
        return "a command gives a number without a gradient"

    def statistics(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002 - Scorer's
        """Nothing is computed."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The command, and the digests of the files that it names and of the model's folder."""
        named_files = [path for path in map(Path, self._words) if path.is_absolute() and path.is_file()]
        files = [*named_files, *self._copied_files]
        small_files = [path for path in files if path.stat().st_size <= _LARGEST_DIGESTED]
        return {"command": self._command, "read": self._read, "files": digests(small_files)}

    def _write_model(self, weights: dict[str, Tensor], folder: Path) -> Path:
        """Write the merged model into a new folder. Returns what ``{model}`` stands for."""
        folder.mkdir()
        for file in self._copied_files:
            shutil.copyfile(file, folder / file.name)
        write_safetensors(weights, folder / self._weights_name, {"format": "pt"})
        if self._is_folder:
            return folder
        return folder / self._weights_name


def _placeholders(setting: str, text: str, allowed: Collection[str]) -> set[str]:
    """The names in braces. Raises ObjectiveError if one is not among ``allowed``."""
    used = set(_PLACEHOLDER.findall(text))
    unknown = sorted(used.difference(allowed))
    if unknown:
        raise ObjectiveError(f"{setting}: {{{unknown[0]}}} is unknown; expected {', '.join(allowed)}")
    return used


def _filled(text: str, values: Mapping[str, str]) -> str:
    """The text with values in place of the names in braces."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def _values_of(draw: Draw) -> dict[str, str]:
    size = "" if draw.size is None else str(draw.size)
    return {"group": draw.group, "seed": str(draw.seed), "size": size}


def _metric_name(read: str) -> str:
    """The last key of the path. The name of a metric must not depend on the draw."""
    key = read.rpartition(".")[2]
    return "score" if _PLACEHOLDER.search(key) else key


def _located(word: str, context: BuildContext) -> str:
    """A word of the command; the absolute path if it names a file."""
    try:
        path = context.path(word)
    except StudySpecError:  # it is no path, such as one too long for a file name
        return word
    return str(path.absolute()) if path.is_file() else word


def _model_files(folder: Path) -> tuple[str, list[Path]]:
    """The file name of a model's weights, and the folder's other files: configuration, tokenizer and the like.

    Raises:
        ObjectiveError: the folder has no readable configuration.
    """
    files: list[Path] = []
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file())
    copied = [path for path in files if path.suffix not in _WEIGHT_SUFFIXES and ".index." not in path.name]
    if folder / ADAPTER_CONFIG in files:
        return "adapter_model.safetensors", copied
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ObjectiveError(f"model: {folder} has no readable config.json; name a model's folder") from error
    if "_class_name" in config:  # a model of diffusers
        return "diffusion_pytorch_model.safetensors", copied
    return "model.safetensors", copied
