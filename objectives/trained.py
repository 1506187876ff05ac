"""A model of bundled images that ``lcsc train`` trained, sampled by its own scheduler, scored by FID.

    objective:
      file: trained.py
      settings:
        checkpoints: models/digits.trajectory        # lcsc train ict --data digits ... -o models/digits.trajectory
        select: {last_step: 2000}             # as if training had ended there
        nfe: 2

The network and the scheduler come from the model's folder, which ``lcsc train`` writes beside the trajectory; so do the
images and the number of sampling steps, unless the settings name them. The features are those of a small classifier of
such images, which ships. ``COMMANDS`` has the trainings of the study files in ``studies/``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from pydantic import Field

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import MANIFEST, BuildContext
from lcsc_opt.base.settings import parse_settings, second_of
from lcsc_opt.metrics.bundled_images import Bundled
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import SmallSettings
from lcsc_opt.sampling import DiffusersFolder, DiffusersSampler, ImageNoise, SchedulerSettings, build_scheduler
from lcsc_opt.training.recipes import RECIPES
from lcsc_opt.trajectory import Trajectory

_PHOTOGRAPHS = "batch_size=32 sigma_max=80 last_discretization=20 noise_mean=0.5 --network studies/photographs.json"
_TRAININGS = {  # of the trajectories that the study files name; edm is the teacher of both cd
    "digits": "ict --data digits --steps 4000 --checkpoint-every 20",
    "digits_ddpm": "ddpm batch_size=64 learning_rate=0.002 --data digits --steps 1000 --checkpoint-every 5",
    "photographs": f"ict {_PHOTOGRAPHS} --data photographs --steps 3000 --checkpoint-every 15",
    "mnist": "flow batch_size=64 learning_rate=0.002 --data mnist --steps 600 --checkpoint-every 6",
    "ct": "ct --data digits --steps 2000 --checkpoint-every 10",
    "ct_32": "ct batch_size=32 --data digits --steps 2000 --checkpoint-every 10",
    "ict": "ict --data digits --steps 2000 --checkpoint-every 10",
    "ict_32": "ict batch_size=32 --data digits --steps 2000 --checkpoint-every 10",
    "edm": "edm --data digits --steps 600 --checkpoint-every 5",
    "cd": "cd --teacher models/edm.trajectory --data digits --steps 1000 --checkpoint-every 5",
    "cd_32": "cd batch_size=32 --teacher models/edm.trajectory --data digits --steps 1000 --checkpoint-every 5",
}
COMMANDS = {name: f"lcsc train {training} -o models/{name}.trajectory" for name, training in _TRAININGS.items()}


class Settings(SmallSettings):
    """The settings of all models of bundled images, and which model.

    Attributes:
        checkpoints: the trajectory of ``lcsc train``.
        dataset: what the model makes; by default what it was trained on.
        nfe: model calls per image; by default those of the recipe, 1 of a consistency model and 10 of others.
            ``also: {nfe: 12}`` is what only reports use.
    """

    checkpoints: str
    dataset: Bundled | None = None
    nfe: Annotated[int, Field(ge=1, le=100)] | None = None

    def path(self, context: BuildContext) -> Path:
        """Where the trajectory is. Raises ObjectiveError, with the command that trains it, if it does not exist."""
        path = context.path(self.checkpoints)
        if not (path / MANIFEST).is_file():
            command = COMMANDS.get(path.stem, f"lcsc train RECIPE --data DATA ... -o {self.checkpoints}")
            raise ObjectiveError(f"checkpoints: {self.checkpoints} does not exist; train it first: {command}")
        return path

    def images_and_steps(self, path: Path) -> tuple[Bundled, int]:
        """The images that the model makes, and the model calls for one: of the settings, else of the training's record.

        Raises:
            ObjectiveError: neither says, or the training was of other images.
        """
        record = _training_record(path)
        dataset = self.dataset or record.get("data")
        if dataset not in get_args(Bundled):
            expected = ", ".join(get_args(Bundled))
            raise ObjectiveError(
                f"dataset: expected one of {expected}, got {dataset!r} of the training of {self.checkpoints}; "
                "diffusers_unconditional.py is for models of other images"
            )
        recipe = RECIPES.get(record.get("recipe", ""))
        nfe = self.nfe
        if nfe is None and recipe is not None:
            nfe = int(recipe.sampler["steps"])
        if nfe is None:
            raise ObjectiveError(
                f"nfe: {self.checkpoints} has no record of its training; give the model calls for one image"
            )
        return cast("Bundled", dataset), nfe


def build(settings: dict[str, Any], context: BuildContext) -> MergeSampleScore:
    """Build the objective of a trajectory that exists.

    Raises:
        MetricError: a metric is unknown, needs another network, or cannot be kept.
        ObjectiveError: the trajectory or the model's folder is missing, or the training is of other images.
        TrajectoryError: fewer than two checkpoints are selected.
    """
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check_metrics()
    path = checked.path(context)
    folder = DiffusersFolder.read(path)
    dataset, nfe = checked.images_and_steps(path)
    trajectory = Trajectory.open(path)
    checked.select.chosen(trajectory.steps)  # raises, before the network is built
    module = folder.network()

    def sampler(steps: int) -> DiffusersSampler:
        return DiffusersSampler(
            module,
            build_scheduler(None, folder.scheduler),
            SchedulerSettings(steps=steps),
            noise=ImageNoise(checked.noise_seed, folder.image_shape()),
            timestep_scale=folder.timestep_scale,
        )

    second = second_of(checked)
    also = None
    if second is not None:
        _, more_steps = second.images_and_steps(path)
        also = sampler(more_steps)
    return checked.objective(dataset, trajectory, sampler(nfe), also=also)


def _training_record(path: Path) -> dict[str, Any]:
    """What ``lcsc train`` wrote beside the trajectory, ``data`` and ``recipe`` among it; empty if it is not there."""
    try:
        return dict(json.loads((path.with_suffix(".model") / "training.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
