"""The score that a command gives of a model on the disk."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import given_path
from lcsc_opt.base.records import STANDARD_ERROR
from lcsc_opt.checkpoints.lora import ADAPTER_CONFIG
from lcsc_opt.checkpoints.names import TORCH_SUFFIXES
from lcsc_opt.checkpoints.weights import write_safetensors
from lcsc_opt.objective.contract import stop_if_told
from lcsc_opt.objective.score import Draw, metrics_of

_PLACES = ("model", "out", "group", "seed", "size")
_WEIGHTS = (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", *TORCH_SUFFIXES)
_NUMBER = re.compile(  # not inside of words and paths
    r"(?<![\w./-])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf|infinity|nan)(?![\w/]|\.\d)", re.IGNORECASE
)
_POLL_SECONDS = 0.5
_MOST_BYTES = 2**24  # of a file that is compared when a study continues


class CommandScore:
    """Writes each merged model to a temporary place, runs a command there, and reads its number.

    In the command, ``{model}`` is a folder like ``folder``, with the merged weights; or a ``.safetensors`` file if
    there is no folder. ``{out}`` is a path where nothing is yet; the folder in ``{out}/name.json`` is made.
    ``{group}``, ``{seed}`` and ``{size}`` are those of the :class:`Draw`. No shell is involved.

    Args:
        command: split as by a shell; files that it names are looked for next to the study file, too.
        read: where the number is: names with dots between them, in the newest JSON below ``{out}``, else in the JSON
            on the standard output. ``None`` takes the last number on the standard output.
        folder: a model's folder, with its configuration and tokenizer.

    Raises:
        ObjectiveError: the command cannot be split or found, names no ``{model}``, or something else in braces.
    """

    device = torch.device("cpu")

    def __init__(self, command: str, *, read: str | None = None, folder: Path | None = None) -> None:
        self._command, self._read, self._is_folder = command, read, folder is not None
        try:
            self._words = [_located(word) for word in shlex.split(command)]
        except ValueError as error:
            raise ObjectiveError(f"command: cannot be split into words: {error}") from error
        used = set(re.findall(r"\{(\w+)\}", command))
        if unknown := sorted(used - {*_PLACES}):
            raise ObjectiveError(f"command: {{{unknown[0]}}} is unknown; there are {', '.join(_PLACES)}")
        if "model" not in used:
            raise ObjectiveError("command: does not say where the model goes; put {model} there")
        if shutil.which(self._words[0]) is None:
            raise ObjectiveError(
                f"command: {self._words[0]} is not there, or cannot be run; check the name and its path"
            )
        self.takes_draw = bool(used & {"group", "seed", "size"})
        self._weights, self._files = ("model.safetensors", []) if folder is None else _model_files(folder)

    def measure(
        self, weights: dict[str, Tensor], draw: Draw, varying: Collection[str] | None = None
    ) -> tuple[dict[str, float], Mapping[str, Tensor]]:
        """Write the model, run the command, and read its number; then everything is removed.

        Raises:
            ObjectiveError: it failed, or gave no number; or a gradient is wanted.
        """
        if varying is not None:
            raise ObjectiveError(f"a gradient was asked for, and {self.why_no_gradient(varying, draw.size)}")
        with tempfile.TemporaryDirectory(prefix="lcsc-", ignore_cleanup_errors=True) as place:
            model, out = Path(place) / "model", Path(place) / "out" / "out"
            for folder in (model, out.parent, *([out] if any("{out}/" in word for word in self._words) else [])):
                folder.mkdir()
            for file in self._files:
                shutil.copyfile(file, model / file.name)
            write_safetensors(weights, model / self._weights, {"format": "pt"})
            model = model if self._is_folder else model / self._weights
            values = {"model": model, "out": out, "group": draw.group, "seed": draw.seed, "size": draw.size or ""}
            output = _run([re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), word) for word in self._words])
            if self._read is None:
                numbers = _NUMBER.findall(output)
                if not numbers:
                    raise ObjectiveError(f"command: printed no number{_last_line(output)}")
                return metrics_of(float(numbers[-1]), "score"), {}
            return _at(_json(out, output), self._read), {}

    def why_no_gradient(self, varying: Collection[str] | None, size: int | None) -> str | None:  # noqa: ARG002 - of others
        """Why there is no gradient, as the end of a sentence."""
        return "a command gives a number without a gradient"

    def statistics(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002 - of others
        """Nothing is computed."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The command, and the digests of the files that it names and of the model's folder."""
        named = [path for path in map(Path, self._words) if path.is_absolute() and path.is_file()]
        small = {path.name: path.read_bytes() for path in (*named, *self._files) if path.stat().st_size <= _MOST_BYTES}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
        return {"command": self._command, "read": self._read, "files": digests}


