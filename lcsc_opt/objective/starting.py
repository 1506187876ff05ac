"""A first study file for a folder of checkpoints. What only the user knows is asked for, or marked in the file."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image
from pydantic import JsonValue

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.imports import import_dotted
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.base.study_file import FILL_IN, ObjectiveSpec, experiment_name
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.coefficients.layer_groups import advice_on_checkpoints
from lcsc_opt.metrics.reference.building import ReferenceSettings
from lcsc_opt.metrics.reference.images import ImageSet
from lcsc_opt.objective.loading import check_objective
from lcsc_opt.objective.network_scorer import takes_draw
from lcsc_opt.objective.recognition import IMAGES, SCORE, Near, Proposal, Setting, propose
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.sources import find_sources

Ask = Callable[[str, str], "str | None"]
"""(setting, its meaning) → the user's answer; ``None`` leaves the setting to be filled in later."""

_COMMENT_COLUMN = 50


class Draft(NamedTuple):
    """A study file that is still to be written.

    Attributes:
        text: its content.
        summary: the checkpoints and the objective, in one line.
        missing: the paths of the settings that the user has to fill in.
        problem: what is wrong with the settings that are there; empty if nothing is.
    """

    text: str
    summary: str
    missing: list[str]
    problem: str


def draft(folder: Path, given: Mapping[str, JsonValue], *, ask: Ask, beside: Path) -> Draft:
    """Draft a study file for checkpoints.

    Nothing of the checkpoints' folder is executed; a function that the user names is imported, and a score is called.

    Args:
        folder: the folder of checkpoints, a glob, or a packed trajectory.
        given: settings that the user has named, such as ``reference``, ``model`` or ``score``.
        ask: asks the user for what the files do not tell.
        beside: the folder of the study file.

    Raises:
        TrajectoryError: there are no checkpoints, or those of several models.
        MetricError: the real images that the user names do not exist, or are no images.
    """
    _check_reference(given, beside)
    if is_packed(folder):
        trajectory = Trajectory.open(folder)
        steps = trajectory.steps
        last = folder
        tensors = trajectory.checkpoint(-1)
    else:
        named_key = given.get("key")
        key = named_key if isinstance(named_key, str) else None
        sources = find_sources(find_checkpoints(folder, key=key))
        steps = tuple(sources)
        last = [*sources.values()][-1]  # the first ones may be deleted while the training goes on
        tensors = read_checkpoint(last, key=key).tensors
    near = _near(folder, given)
    proposal = propose(folder, last, tensors, given=given, near=near)
    settings = [Setting("checkpoints", "a folder, a glob, or a packed trajectory", str(folder)), *proposal.settings]
    if proposal.file != SCORE:
        settings += _settings_of_images(near.reference)
    settings, missing = _filled(settings, given, ask)

    values: dict[str, JsonValue] = {setting.name: setting.value for setting in settings if setting.value is not None}
    search = _Search.of(proposal, values)
    problem = ""
    if not missing:
        try:
            search = search.fitted(ObjectiveSpec(file=proposal.file, settings=values), beside)
        except LcscError as error:
            problem = str(error)
    has_size = search.held_out > 0  # what else is scored, is scored on all of its data
    lines = [_line(setting) for setting in settings if setting.name != "size" or has_size]
    advice = None if proposal.file == SCORE else advice_on_checkpoints(len(steps))
    if advice is not None:
        notice(f"for the next training: {advice}")
    name = experiment_name(folder.resolve().name.removesuffix(".trajectory")) or "study"
    summary = f"{_in_words(steps)}, for objectives/{proposal.file}"
    text = _TEXT.format(
        summary=summary,
        name=_as_yaml(name),
        file=proposal.file,
        settings="\n".join(lines),
        search=search.text,
    )
    return Draft(text, summary, missing, problem)


def _in_words(steps: Sequence[int]) -> str:
    """Their number and their steps: ``3 checkpoints, steps 100 to 300``."""
    if len(steps) == 1:
        return f"1 checkpoint, step {steps[0]}"
    return f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}"


