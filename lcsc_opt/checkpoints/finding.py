"""Finding the checkpoints of a training run: files, globs and folders of them; their steps, and which to take."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.paths import MANIFEST, WEIGHTS
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.checkpoints import hub
from lcsc_opt.checkpoints.content import Content
from lcsc_opt.checkpoints.reading import TORCH_SUFFIXES, find_weights, read_metadata
from lcsc_opt.checkpoints.torch_files import read_content

_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# names of files that lie with weights and hold none: of openai's code bases, Accelerate, diffusers, transformers,
# DeepSpeed, NVlabs and Lightning
_NEVER = re.compile(
    r"(.*[-_.])?(optimizer|scheduler|scaler)([-_.0-9].*)?|opt[-_.]?[0-9]*|optim([-_.0-9].*)?|.*_optim(_states)?|"
    r"(random_states|rng_state|training[-_]?state|training[-_]?args|trainer_state|dataloader|custom_checkpoint).*|"
    r"sampler([-_.0-9].*)?|dl_state.*",
    re.IGNORECASE,
)
_CHECKPOINT_FOLDER = re.compile(r"(checkpoint|ckpt|global_step|step|iter|iteration)[-_]?[0-9]+|[0-9]+", re.IGNORECASE)
_INSIDE = "checkpoints"  # the folder in which Lightning and Accelerate save them
_EXPECTED = f"files ending in {', '.join(_SUFFIXES)}, or folders named checkpoint-N"
Patterns = str | Path | Sequence[str | Path]


def find_checkpoints(patterns: Patterns, *, key: str | None = None) -> list[Path]:
    """The checkpoints that ``patterns`` stand for, each once; those of a glob or a folder are in natural order.

    Args:
        patterns: files; globs such as ``"runs/ema_0.9999_*.pt"``; folders that are one checkpoint (diffusers,
            Accelerate); folders of them (``checkpoint-500``, ``checkpoint-1000`` …); and folders of files. States
            of optimizers, schedulers and random numbers are left out. ``hf://owner/name@step-*`` are revisions at the
            Hugging Face hub.
        key: which state dict; it may name a subfolder of a checkpoint folder.

    Raises:
        TrajectoryError: nothing found, a path that does not exist or a link to nothing, an invalid glob, a packed
            trajectory, or checkpoints of several series in one folder or glob (averages of several rates, say).
    """
    patterns = [patterns] if isinstance(patterns, (str, Path)) else patterns
    paths = [Path(pattern).expanduser() for pattern in patterns]
    states = {path for path in paths if _NEVER.fullmatch(path.stem) and path.is_file()}  # of a glob that a shell read
    found = dict.fromkeys(found for path in paths if path not in states for found in _expand(path, key))
    if not found:
        looked = ", ".join(map(str, patterns[:4])) or "an empty list"
        raise TrajectoryError(f"No checkpoint in {looked}: expected {_EXPECTED}; states of optimizers are none.")
    if gone := [path for path in found if not (path.exists() or hub.repository_of(path))]:
        raise TrajectoryError(f"{gone[0]} does not exist: put it back, or remove the link to it.")
    return list(found)


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a packed trajectory."""
    return (path / MANIFEST).is_file() and (path / WEIGHTS).is_file()


def _expand(pattern: Path, key: str | None) -> list[Path]:
    if (revisions := hub.revisions(pattern)) is not None:
        return _of_one_series(str(pattern), revisions)
    if pattern.is_dir():
        return _in_folder(pattern, key)
    if pattern.exists():
        return [pattern]
    if not re.search(r"[*?\[]", str(pattern)):
        raise TrajectoryError(f"{pattern} does not exist: check the path.")
    try:
        matches = list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except (ValueError, NotImplementedError) as error:  # Python 3.13 takes more patterns
        raise TrajectoryError(f"{pattern} is no glob ({error}): ** stands alone between slashes.") from error
    folders = [path for path in matches if not path.is_file() and not is_packed(path) and _is_checkpoint(path, key)]
    return _of_one_series(str(pattern), [*folders, *_files(matches)])


def _in_folder(folder: Path, key: str | None) -> list[Path]:
    if is_packed(folder):
        raise TrajectoryError(f"{folder} is packed already: give it alone, without checkpoints.")
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise TrajectoryError(f"{folder} cannot be read: {error.strerror}.") from error
    numbered = [path for path in entries if not path.is_file() and _CHECKPOINT_FOLDER.fullmatch(path.name)]
    numbered = [path for path in numbered if _is_checkpoint(path, key)]
    if numbered:
        return _of_one_series(str(folder), numbered)
    if _is_checkpoint(folder, key):
        return [folder]
    files = _files(entries)
    if not files and (folder / _INSIDE).is_dir():
        return _in_folder(folder / _INSIDE, key)
    if not files:
        names = ", ".join(sorted(path.name for path in entries)[:4]) or "nothing"
        raise TrajectoryError(f"No checkpoint in {folder}: expected {_EXPECTED}; it holds {names}.")
    return _of_one_series(str(folder), files)