def _located(word: str) -> str:
    """A word of the command; the whole path of a file, if it names one."""
    try:
        path = given_path(word)
        return str(path.absolute()) if path.is_file() else word
    except OSError:  # too long for a name
        return word


def _model_files(folder: Path) -> tuple[str, list[Path]]:
    """The name of a folder's weights; and its configuration, tokenizer and the like, which are no weights."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    small = [path for path in files if path.suffix not in _WEIGHTS and ".index." not in path.name]
    if folder / ADAPTER_CONFIG in files:
        return "adapter_model.safetensors", small
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ObjectiveError(f"model: {folder} holds no config.json that can be read; name a model's folder") from error
    return ("diffusion_pytorch_model" if "_class_name" in config else "model") + ".safetensors", small


def _run(words: list[str]) -> str:
    """Run a command to its end, and give its standard output."""
    with subprocess.Popen(  # noqa: S603 - the user's own command, without a shell
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    output, errors = process.communicate(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    stop_if_told()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ObjectiveError(f"command: ended with {process.returncode}{_last_line(errors) or _last_line(output)}")
    return output


def _last_line(text: str) -> str:
    lines = re.split(r"[\r\n]", text)  # also of progress bars
    return next((f": {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")


def _json(out: Path, output: str) -> Any:
    """What the newest JSON below ``out`` holds, else the standard output, else its last line."""
    written = [path for path in out.parent.rglob("*") if path.is_file() and (path.suffix == ".json" or path == out)]
    if written:
        newest = max(written, key=lambda path: path.stat().st_mtime_ns)
        texts, where = [newest.read_text(encoding="utf-8", errors="replace")], f"{newest.name} that it wrote"
    else:
        texts, where = [output, output.strip().rpartition("\n")[2]], "its standard output, and it wrote no file"
    for text in texts:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            continue
    raise ObjectiveError(f"command: no JSON in {where}{_last_line(texts[0])}")


def _at(content: Any, read: str) -> dict[str, float]:
    """The number or the numbers at ``read``, and its standard error next to it, if there is one as of lm_eval."""
    name = read.rpartition(".")[2]
    metrics = metrics_of(_inside(content, read), name)
    try:
        error = _inside(content, f"{read}{STANDARD_ERROR}")
    except ObjectiveError:
        return metrics
    return {**metrics, f"{name}{STANDARD_ERROR}": error} if isinstance(error, float) else metrics


def _inside(content: Any, read: str) -> Any:
    """A name also stands for the one that continues it behind a comma: ``acc`` for lm_eval's ``acc,none``."""
    there: Any = content
    for name in read.split("."):
        keys = list(there) if isinstance(there, Mapping) else []
        found = [name] if name in keys else [key for key in keys if key.partition(",")[0] == name]
        if len(found) != 1:
            shown = ", ".join(found or keys[:8]) or json.dumps(there)[:80]
            raise ObjectiveError(f"command: {read}: its JSON has {len(found) or 'no'} {name!r} in {shown}")
        there = there[found[0]]
    return there
