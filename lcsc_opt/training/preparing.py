"""Prepares a training from a user's request. Wrong requests fail before anything is trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.files import only_process, write_atomically
from lcsc_opt.base.paths import DEFAULT_FILES
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.settings import dump_yaml, near_miss, parse_settings
from lcsc_opt.base.study_spec import experiment_name
from lcsc_opt.coefficients.profiles import power_ema_coefficients
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.training.data import BUNDLED, load_images, write_images
from lcsc_opt.training.models import TrainedModel
from lcsc_opt.training.networks import initialize, small_unet
from lcsc_opt.training.recipes import RECIPES, TrainingRecipe
from lcsc_opt.training.trainer import Trainer, Training, sibling_path
from lcsc_opt.trajectory import Trajectory

SIGMA_REL = 0.1  # relative width of the average that the model's folder holds at the end (Karras et al. 2024)
OUTPUTS = (".trajectory", ".state", ".model", ".yaml")  # suffixes of what a training writes


def parse_recipe(name: str, settings: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe of that name, with ``settings`` in place of its defaults.

    Raises:
        TrainingError: there is no such recipe.
        StudySpecError: it has no such setting, or the value is wrong.
    """
    if name not in RECIPES:
        raise TrainingError(f"{name}: no such recipe{near_miss(name, list(RECIPES))}; expected {', '.join(RECIPES)}")
    return parse_settings(RECIPES[name], settings, source=name)


def run(training: Training, *, resume: bool = False) -> Path:
    """Train, and write a trajectory, a model folder and a study file.

    Args:
        training: what is trained.
        resume: continue from the files of an earlier call.

    Returns:
        The study file.

    Raises:
        TrainingError: the request is wrong, or the loss is not finite.
        TrajectoryError: a checkpoint cannot be written.
    """
    _check(training)
    busy = TrainingError(f"{training.out}: another process trains it; wait until it ends, or name another trajectory")
    # the trajectory's own lock is released before the model is written
    with only_process(sibling_path(training.out, ".model"), busy=busy):
        if resume:
            _check_unchanged(training)
        else:
            _check_free(training)
        network = _train(training, resume=resume)
        trajectory = Trajectory.open(training.out)
        with torch.no_grad():  # an average of the checkpoints: a good teacher or start
            network.load_state_dict(trajectory.merge(power_ema_coefficients(trajectory.steps, SIGMA_REL)))
        TrainedModel.write_weights(sibling_path(training.out, ".model"), network.cpu())
    return sibling_path(training.out, ".yaml")


def _train(training: Training, *, resume: bool) -> nn.Module:
    """Read what the training needs, write the files that belong to it, and train. Gives the network, trained."""
    recipe = training.recipe
    pixels, reference = load_images(training.data, folder=DEFAULT_FILES)
    teacher = None
    denoiser = None
    if training.teacher is not None:
        teacher = TrainedModel.read(training.teacher, "--teacher")
        denoiser = teacher.denoiser()
    begin = _beginning(training, teacher)
    shape = pixels.shape[1:]
    if teacher is not None:
        _check_fits(teacher.folder, shape, "--teacher")
    network = _network(training, shape, begin)
    # a network keeps the noise input that it was trained with
    noise_scale = recipe.noise_scale if begin is None else begin.noise_scale
    description = json.dumps(_described(training), indent=2) + "\n"
    write_atomically(_description(training), description.encode(), error=TrainingError)
    model = sibling_path(training.out, ".model")
    if reference is None:  # bundled images have no file that the study could name
        write_images(model / "images.npz", pixels)
    TrainedModel.write_config(model, network, recipe.scheduler(), recipe.timestep_scale(noise_scale))
    study = sibling_path(training.out, ".yaml")
    if not (resume and study.exists()):  # its user may have changed it
        write_atomically(study, _study_text(training, reference).encode(), error=TrainingError)
    trainer = Trainer(
        training,
        network,
        pixels,
        noise_scale=noise_scale,
        keeps_start=begin is not None and begin.kind == recipe.kind,
        teacher=denoiser,
    )
    trainer.train(resume=resume)
    return network


def _check(training: Training) -> None:
    """Refuse requests that are wrong whatever the files contain."""
    name = training.recipe.name
    if not training.out.name:
        raise TrainingError(f"-o {training.out}: expected the name of a new trajectory, such as run.trajectory")
    if training.steps < 2 * training.checkpoint_every:
        raise TrainingError(
            f"--checkpoint-every {training.checkpoint_every}: {training.steps} steps leave fewer than two checkpoints"
        )
    if training.recipe.needs_teacher and training.teacher is None:
        raise TrainingError(f"{name} needs an EDM model: name its folder with --teacher")
    if not training.recipe.needs_teacher and training.teacher is not None:
        raise TrainingError(f"--teacher: {name} has no teacher")
    if training.begin is not None and training.network is not None:
        raise TrainingError("--network: the model of --from decides the network")