def _is_checkpoint(folder: Path, key: str | None) -> bool:
    if not folder.exists():  # a link to nothing is a gap, which is refused
        return _CHECKPOINT_FOLDER.fullmatch(folder.name) is not None
    for asked in (key, None):  # a key may also be one of the file inside
        try:
            find_weights(folder, asked)
        except (TrajectoryError, OSError):
            continue
        return True
    return False


def _files(paths: Iterable[Path]) -> list[Path]:
    return [
        path
        for path in paths
        if path.suffix in _SUFFIXES
        and path.name != WEIGHTS  # of an unfinished trajectory
        and not path.name.startswith(".")
        and not path.is_dir()
        and not _NEVER.fullmatch(path.stem)
    ]


def _of_one_series(place: str, paths: list[Path]) -> list[Path]:
    """The paths in natural order; ``last.ckpt`` and its like are left out of a numbered series."""
    lone = [path for path in paths if not re.search("[0-9]", path.stem)]
    numbered = [path for path in paths if path not in lone]
    counts = Counter(map(checkpoint_series, numbered))
    if lone and len(counts) == 1 and len(numbered) > 1:
        notice(f"{', '.join(path.name for path in lone)} in {place} left out: the name tells no step")
        paths = numbered
    else:
        counts += Counter(map(checkpoint_series, lone))
    if len(counts) > 1 and max(counts.values()) > 1:
        named = ", ".join(f"{series} ({count})" for series, count in sorted(counts.items()))
        raise TrajectoryError(
            f"{place} holds several series of checkpoints: {named}. Name the files of one, or a glob."
        )

    def natural(path: Path) -> list[object]:  # model2 before model10
        return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", str(path)))]

    return sorted(paths, key=natural)


class Selection(FrozenModel):
    """Checkpoints of a window, an interval apart, as Liu et al. select them (Sec. 5.1 and App. B).

    The window and the interval count back from the last step that is left, n_K. A rule that is ``None`` is not applied;
    the others are applied in this order:

    Attributes:
        last_step: leaves out what was saved after this step, as if the training had ended there.
        first_step: leaves out what was saved before this step.
        window: n_K − n_1, in steps; leaves out what is further than this from the last step. The window of 40,000 with
            an interval of 100 is 401 checkpoints.
        interval: n_k − n_{k−1}, in steps. The points are n_K, n_K − interval, n_K − 2 · interval …, down to the first
            step that is left. Each checkpoint belongs to its nearest point, and each point keeps its nearest
            checkpoint; of two that are equally near, the later one. Where the steps are multiples of a number that
            divides the interval, this keeps (n_K − n) % interval = 0. A step that is off by one, or a last checkpoint
            between two regular ones, does not empty the selection.
        last: keeps the last ones, this many.

    Raises:
        pydantic.ValidationError: a number that is not whole, or too small.
    """

    last: Annotated[int, Field(ge=2)] | None = None
    first_step: NonNegativeInt | None = None
    window: PositiveInt | None = None
    interval: PositiveInt | None = None
    last_step: PositiveInt | None = None

    @property
    def given(self) -> dict[str, int]:
        """The rules that are applied, name → number."""
        return self.model_dump(exclude_none=True)

    def choose(self, steps: Sequence[int]) -> list[int]:
        """The positions in ``steps`` that are selected, in order.

        Args:
            steps: ``[K]``, increasing.

        Raises:
            TrajectoryError: fewer than two are left; the message says which steps there are.
        """
        until = steps[-1] if self.last_step is None else self.last_step
        final = max((step for step in steps if step <= until), default=steps[0])
        first = steps[0] if self.first_step is None else self.first_step
        first = first if self.window is None else max(first, final - self.window)
        chosen = [position for position, step in enumerate(steps) if first <= step <= until]
        if self.interval is not None:
            chosen = _on_grid(chosen, [final - steps[position] for position in chosen], self.interval)
        chosen = chosen if self.last is None else chosen[-self.last :]
        if len(chosen) < 2:
            rules = ", ".join(f"{name} {value}" for name, value in self.given.items()) or "this"
            raise TrajectoryError(
                f"{rules} leaves {len(chosen)} of {len(steps)} checkpoints and a trajectory needs at least 2: there "
                f"are steps {', '.join(map(str, steps[:3]))} … {steps[-1]}."
            )
        return chosen


