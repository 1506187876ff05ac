"""The model of ``make demo``: a flow of drawn 16×16 letters, sampled in two steps, scored by FID.

Its checkpoints, and the two networks whose features score images, come with lcsc_opt, so that a search begins at once.
``objectives/weights/train.py`` trained them. As for ``characters.py``, a third of the letters trained all of them,
searches compare with another third, and the last is for reports and decides when a gradient's search ends.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import Field

from lcsc_opt.base.paths import BUNDLED_WEIGHTS
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import SmallModel, SmallSettings
from lcsc_opt.training.networks import PatchedUNet
from lcsc_opt.training.recipes.diffusion import Flow
from lcsc_opt.trajectory import Trajectory

CHECKPOINTS = BUNDLED_WEIGHTS / "letters.trajectory"
MODEL = SmallModel(
    name="letters",
    dataset="characters",
    recipe=Flow(batch_size=64, learning_rate=2e-3),
    image_shape=(1, 16, 16),
    architecture="PatchedUNet 2, 16-16",
    network=functools.partial(PatchedUNet, (1, 16, 16), (16, 16), patch=2),
    threads=1,
)


class Settings(SmallSettings):
    """The settings of all models of bundled images, with other defaults."""

    data: Literal["thirds"] = "thirds"
    nfe: Annotated[int, Field(ge=2, le=100)] = 2


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check()
    return checked.objective(MODEL.dataset, Trajectory.open(CHECKPOINTS), MODEL.sampler(checked))