def _check_reference(given: Mapping[str, JsonValue], beside: Path) -> None:
    """Raise MetricError if the real images that the user names do not exist."""
    reference = given.get("reference")
    if not isinstance(reference, str):
        return
    path = BuildContext(beside).path(reference)
    if path.exists():
        reference = str(path)
    ReferenceSettings.parse(reference).check()


def _filled(settings: Sequence[Setting], given: Mapping[str, JsonValue], ask: Ask) -> tuple[list[Setting], list[str]]:
    """The settings with the values that the user gives, and the paths of those that are still missing."""
    filled = []
    missing = []
    for setting in settings:
        value = given.get(setting.name, setting.value)
        if value is None:
            value = _answer(setting, ask)
        if value is None:
            missing.append(f"objective.settings.{setting.name}")
        filled.append(dataclasses.replace(setting, value=value))
    names = {setting.name for setting in settings}
    filled += [Setting(name, "as given", value) for name, value in given.items() if name not in names]
    return filled, missing


def _line(setting: Setting) -> str:
    """A setting as a line of the study file."""
    if setting.value is None:
        return f"    {setting.name}: {_as_yaml(f'{FILL_IN}: {setting.meaning}')}"
    line = f"    {setting.name}: {_as_yaml(setting.value)}"
    return f"{line.ljust(_COMMENT_COLUMN)}  # {setting.meaning}"


_TEXT = """\
# {summary}. lcsc run FILE --dry-run lists what is missing.
name: {name}
objective:
  file: {file}
  settings:
{settings}
{search}seeds: [0]
storage: sqlite:///studies.db
"""


@dataclasses.dataclass(frozen=True)
class _Search:
    """The part of a study file behind the objective.

    Attributes:
        space: of the coefficients, with a comment.
        optimizer: the one after the baseline.
        evaluations: the budget.
        held_out: the items of a report; 0 where nothing can be held out.
        why_no_gradient: a comment on the optimizer.
    """

    space: str
    optimizer: str
    evaluations: int
    held_out: int
    why_no_gradient: str = ""

    @classmethod
    def of(cls, proposal: Proposal, values: Mapping[str, JsonValue]) -> _Search:
        """What fits an objective of which only the settings are known."""
        if proposal.file != SCORE:
            return cls(f"{{rows: layers}}   # {_ROWS}", "LCSCGradient", evaluations=300, held_out=10_000)
        size = values.get("size")  # a report on other data has as many items as the search
        return cls("affine", "LCSCGradient", evaluations=100, held_out=size if isinstance(size, int) else 0)

    def fitted(self, spec: ObjectiveSpec, beside: Path) -> _Search:
        """The search without what the objective lacks: a gradient, or data for a report.

        Raises:
            LcscError: the objective refuses its settings.
        """
        checked = check_objective(spec, study_folder=beside)
        search = self
        score = spec.settings.get("score")
        if isinstance(score, str) and not takes_draw(import_dotted(score, setting="score")):
            search = dataclasses.replace(search, held_out=0)
            spec = spec.model_copy(update={"settings": {**spec.settings, "size": None}})
            checked = check_objective(spec, study_folder=beside)
        if search.held_out and checked.why_no_report() is not None:
            search = dataclasses.replace(search, held_out=0)
        if search.optimizer == "LCSCGradient":
            reason = checked.why_no_gradient()
            if reason is not None:
                search = dataclasses.replace(
                    search, space="affine", optimizer="LCSCQuadratic", why_no_gradient=" ".join(reason.split())
                )
        return search

    @property
    def text(self) -> str:
        """The lines of the study file."""
        meaning = "follows the gradient; use LCSCQuadratic where there is none"
        if self.optimizer == "LCSCQuadratic":
            meaning = "needs no gradient"
            if self.why_no_gradient:
                meaning += f": {self.why_no_gradient}"
        lines = [
            f"space: {self.space}",
            "optimizers:",
            "  - EMAGrid          # the best plain average of the checkpoints, to compare with",
            f"  - {self.optimizer}  # {meaning}",
            f"budget: {{evaluations: {self.evaluations}}}",
        ]
        if self.held_out:
            lines.append(f"held_out: {{images: {self.held_out}, top: 5}}   # {_HELD_OUT}")
        return "".join(f"{line}\n" for line in lines)


