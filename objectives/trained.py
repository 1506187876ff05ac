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

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.files import only_process, remove
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.settings import FrozenModel, parse_settings
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import TrainedSettings
from lcsc_opt.sampling import DiffusersFolder, DiffusersSampler, ImageNoise, build_scheduler
from lcsc_opt.training import preparing
from lcsc_opt.training.images import FORMATS, Bundled
from lcsc_opt.training.networks import torch_threads
from lcsc_opt.training.recipes import TrainingRecipe
from lcsc_opt.training.trainer import Training, beside
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
        recipe = preparing.parse_recipe(
            self.recipe, [f"{key}={json.dumps(value)}" for key, value in self.recipe_settings.items()]
        )
        if recipe.latent:
            raise TrainingError(f"{self.recipe}: is of latents; lcsc train {self.recipe} leaves a study file for it")
        return recipe


class Settings(TrainedSettings, TrainedModel):
    """Those of all models that are trained here, and the recipe with its teacher."""

    data: Literal["all"] = "all"
    dataset: Bundled = "digits"
    teacher: TrainedModel | None = None

    def check(self) -> None:
        """Refuse settings that cannot be trained or measured, before any training."""
        super().check()
        recipe = self.parsed()
        if (recipe.needs is None) != (self.teacher is None):
            wanted = "needs no" if recipe.needs is None else "needs a"
            raise TrainingError(f"teacher: {self.recipe} {wanted} model that was trained before it")
        if self.teacher is not None and (needs := self.teacher.parsed().needs) is not None:
            raise TrainingError(
                f"teacher: {self.teacher.recipe} needs a model before it ({needs}); name another recipe"
            )


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective; the trajectory and the feature network come from the cache, or are trained first."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check()
    cache = cache_directory()
    path = trained(checked, cache)
    folder = DiffusersFolder.read(beside(path, ".model"))
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
    if _is_whole(path):
        return path
    folder = None
    if checked.teacher is not None:
        folder = beside(trained(_alone(checked.teacher, checked.dataset), cache), ".model")
    cache.mkdir(parents=True, exist_ok=True)
    with only_process(path, busy=f"{path} is trained by another process: waiting for it"):
        if not _is_whole(path):
            _train(checked, path, folder)
    return path


def _train(checked: Settings, path: Path, before: Path | None) -> None:
    recipe = checked.parsed()
    training = Training(
        recipe=recipe,
        data=checked.dataset,
        out=path,
        steps=checked.training_steps,
        checkpoint_every=checked.checkpoint_every,
        teacher=before if recipe.needs == "teacher" else None,
        begin=before if recipe.needs == "from" else None,
        seed=checked.training_seed,
    )
    resume = (beside(path, ".state") / "latest").is_file()
    if not resume:
        for suffix in preparing.LEAVES:
            remove(beside(path, suffix))
    with torch.enable_grad(), torch_threads(THREADS):
        preparing.run(training, resume=resume)


def _is_whole(path: Path) -> bool:
    return (beside(path, ".model") / WEIGHTS).is_file()


def training_seconds(settings: dict[str, Any], cache: Path) -> float | None:
    """The seconds that training took up to the last selected checkpoint; ``None`` if it is not in the cache.

    Args:
        settings: of :func:`build`.
        cache: the folder of the trajectory.
    """
    checked = parse_settings(Settings, settings, source="objective.settings")
    curve = beside(place(checked, cache), ".jsonl")
    if not curve.is_file():
        return None
    until = checked.select.last_step or checked.training_steps
    lines = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    known: list[float] = [line["seconds"] for line in lines if line["step"] <= until]
    return known[-1] if known else None


def place(checked: Settings, cache: Path) -> Path:
    """The path of the trajectory that these settings train."""
    described = {
        "version": VERSION,
        **({} if checked.dataset == "digits" else {"images": FORMATS[checked.dataset]}),
        "dataset": checked.dataset,
        "model": _description(checked),
        "teacher": None if checked.teacher is None else _description(checked.teacher),
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"{checked.dataset}-{checked.recipe}-{key}.trajectory"


def _description(model: TrainedModel) -> dict[str, Any]:
    lengths = model.model_dump(include={"recipe", "training_steps", "checkpoint_every", "training_seed"})
    return {**lengths, "settings": model.parsed().model_dump()}


def _alone(teacher: TrainedModel, dataset: str) -> Settings:
    return Settings.model_validate({**teacher.model_dump(), "dataset": dataset})