def _on_grid(positions: list[int], ages: list[int], interval: int) -> list[int]:
    """For every multiple of ``interval``, the position whose age (n_K − n) is nearest to it."""
    nearest: dict[int, tuple[int, int]] = {}  # multiple → (how far, position)
    for position, age in zip(positions, ages, strict=True):
        point = min((2 * age + interval - 1) // (2 * interval), ages[0] // interval)  # halves go to the later point
        candidate = (abs(age - point * interval), -position)
        nearest[point] = min(nearest.get(point, candidate), candidate)
    return sorted(-position for _, position in nearest.values())


_NAMED = r"(?:step|iter|iteration)s?[=_-]?([0-9]{1,18})(?![0-9])"
_WHOLE = r"(?<![0-9.])([0-9]{1,18})(?![0-9]|\.[0-9])"  # not a part of 0.9999
_SETTING = r"[A-Za-z_/]*=-?[0-9.]+(?:e-?[0-9]+)?"  # epoch=3, val_loss=0.25
_FOLDER = r"(?:checkpoint|ckpt|global_step|step|iter|iteration)?[-_]?([0-9]{1,18})(?:\.ckpt)?"


def checkpoint_step(path: str | Path) -> int:
    """The training step of a checkpoint; no weights are read.

    It is ``step`` or ``ss_steps`` of the safetensors metadata; else the number behind "step" or "iter" in the
    name; else ``global_step``, ``step`` or ``iteration`` inside a torch file; else the last whole number in the name
    (``model012345.pt``); else N of a folder ``checkpoint-N`` around it.

    Raises:
        TrajectoryError: there is no number in any of these places.
    """
    path = Path(path)
    with contextlib.suppress(TrajectoryError):  # of a damaged file, the name tells
        metadata = read_metadata(path) if path.is_file() else {}
        for text in (metadata.get("step", ""), metadata.get("ss_steps", "")):
            if text.isascii() and text.isdigit() and len(text) <= 18:
                return int(text)
    name = _bare(path.name)
    if found := re.findall(_NAMED, name, flags=re.IGNORECASE):
        return int(found[-1])
    with contextlib.suppress(Exception):  # a damaged file can raise anything
        if path.suffix in TORCH_SUFFIXES and (step := Content(read_content(path)).step) is not None:
            return step
    if found := re.findall(_WHOLE, name):
        return int(found[-1])
    for folder in path.absolute().parts[-2:-4:-1]:
        if around := re.fullmatch(_FOLDER, folder):
            return int(around[1])
    raise TrajectoryError(f"{path} does not tell its training step: pass the steps with --steps.")


def checkpoint_series(path: str | Path) -> str:
    """The series in a folder that a checkpoint belongs to: its name without step, epoch and metrics.

    ``ema_0.9999_012345.pt`` is of ``ema_0.9999``, ``network-snapshot-0001000-0.050.pkl`` of
    ``network-snapshot-0.050``, ``checkpoint-500/unet`` of ``checkpoint/unet``. Only checkpoints of one series make a
    trajectory.
    """
    path = Path(path)
    own = _without_suffix(path.name)
    if (name := _series(own)) is not None:
        return name
    folders = path.parts[:-1]
    for depth in (1, 2):
        around = folders[-depth] if len(folders) >= depth else ""
        if re.fullmatch(_FOLDER, around):
            rest = (*folders[len(folders) - depth + 1 :], own)
            return "/".join((_series(_without_suffix(around)) or "step", *rest))
    return own


def _series(name: str) -> str | None:
    """``name`` without its step, settings such as ``epoch=3`` and separators that are left; ``None`` without a step."""
    hidden = _bare(name)
    found = [*re.finditer(_NAMED, hidden, flags=re.IGNORECASE)] or [*re.finditer(_WHOLE, hidden)]
    if not found:
        return None
    bare = re.sub(_SETTING, "", name[: found[-1].start()] + name[found[-1].end() :])
    return re.sub(r"([-_. ])[-_. ]+", r"\1", bare).strip("-_. ") or "step"


def _without_suffix(name: str) -> str:
    for suffix in (*_SUFFIXES, ".index.json"):
        name = name.removesuffix(suffix)
    return name


def _bare(name: str) -> str:
    """``name`` without its suffix, and with its precision (``fp16``) blotted out, whose digits are not a step."""
    hidden = _without_suffix(name)
    return re.sub(r"(?:fp|bf|float)[0-9]+", lambda match: "x" * len(match[0]), hidden, flags=re.IGNORECASE)
