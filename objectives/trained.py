"""A recipe of ``lcsc train``, trained into the cache, sampled by its own scheduler, scored by FID.

    objective:
      file: trained.py
      settings:
        recipe: cd
        recipe_settings: {batch_size: 64}     # as lcsc train cd batch_size=64
        teacher: {recipe: edm, training_steps: 600}
        training_steps: 1000
        select: {last_step: 500}              # as if training had ended there
        nfe: 2

The first use trains the model, and the teacher, if they are not in the cache. An interrupted training continues. ``cd``
distils ``teacher``, and ``ect`` begins from it. The learning curve and the model's folder are next to the trajectory in
the cache, as ``lcsc train`` writes them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, JsonValue

from lcsc_opt.base.descent import torch_threads
from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.files import only_process, remove
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.settings import FrozenModel, parse_settings
from lcsc_opt.metrics.bundled_images import FORMATS, Bundled
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import TrainedSettings, check_length
from lcsc_opt.sampling import DiffusersFolder, DiffusersSampler, ImageNoise, build_scheduler
from lcsc_opt.training import preparing
from lcsc_opt.training.recipes import TrainingRecipe
from lcsc_opt.training.trainer import Training, sibling_path
from lcsc_opt.trajectory import Trajectory

VERSION = 1  # raise it when the same settings would train another model
THREADS = 1  # as for docs/paper.md: another number trains other weights
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"  # the file that a training writes last


class TrainedModel(FrozenModel):
    """A training: a recipe of ``lcsc train``, its settings, and how long."""

    recipe: str
    recipe_settings: dict[str, JsonValue] = Field(default={})
    training_steps: Annotated[int, Field(ge=2)] = 1000
    checkpoint_every: Annotated[int, Field(ge=1)] = 5
    training_seed: Annotated[int, Field(ge=0)] = 0

    def parsed(self) -> TrainingRecipe:
        """The recipe with its settings.

        Raises:
            TrainingError: there is no such recipe, or it trains on latents.
            StudySpecError: it has no such setting, or the value is wrong.
        """
        overrides = [f"{key}={json.dumps(value)}" for key, value in self.recipe_settings.items()]
        recipe = preparing.parse_recipe(self.recipe, overrides)
        if recipe.latent:
            raise TrainingError(
                f"{self.recipe}: trains on latents; run lcsc train {self.recipe}, which writes a study file"
            )
        return recipe


class Settings(TrainedSettings, TrainedModel):
    """The settings of all models that are trained here, and the recipe with its teacher."""

    data: Literal["all"] = "all"
    dataset: Bundled = "digits"
    teacher: TrainedModel | None = None

    def check(self) -> None:
        """Refuse settings that cannot be trained or measured, before any training."""
        super().check()
        needs_teacher = self.parsed().needs is not None
        if needs_teacher and self.teacher is None:
            raise TrainingError(f"teacher: {self.recipe} needs a model that was trained before it")
        if self.teacher is None:
            return
        check_length(self.teacher.training_steps, self.teacher.checkpoint_every)
        if not needs_teacher:
            raise TrainingError(f"teacher: {self.recipe} needs no model that was trained before it")
        needs = self.teacher.parsed().needs
        if needs is not None:
            raise TrainingError(
                f"teacher: {self.teacher.recipe} needs a model before it ({needs}); name another recipe"
            )


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective; the trajectory comes from the cache, or is trained first."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check()
    cache = cache_directory()
    path = trained(checked, cache)
    folder = DiffusersFolder.read(sibling_path(path, ".model"))
    sampler = DiffusersSampler(
        folder.network(),
        build_scheduler(None, folder.scheduler),
        steps=checked.nfe,
        image_shape=folder.image_shape(),
        noise=ImageNoise(checked.noise_seed),
        timestep_scale=folder.timestep_scale,
    )
    return checked.objective(checked.dataset, Trajectory.open(path), sampler)


def trained(checked: Settings, cache: Path) -> Path:
    """The path of the trajectory. If it does not exist, it is trained first, and its teacher before it."""
    path = place(checked, cache)
    if _is_complete(path):
        return path
    teacher = None
    if checked.teacher is not None:
        settings_of_teacher = Settings.model_validate({**checked.teacher.model_dump(), "dataset": checked.dataset})
        teacher = sibling_path(trained(settings_of_teacher, cache), ".model")
    cache.mkdir(parents=True, exist_ok=True)
    with only_process(path, busy=f"{path}: another process is training it; waiting"):
        if not _is_complete(path):
            _train(checked, path, teacher)
    return path


def _train(checked: Settings, path: Path, teacher: Path | None) -> None:
    """Train, or continue an interrupted training; ``teacher`` is a model's folder."""
    recipe = checked.parsed()
    training = Training(
        recipe=recipe,
        data=checked.dataset,
        out=path,
        steps=checked.training_steps,
        checkpoint_every=checked.checkpoint_every,
        teacher=teacher if recipe.needs == "teacher" else None,
        begin=teacher if recipe.needs == "from" else None,
        seed=checked.training_seed,
    )
    resume = (sibling_path(path, ".state") / "latest").is_file()
    if not resume:
        for suffix in preparing.OUTPUTS:
            remove(sibling_path(path, suffix))
    with torch.enable_grad(), torch_threads(THREADS):
        preparing.run(training, resume=resume)


def _is_complete(path: Path) -> bool:
    return (sibling_path(path, ".model") / WEIGHTS).is_file()


def training_seconds(settings: dict[str, Any], cache: Path) -> float | None:
    """The seconds that training took up to the last selected checkpoint; ``None`` if it is not in the cache.

    Args:
        settings: of :func:`build`.
        cache: the folder of the trajectory.
    """
    checked = parse_settings(Settings, settings, source="objective.settings")
    curve = sibling_path(place(checked, cache), ".jsonl")
    if not curve.is_file():
        return None
    last_step = checked.select.last_step or checked.training_steps
    seconds = None
    for line in curve.read_text(encoding="utf-8").splitlines():
        point = json.loads(line)
        if point["step"] <= last_step:
            seconds = float(point["seconds"])
    return seconds


def place(checked: Settings, cache: Path) -> Path:
    """The path of the trajectory that these settings train."""
    described = {
        "version": VERSION,
        "dataset": checked.dataset,
        "model": _description(checked),
        "teacher": None if checked.teacher is None else _description(checked.teacher),
    }
    if checked.dataset != "digits":
        described["images"] = FORMATS[checked.dataset]
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"{checked.dataset}-{checked.recipe}-{key}.trajectory"


def _description(model: TrainedModel) -> dict[str, Any]:
    lengths = model.model_dump(include={"recipe", "training_steps", "checkpoint_every", "training_seed"})
    return {**lengths, "settings": model.parsed().model_dump()}
