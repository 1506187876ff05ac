"""What the names of checkpoints tell: their training steps, their series, and their natural order.

Names are read together, since only their differences tell which number is the step.
"""

from __future__ import annotations

import glob
import re
import zipfile
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from lcsc_opt.base.paths import WEIGHTS

ARCHIVE = ".zip"  # of files, such as stable-baselines3's
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pth.tar", ".pt.tar", ARCHIVE)
CHECKPOINT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
OBJECTS_OF_ACCELERATE = "custom_checkpoint"  # how its files of objects begin that a trainer has registered

# a power of ten, where it makes the number a whole one: 1e4, 1e+04, 1.5e4
_POWERS = "|".join(
    rf"{decimals}[eE]\+?(?:0?[{places}-9]|1[0-2])"
    for places, decimals in enumerate(("", *(rf"\.[0-9]{{{count}}}" for count in range(1, 7))))
)
_SCIENTIFIC = rf"[1-9][0-9]{{0,2}}(?:{_POWERS})(?=step|iter|[^A-Za-z0-9]|$)(?![.,][0-9])"
_WITH_COMMAS = r"[1-9][0-9]{0,2}(?:,[0-9]{3}){1,5}(?![0-9]|[.,][0-9])"  # 10,000
# a letter before 1e4 may be the word of another number, as in v1e4
_AFTER_STEP_OR_NO_LETTER = "|".join(
    ("(?<![A-Za-z])", *(f"(?<={word})" for word in ("step", "steps", "iter", "iters", "iteration", "iterations")))
)
# 20000, 1.5M, 10ksteps
_NUMBER = (
    rf"(?P<digits>(?:{_AFTER_STEP_OR_NO_LETTER}){_SCIENTIFIC}|(?<![0-9],){_WITH_COMMAS}|"
    r"[0-9]{1,12}(?:\.[0-9]{1,9})?[kKmM](?=step|iter|[^A-Za-z0-9]|$)|[0-9]{1,18}(?![0-9]|\.[0-9]))"
)
# "removed" is what a series' name does not have
_STEP_WITH_WORD = re.compile(rf"(?P<removed>(?:step|iter|iteration)s?[=_-]?{_NUMBER})", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(rf"(?<![0-9])(?P<removed>{_NUMBER})")
_SETTING = r"[A-Za-z_/]*=-?[0-9.]+(?:e-?[0-9]+)?"  # epoch=3, val_loss=0.25
_EPOCH = r"(?<![A-Za-z])(?:epochs?|ep)[=_-]?[0-9]+"
_METRIC = (
    r"(?<![A-Za-z])(?:fid|kid|loss|acc|accuracy|top[15]|psnr|ssim|lpips|mse|mae|rmse|bleu|ppl|auc|miou|iou|f1|"
    r"reward|wer|cer)[=_-]?-?[0-9.]+(?:e[-+][0-9]+|[kKmM])?"
)
_DATE = (
    r"(?<![0-9])20[0-9]{2}(?P<dash>[-_.]?)(?:0[1-9]|1[0-2])(?P=dash)(?:0[1-9]|[12][0-9]|3[01])"
    r"(?:[-_T +]*[0-9]{2}[-_.:]?[0-9]{2}[-_.:]?[0-9]{2}(?:\+[0-9]{2})?)?(?![0-9])"
)
_PRECISION = r"(?:fp|bf|float)[0-9]+"
_DECIMAL = rf"(?!{_SCIENTIFIC})[0-9]+\.[0-9]+(?![0-9kKmM])"  # 0.9999
_NO_STEP = re.compile(f"{_METRIC}|{_DATE}|{_PRECISION}|{_DECIMAL}", re.IGNORECASE)
_RUN = r"(?<![A-Za-z])(?:run|seed|version|fold|exp|experiment|trial|rank|worker|part|v)[-_=]?[0-9]+"  # of a folder
_OF_A_RUN = re.compile(f"{_NO_STEP.pattern}|{_RUN}", re.IGNORECASE)
_STATE_FOLDER = re.compile(r".*[-_.](train(ing)?[-_]?)?states?", re.IGNORECASE)  # of kohya
_SHARD = re.compile(r".*-[0-9]{5}-of-[0-9]{5}")  # model-00001-of-00003
_NO_STEP_NOR_EPOCH = re.compile(f"{_NO_STEP.pattern}|{_EPOCH}", re.IGNORECASE)
_ASIDE = re.compile(f"{_SETTING}|{_EPOCH}|{_METRIC}|{_DATE}", re.IGNORECASE)  # what changes with the step
_EPOCH_NUMBER = re.compile(f"{_EPOCH}|(?<![A-Za-z])epochs?=[0-9]+", re.IGNORECASE)
_FOLDER_WORDS = r"(?:checkpoint|ckpt|global_step|step|iter|iteration|epoch|ep)"
_NUMBERED_FOLDER = re.compile(rf"(?:{_FOLDER_WORDS}[-_=]?){{0,2}}([0-9]{{1,18}})(?:\.ckpt)?", re.IGNORECASE)
# names of files that lie with weights and hold none: of openai's code bases, Accelerate, diffusers, transformers,
# DeepSpeed, NVlabs, Lightning, ignite, stable-baselines3, U-ViT, SpeechBrain and torchtune
_STATE_FILES = re.compile(
    r"(.*[-_.])?(optimizer|scheduler|scaler)([-_.0-9].*)?|opt[-_.]?[0-9]*|opt_checkpoint[-_.].*|optim([-_.0-9].*)?|"
    r".*_optim(_states)?|(random_states|rng_state|training[-_]?(state|args)|trainer_state|dataloader).*|"
    r"custom_checkpoint.*|sampler([-_.0-9].*)?|dl_state.*|pytorch_variables|step|counter|recipe_state",
    re.IGNORECASE,
)


# what follows the name of the end in those of kohya's epochs and steps, and of ai-toolkit's steps
_BEFORE_END = r"[-_](?:step)?[0-9]{6,}"


class Named(NamedTuple):
    """What the names of several checkpoints tell about one of them.

    Attributes:
        numbers: those that may be its training step: one as a rule, none, or several that differ between the names.
        series: the name without step, epoch, date and metrics. Only checkpoints of one series make a
            trajectory.
        glob: the path with ``*`` in place of these.
        epoch: the number behind "epoch"; ``None`` without one.
    """

    numbers: tuple[int, ...]
    series: str
    glob: str
    epoch: int | None = None


def read_names(paths: Sequence[Path]) -> list[Named]:
    """What the names of checkpoints tell about each.

    The step is the number behind "step" or "iter"; else the only whole number that differs between names that are
    otherwise the same, but for epochs, if there is another, metrics and dates; else that of one of the two folders
    around the file, where it differs, or is called so (``checkpoint-N``, ``step_N``, a bare ``N``). Of one name alone
    it is the last whole number. A name such as ``0.999.pt`` tells none: that is an EMA's rate.

    ``ema_0.9999_012345.pt`` is of the series ``ema_0.9999``, ``network-snapshot-0001000-0.050.pkl`` of
    ``network-snapshot-0.050``, ``checkpoint-500/unet`` of ``checkpoint/unet``.
    """
    parts = [_StepPart.of(0, path.name) for path in paths]
    for alike in _alike(parts):
        values = {parts[index].values for index in alike}
        is_only_name_with_number = len(alike) == 1 and values != {()}
        if len(values) == 1 and not is_only_name_with_number:  # no number differs: that of the folder may
            for index, of_folder in _parts_of_folders(alike, paths).items():
                parts[index] = of_folder
    named: dict[int, Named] = {}
    for alike in _alike(parts):  # anew: some are those of folders now
        steps = _which_are_steps([parts[index].values for index in alike])
        for index in alike:
            named[index] = parts[index].named(paths[index], steps)
    return [named[index] for index in range(len(paths))]


def torch_suffix(path: Path) -> str:
    """The ending of a torch file's name, such as ``.pth.tar``; empty for other names."""
    return max((suffix for suffix in TORCH_SUFFIXES if path.name.endswith(suffix)), key=len, default="")


def is_numbered_folder(name: str) -> bool:
    """Whether a folder of this name is a checkpoint of a run: ``checkpoint-500``, ``epoch_3``, ``1000``."""
    return _NUMBERED_FOLDER.fullmatch(name) is not None


def has_step(folder: str) -> bool:
    """Whether there is a number in a folder's name that may be a step: not that of a run, a date or a rate."""
    if is_numbered_folder(folder):
        return True
    return bool(_StepPart.of(1, folder).numbers) and _STATE_FOLDER.fullmatch(folder) is None


def is_shard(path: Path) -> bool:
    """Whether a file is one of several that hold one model, by its name."""
    return _SHARD.fullmatch(path.stem) is not None


def is_state_file(path: Path) -> bool:
    """Whether a file holds the state of an optimizer, a scheduler or random numbers, by its name."""
    return _STATE_FILES.fullmatch(path.stem) is not None and not path.is_dir()


def is_weights_file(path: Path) -> bool:
    """Whether a path is a file of weights by its name: not hidden, nor a state, nor of an unfinished trajectory."""
    if path.name.startswith(".") or path.name == WEIGHTS or is_state_file(path) or path.is_dir():
        return False
    return has_weights_suffix(path)


def has_weights_suffix(path: Path) -> bool:
    """Whether a file has the ending of one with tensors; an archive only if there is such a file in it, not images."""
    if path.name.endswith(ARCHIVE):
        return _has_weights(path)
    return path.name.endswith(CHECKPOINT_SUFFIXES)


def weights_in_archive(entries: Iterable[str]) -> dict[str, str]:
    """The files of torch among the entries of an archive, but for states: name without suffix → entry."""
    return {
        without_suffix(entry): entry
        for entry in entries
        if entry.endswith(TORCH_SUFFIXES) and _STATE_FILES.fullmatch(Path(entry).stem) is None
    }


def _has_weights(archive: Path) -> bool:
    """Whether there are weights in an archive; also if it is damaged, which reading it says."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return bool(weights_in_archive(opened.namelist()))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return True


def is_plain_name(name: str) -> bool:
    """Whether a name, which may be out of a hostile file, is that of a file in a folder and leads nowhere else."""
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def is_numbered(path: Path) -> bool:
    """Whether there is any digit in the name, but for its suffix."""
    return re.search("[0-9]", path.stem) is not None


def is_end_by_name(path: Path, others: Sequence[Path]) -> bool:
    """Whether a file is called as trainers of LoRAs call the end of a run, beside these others.

    That is ``hat.safetensors`` after ``hat-000001.safetensors``, ``hat-step00000100.safetensors`` or
    ``hat_000000100.safetensors``: no average or other network is called so.
    """
    before = re.compile(re.escape(path.stem) + _BEFORE_END)
    is_of_them = all(other.parent == path.parent and before.fullmatch(other.stem) for other in others)
    return path.suffix == ".safetensors" and len(others) > 1 and is_of_them


class _StepPart(NamedTuple):
    """The part of a path that may hold the step: its name, or that of a folder ``depth`` above it.

    Attributes:
        depth: 0 is the name itself, 1 the folder that it is in, 2 the one around that.
        text: this part without a suffix.
        numbers: those that may be the step, with the groups "digits" and "removed": what a series' name lacks.
    """

    depth: int
    text: str
    numbers: tuple[re.Match[str], ...]

    @classmethod
    def of(cls, depth: int, part: str) -> _StepPart:
        """The name ``part`` of a file or folder, ``depth`` above the checkpoint."""
        text = without_suffix(part)
        possible = text
        if depth:  # as run7 in the name of a file is not
            possible = _blanked(text, _OF_A_RUN)
        return cls(depth, text, tuple(_possible_steps(possible)))

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers, as numbers."""
        return tuple(_value(number["digits"]) for number in self.numbers)

    @property
    def skeleton(self) -> tuple[int, str]:
        """What is the same in names that differ in their numbers, metrics and dates alone."""
        return self.depth, _ASIDE.sub("", self._without(self.numbers, "*"))

    def _without(self, numbers: Sequence[re.Match[str]], mark: str) -> str:
        """The text with ``mark`` in place of these numbers; for an empty mark, a word such as "step" goes with them."""
        group = "digits" if mark else "removed"
        text = self.text
        for number in reversed(numbers):  # from behind, so that the places of the others stay
            text = text[: number.start(group)] + mark + text[number.end(group) :]
        return text

    def named(self, path: Path, steps: Sequence[int]) -> Named:
        """What the name of ``path`` tells, where ``steps`` are the indices of those numbers that may be its step."""
        numbers = [self.numbers[index] for index in steps]
        values = tuple(_value(number["digits"]) for number in numbers)
        named = Named(values, self._series(path, numbers), self._glob(path, numbers))
        epoch = _EPOCH_NUMBER.search(self.text)
        if epoch is not None:
            named = named._replace(epoch=int(re.sub("[^0-9]", "", epoch[0])))
        return named

    def _series(self, path: Path, numbers: Sequence[re.Match[str]]) -> str:
        """The name without these numbers and what changes with them; of a folder, with the path down to the file."""
        series = self.text
        if numbers:
            series = _ASIDE.sub("", self._without(numbers, ""))
            # one separator is left of those around what was removed
            series = re.sub(r"([-_. ])[-_. ]+", r"\1", series).strip("-_. ") or "step"
        if self.depth:
            series = "/".join((series, *path.absolute().parts[-self.depth : -1], without_suffix(path.name)))
        return series

    def _glob(self, path: Path, numbers: Sequence[re.Match[str]]) -> str:
        """The path with ``*`` in place of these numbers and what changes with them."""
        if self.depth >= len(path.parts):  # the working directory is in that folder
            path = path.absolute()
        pattern = self._without(numbers, "\0")  # which becomes * after others in the path are escaped
        if numbers:
            pattern = _ASIDE.sub(lambda aside: re.sub("-?[0-9].*", "\0", aside[0]), pattern)
        parts = list(path.parts)
        index = len(parts) - 1 - self.depth
        parts[index] = pattern + parts[index].removeprefix(self.text)
        return glob.escape(str(Path(*parts))).replace("\0", "*")


def _parts_of_folders(alike: Sequence[int], paths: Sequence[Path]) -> dict[int, _StepPart]:
    """Index → the folder that has the step, of paths whose own names have none that differs.

    Of ``checkpoint-500/model.pt`` and ``checkpoint-500/unet/model.pt`` it is the nearest that is called so; else the
    nearest whose number differs, as in ``ppo_1024_steps/policy.pt``. Others are left out.
    """
    chosen: dict[int, _StepPart] = {}
    for depth in (1, 2):
        # the root of a file system has no name, and no folder around it
        folders = [[*paths[index].absolute().parents, Path()][depth - 1] for index in alike]
        of_folders = [_StepPart.of(depth, folder.name) for folder in folders]
        for group in _alike(of_folders):
            varies = len({of_folders[place].values for place in group}) > 1
            for place in group:
                is_called_so = is_numbered_folder(of_folders[place].text)
                if of_folders[place].numbers and (varies or is_called_so):
                    chosen.setdefault(alike[place], of_folders[place])
    return chosen


def _alike(parts: Sequence[_StepPart]) -> list[list[int]]:
    """The indices of parts, in groups that differ in their numbers alone."""
    groups: dict[tuple[int, str], list[int]] = {}
    for index, part in enumerate(parts):
        groups.setdefault(part.skeleton, []).append(index)
    return list(groups.values())


def _which_are_steps(values: Sequence[tuple[int, ...]]) -> list[int]:
    """Which numbers of similar names may be the step: their indices, the same in each name.

    ``values`` has the numbers of each name, as many in each.
    """
    columns = list(zip(*values, strict=True))
    varying = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    # one that tells all names apart may be the step, and so may the others: the files may say which it is
    if any(len(set(columns[index])) == len(values) for index in varying):
        return varying
    if varying:  # of several series
        return varying[-1:]
    return list(range(len(columns)))[-1:]  # of one name


def _possible_steps(name: str) -> list[re.Match[str]]:
    """The numbers in a name without its suffix that may be its step: the last one behind "step", else all.

    Metrics, dates and rates are none; an epoch's number is only where there is no other.
    """
    without_epoch = _blanked(name, _NO_STEP_NOR_EPOCH)
    with_word = list(_STEP_WITH_WORD.finditer(without_epoch))
    if with_word:
        return with_word[-1:]
    numbers = list(_WHOLE_NUMBER.finditer(without_epoch))
    return numbers or list(_WHOLE_NUMBER.finditer(_blanked(name, _NO_STEP)))


def _blanked(name: str, pattern: re.Pattern[str]) -> str:
    """The name with an ``x`` for each digit of what matches, so that places stay."""
    return pattern.sub(lambda found: re.sub("[0-9]", "x", found[0]), name)


def _value(digits: str) -> int:
    """The number that is meant by ``012345``, ``20k``, ``1.5M``, ``1e4`` or ``10,000``."""
    thousands = {"k": 1, "m": 2}.get(digits[-1].lower(), 0)
    number = digits.rstrip("kKmM").replace(",", "")
    return int(Decimal(number) * 1000**thousands)


def without_suffix(name: str) -> str:
    """A file's name without what tells its format: ``model.safetensors.index.json`` → ``model``."""
    for suffix in (".index.json", *CHECKPOINT_SUFFIXES):
        name = name.removesuffix(suffix)
    return name