_ROWS = "coefficients for each layer; one row for all: affine"
_HELD_OUT = "the answer is chosen and reported on data that no search saw"


def _settings_of_images(reference: Path | str | None) -> list[Setting]:
    """The settings that all objectives over images share."""
    meaning = "the real images"
    if reference is None:
        meaning = "a folder of real images, an .npz with mu and sigma, or a data set such as cifar10-train"
    named = None if reference is None else str(reference)
    return [
        Setting("reference", meaning, named),
        Setting("images", "the number of images of an evaluation; 10000 in the paper", IMAGES),
    ]


def _answer(setting: Setting, ask: Ask) -> JsonValue:
    """The user's answer; ``None`` if there is none."""
    answer = ask(setting.name, setting.meaning)
    if answer is None or not setting.is_list:
        return answer
    try:
        parsed: JsonValue = parse_yaml(answer)
    except ValueError:
        return answer  # the dry run says what is wrong with it
    return parsed


def _as_yaml(value: JsonValue) -> str:
    """A value as one line of YAML, which is read back unchanged.

    PyYAML's dumper leaves text without quotes that our reader parses as a number (1e-4), and writes text with line
    breaks in several lines. Such text is in double quotes.
    """
    text = _dumped(value, style=None)
    try:
        if parse_yaml(text) == value:
            return text
    except ValueError:
        pass
    return _dumped(value, style='"')


def _dumped(value: JsonValue, *, style: str | None) -> str:
    text = yaml.safe_dump(
        value,
        default_flow_style=True,
        default_style=style,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
    )
    return text.splitlines()[0]


def _near(folder: Path, given: Mapping[str, JsonValue]) -> Near:
    """What lies next to the checkpoints or in the working directory, unless the user named it."""
    neighbours = _neighbours(folder)
    reference = _only([path for path in neighbours if path.is_dir() and _image_names(path)])
    if "reference" in given:
        reference = Path(str(given["reference"]))
    text = _only([path for path in neighbours if path.suffix == ".txt" and path.stem not in _NO_TEXTS])
    if "prompts" in given:
        text = Path(str(given["prompts"]))
    pipeline = _only(_pipelines(neighbours))
    return Near(reference, _image_shape(reference), text, pipeline)


def _pipelines(paths: Sequence[Path]) -> list[Path]:
    """Those that are folders of pipelines."""
    return [path for path in paths if (path / "model_index.json").is_file()]


def _neighbours(folder: Path) -> list[Path]:
    """What lies next to the checkpoints, and in the working directory."""
    base = folder if folder.is_dir() else folder.parent
    return sorted({path for place in (base.parent, Path()) for path in _entries(place)})


_NO_TEXTS = ("requirements", "constraints", "LICENSE", "README")


def _only(paths: Sequence[Path]) -> Path | None:
    """The only path; ``None`` if there is none, or several."""
    if len({path.resolve() for path in paths}) != 1:
        return None
    return paths[0]


def _image_shape(folder: Path | None) -> list[int] | None:
    """``[C, H, W]`` of the first image of a folder that can be opened, and is not too large for Pillow."""
    if folder is None or not folder.is_dir():
        return None
    for name in _image_names(folder):
        with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(folder / name) as image:
            return [len(image.getbands()), image.height, image.width]
    return None


def _image_names(folder: Path) -> list[str]:
    """The images in a folder of at least two."""
    names = sorted(path.name for path in _entries(folder) if ImageSet.is_image(path.name))
    return names if len(names) >= 2 else []


def _entries(folder: Path) -> list[Path]:
    """What a folder holds; nothing if it is no folder that this user may read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
