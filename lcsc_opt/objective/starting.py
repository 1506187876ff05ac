"""A first study file for a folder of checkpoints. What only the user knows is asked for, or marked in the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import JsonValue

from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.base.study_file import FILL_IN, experiment_name
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.coefficients.layer_groups import advice_on_checkpoints
from lcsc_opt.metrics.reference.images import ImageSet
from lcsc_opt.objective.recognition import SCORE, Proposal, Setting, propose
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.means import described
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
    """

    text: str
    summary: str
    missing: list[str]


def draft(folder: Path, *, reference: str | None, ask: Ask) -> Draft:
    """Draft a study file for checkpoints.

    Args:
        folder: the folder of checkpoints, a glob, or a packed trajectory.
        reference: the real images; ``None`` if the user has not named them.
        ask: asks the user for what the files do not tell.

    Raises:
        TrajectoryError: there are no checkpoints, or those of several models.
    """
    if is_packed(folder):
        trajectory = Trajectory.open(folder)
        steps = trajectory.steps
        intervals = trajectory.intervals
        first = folder
        tensors = trajectory.checkpoint(-1)
    else:
        sources = find_sources(find_checkpoints(folder))
        steps = tuple(row.step for row in sources)
        intervals = None
        first = next(iter(sources.values()))
        tensors = read_checkpoint(first).tensors
    proposal = propose(folder, first, tensors, has_reference=reference is not None)
    settings = [Setting("checkpoints", "a folder, a glob, or a packed trajectory", str(folder)), *proposal.settings]
    if proposal.file != SCORE:
        settings += _settings_of_images(reference or _images_near(folder))

    lines: list[str] = []
    missing: list[str] = []
    for setting in settings:
        value = _answer(setting, ask) if setting.value is None else setting.value
        if value is None:
            missing.append(f"objective.settings.{setting.name}")
            lines.append(f"    {setting.name}: {_as_yaml(f'{FILL_IN}: {setting.meaning}')}")
        else:
            line = f"    {setting.name}: {_as_yaml(value)}"
            lines.append(f"{line.ljust(_COMMENT_COLUMN)}  # {setting.meaning}")
    advice = None if proposal.file == SCORE else advice_on_checkpoints(len(steps))
    if advice is not None:
        notice(f"for the next training: {advice}")
    name = experiment_name(folder.resolve().name.removesuffix(".trajectory")) or "study"
    rows = f"{len(steps)} checkpoints" if intervals is None else described(intervals)
    summary = f"{rows}, steps {steps[0]} to {steps[-1]}, for objectives/{proposal.file}"
    text = _TEXT.format(
        summary=summary,
        name=_as_yaml(name),
        file=proposal.file,
        settings="\n".join(lines),
        search=_search(proposal),
    )
    return Draft(text, summary, missing)


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

_SEARCH_OF_IMAGES = """\
space: {rows: layers}   # coefficients for each layer; with fewer than ten real images a feature: affine
optimizers:
  - EMAGrid          # the best plain average of the checkpoints, to compare with
  - LCSCGradient     # follows the gradient of FID; use LCSCQuadratic where loss or sampler have none
budget: {evaluations: 300}
held_out: {images: 10000, top: 5}   # the answer is chosen and reported on other noise
"""

_SEARCH_BY_FUNCTION = """\
space: affine
optimizers:
  - EMAGrid          # the best plain average of the checkpoints, to compare with
  - LCSCGradient     # follows the gradient of the score; use LCSCQuadratic where it has none
budget: {evaluations: 100}
held_out: {images: 5000, top: 5}    # the answer is chosen and reported on other data; without draw: leave it out
"""

_SEARCH_BY_COMMAND = """\
space: affine
optimizers:
  - EMAGrid          # the best plain average of the checkpoints, to compare with
  - LCSCQuadratic    # needs no gradient
budget: {evaluations: 60}
"""


def _search(proposal: Proposal) -> str:
    if proposal.file != SCORE:
        return _SEARCH_OF_IMAGES
    if any(setting.name == "command" for setting in proposal.settings):
        return _SEARCH_BY_COMMAND
    return _SEARCH_BY_FUNCTION


def _settings_of_images(reference: str | None) -> list[Setting]:
    """The settings that all objectives over images share."""
    meaning = "the real images"
    if reference is None:
        meaning = "a folder of real images, an .npz with mu and sigma, or a data set such as cifar10-train"
    settings = [Setting("reference", meaning, reference)]
    if reference is None or not reference.endswith(".npz"):  # precision compares with single real images
        meaning = "must not get worse than that of the best average; not with a file of statistics"
        settings.append(Setting("keep", meaning, "precision"))
    settings.append(Setting("images", "the number of images of an evaluation; 10000 in the paper", 2000))
    return settings


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


def _images_near(folder: Path) -> str | None:
    """The only folder of images next to the checkpoints or in the working directory; ``None`` if there are several."""
    base = folder if folder.is_dir() else folder.parent
    neighbours = {path for place in (base.parent, Path()) for path in _entries(place) if path.is_dir()}
    folders = [path for path in sorted(neighbours) if _holds_images(path)]
    if len({path.resolve() for path in folders}) != 1:
        return None
    return str(folders[0])


def _holds_images(folder: Path) -> bool:
    return sum(ImageSet.is_image(path.name) for path in _entries(folder)) >= 2


def _entries(folder: Path) -> list[Path]:
    """What a folder holds; nothing if it is no folder that this user may read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