def _check_free(training: Training) -> None:
    """Refuse to overwrite files of an earlier training, or of somebody else."""
    advice = "not created by lcsc train; move it"
    if _description(training).exists():
        advice = "continue with --resume"
    for path in (training.out, *(sibling_path(training.out, suffix) for suffix in OUTPUTS)):
        if path.exists():
            raise TrainingError(f"{path} exists already: {advice}, or name another trajectory")


def _check_unchanged(training: Training) -> None:
    """Refuse to resume a training with another request than it began with."""
    path = _description(training)
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise TrainingError(f"{training.out}: nothing to resume ({path} is missing); start without --resume") from error
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(
            f"{path}: cannot be read ({error}); move the files of this training, or name another trajectory"
        ) from error
    for name, value in _described(training).items():
        if name == "steps" and not training.recipe.curriculum and value >= before.get("steps", 0):
            continue  # without a curriculum, a longer training continues a shorter one
        if before.get(name) != value:
            raise TrainingError(f"{name}: cannot be changed when resuming (was {before.get(name)!r})")


def _description(training: Training) -> Path:
    """The file with everything that decides the weights, by which a training is known again."""
    return sibling_path(training.out, ".model") / "training.json"


def _described(training: Training) -> dict[str, Any]:
    """Everything that decides the weights, as JSON."""
    described: dict[str, Any] = {"recipe": training.recipe.name}
    described |= training.recipe.model_dump()
    described |= {name: getattr(training, name) for name in ("data", "steps", "checkpoint_every", "seed")}
    paths = {"teacher": training.teacher, "from": training.begin, "network": training.network}
    return described | {name: None if path is None else str(path) for name, path in paths.items()}


def _beginning(training: Training, teacher: TrainedModel | None) -> TrainedModel | None:
    """The model from whose weights, and with whose architecture, the training starts; ``None`` for a new network.

    A distillation starts from its teacher where the user names neither a model nor a network.
    """
    recipe = training.recipe
    if training.begin is None:
        if teacher is not None and teacher.kind in recipe.begins_from and training.network is None:
            return teacher
        return None
    model = TrainedModel.read(training.begin, "--from")
    if model.kind not in recipe.begins_from:
        raise TrainingError(
            f"--from: {training.begin} is a {model.kind} model, and {recipe.name} starts from "
            f"{' or '.join(recipe.begins_from)}"
        )
    return model


def _network(training: Training, shape: Sequence[int], begin: TrainedModel | None) -> nn.Module:
    """The network with its first weights, for images of ``shape`` ``[C, H, W]``.

    Those of ``begin``; else of the architecture that the request names, or a small U-Net, drawn from the training's
    seed.
    """
    if begin is not None:
        _check_fits(begin.folder, shape, "--from")
        network = begin.folder.network()  # another one, since a teacher's stays as it is
        network.load_state_dict(begin.network.state_dict())
        return network
    seed = derive_seed(training.seed, "weights")
    if training.network is None:
        network = small_unet(shape)
        initialize(network, torch.Generator().manual_seed(seed))
        return network
    folder = DiffusersFolder.read(training.network)
    # each layer draws its weights in its own way, from the global generator of the CPU
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = folder.network()
    _check_fits(folder, shape, "--network")
    return network


def _check_fits(folder: DiffusersFolder, shape: Sequence[int], option: str) -> None:
    """Refuse a network whose images have another shape than ``[C, H, W]``; ``option`` named its ``folder``."""
    expected = folder.image_shape()
    if expected != tuple(shape):
        raise TrainingError(
            f"{option}: {folder.path} is for {list(expected)}, and the training data is {list(shape)}; "
            "give images of that size, or another network"
        )


def _study_text(training: Training, reference: str | None) -> str:
    """A study file that searches the trajectory, with paths relative to its folder.

    ``reference`` names the real images; ``None`` are those that were written for it.
    """
    model = sibling_path(training.out, ".model").name
    settings: dict[str, Any] = {
        "checkpoints": training.out.name,
        "model": model,
        "sampler": training.recipe.sampler,
    }
    if training.data in BUNDLED:  # these come with feature networks
        settings["loss"] = f"fid@{training.data}"
        settings["held_out_metrics"] = [f"fid@{training.data}2"]
    else:
        settings["loss"] = "fid"
    settings["reference"] = reference or f"{model}/images.npz"
    settings["images"] = 1000
    study = {
        "name": experiment_name(sibling_path(training.out, "").name) or "training",
        "objective": {"file": "diffusers_unconditional.py", "settings": settings},
        "optimizers": ["EMAGrid", "LCSC", "LCSCGradient", "CMA"],
        "seeds": [0],
        "budget": {"evaluations": 300},
        "storage": "sqlite:///studies.db",
        "held_out": {"images": 10000, "top": 5},
    }
    command = f"lcsc run {shlex.quote(sibling_path(training.out, '.yaml').name)}"
    title = f"# {training.recipe.name} on {training.data}, {training.steps} steps: {command}\n"
    return title + dump_yaml(study, flow=None, width=120)
