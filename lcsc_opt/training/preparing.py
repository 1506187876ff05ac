"""From a user's request to a training. Wrong requests fail before anything is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from torch import nn

from lcsc_opt.base.errors import ObjectiveError, TrainingError
from lcsc_opt.base.files import only_process, write_atomically
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.settings import near_miss, parse_settings, parse_yaml
from lcsc_opt.base.study_file import experiment_name
from lcsc_opt.coefficients.profiles import power_ema_coefficients
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.sampling.latents import DecoderSettings
from lcsc_opt.training.data import TrainingData, load_images
from lcsc_opt.training.latents import Latents, encode, read_autoencoder, small_latent_shape, train_autoencoder
from lcsc_opt.training.models import Model, read_model, write_config, write_weights
from lcsc_opt.training.networks import default_widths, initialize, small_unet
from lcsc_opt.training.recipes import RECIPES, Recipe
from lcsc_opt.training.recipes.base import timestep_scale
from lcsc_opt.training.trainer import Job, beside, last_step, new_accelerator, train
from lcsc_opt.trajectory import Trajectory

SIGMA_REL = 0.1  # relative width of the average that the model's folder holds at the end (Karras et al. 2024)
LEAVES = (".trajectory", ".state", ".model", ".jsonl", ".yaml", ".samples")  # suffixes of what a training writes


@dataclasses.dataclass(frozen=True)
class Request:
    """The request of ``lcsc train``.

    Attributes:
        recipe: its name.
        data: ``digits``, ``photographs``, ``cifar10``, a folder or a zip file.
        out: the trajectory.
        steps: of training.
        checkpoint_every: steps between two checkpoints.
        settings: ``KEY=VALUE`` of the recipe.
        teacher: the folder of a diffusion model that is distilled.
        begin: the folder of a model whose weights training begins with.
        network: the folder, or the ``config.json``, of a network of diffusers; without it a small U-Net.
        autoencoder: the folder of an autoencoder; the model is then trained on its latents.
        seed: of all random numbers.
        precision: of matrix products and convolutions.
        samples_every: steps between two sheets of samples; ``None`` writes none.
    """

    recipe: str
    data: str
    out: Path
    steps: int
    checkpoint_every: int
    settings: Sequence[str] = ()
    teacher: Path | None = None
    begin: Path | None = None
    network: Path | None = None
    autoencoder: Path | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    samples_every: int | None = None

    def beside(self, suffix: str) -> Path:
        """Another file or folder of the training."""
        return beside(self.out, suffix)

    @property
    def description(self) -> Path:
        """The file with everything that decides the weights."""
        return self.beside(".model") / "training.json"

    def described(self, recipe: Recipe) -> dict[str, Any]:
        """Everything that decides the weights, as JSON."""
        paths = {
            "teacher": self.teacher,
            "from": self.begin,
            "network": self.network,
            "autoencoder": self.autoencoder,
        }
        return {
            "recipe": recipe.name,
            **recipe.model_dump(),
            "data": self.data,
            "steps": self.steps,
            "checkpoint_every": self.checkpoint_every,
            "seed": self.seed,
            "precision": self.precision,
            **{name: None if path is None else str(path) for name, path in paths.items()},
        }


def run(request: Request, *, resume: bool = False) -> Path | None:
    """Train, and leave a trajectory, a model's folder and a study file.

    Args:
        request: what is trained.
        resume: continue from the files of an earlier call.

    Returns:
        The study file, in the process that has written it; ``None`` in others.

    Raises:
        TrainingError: the request is wrong, or the loss is not finite.
        TrajectoryError: a checkpoint cannot be written.
        StudySpecError: a setting that the recipe does not have.
    """
    recipe = parse_recipe(request.recipe, request.settings)
    _check_request(request, recipe, resume=resume)
    data = load_images(request.data, cache=cache_directory())
    teacher = None if request.teacher is None else read_model(request.teacher, "--teacher")
    denoiser = None if teacher is None else teacher.denoiser()
    begin = _beginning(request, recipe, teacher)
    accelerator = new_accelerator(request.precision)
    latents: Latents | None = None
    if request.autoencoder is None:
        shape = small_latent_shape(data.shape) if recipe.latent else data.shape
    else:
        autoencoder = read_autoencoder(request.autoencoder, data.shape)
        latents = encode(autoencoder, data.pixels, device=accelerator.device)
        shape = cast("tuple[int, int, int]", tuple(latents.values.shape[1:]))
    if teacher is not None:
        _check_fits(teacher.folder, shape, "--teacher")
    network = _network(request, recipe, shape, begin)

    def busy() -> None:
        raise TrainingError(f"{request.out}: another process trains it; wait until it is done, or name another one")

    writes, own_decoder = accelerator.is_main_process, request.beside(".model") / "autoencoder"
    with only_process(request.beside(".model"), busy=busy) if writes else contextlib.nullcontext():
        if writes:
            if not resume:
                _check_free(request)  # again: what is above has only read, and took its time
            _write_description(request, recipe, data, resume=resume)
        if recipe.latent and latents is None:  # trained last, when everything else is known to fit
            with accelerator.main_process_first():
                autoencoder = train_autoencoder(
                    data.pixels, own_decoder, seed=request.seed, device=accelerator.device, steps=request.steps
                )
            latents = encode(autoencoder, data.pixels, device=accelerator.device)
        folder = own_decoder if request.autoencoder is None else request.autoencoder.absolute()
        decoder = None if latents is None else DecoderSettings.model_validate(latents.decoder(str(folder)))
        job = Job(
            recipe=recipe,
            network=network,
            images=data.pixels if latents is None else latents.values,
            out=request.out,
            steps=request.steps,
            checkpoint_every=request.checkpoint_every,
            seed=request.seed,
            precision=request.precision,
            noise_scale=recipe.noise_scale if begin is None else begin.noise_scale,
            samples_every=request.samples_every,
            decoder=None if decoder is None else decoder.build(shape[0]),
            keeps_start=begin is not None and begin.kind == recipe.kind,
            teacher=denoiser,
        )
        if writes:
            model, study = request.beside(".model"), request.beside(".yaml")
            write_config(model, network, recipe.scheduler(), timestep_scale(recipe.kind, job.noise_scale))
            if not (resume and study.exists()):
                write_atomically(study, _study_text(request, recipe, data, latents).encode(), error=TrainingError)
        accelerator.wait_for_everyone()
        train(job, accelerator=accelerator, resume=resume)
        if not writes:
            return None
        _write_average(request, network)
        return request.beside(".yaml")


def parse_recipe(name: str, settings: Sequence[str]) -> Recipe:
    """The recipe of that name, with ``KEY=VALUE`` in place of its defaults.

    Raises:
        TrainingError: there is no such recipe.
        StudySpecError: it has no such setting, or the value is wrong.
    """
    if name not in RECIPES:
        raise TrainingError(f"{name}: no such recipe{near_miss(name, list(RECIPES))}; there are {', '.join(RECIPES)}")
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise TrainingError(f"{setting}: expected KEY=VALUE, as in learning_rate=0.0003")
        try:
            given[key] = parse_yaml(text)
        except ValueError as error:
            raise TrainingError(f"{setting}: not valid YAML: {error}") from error
    return parse_settings(RECIPES[name], given, source=name)


def _check_request(request: Request, recipe: Recipe, *, resume: bool) -> None:
    """Refuse a wrong request, as far as that is known before anything is read."""
    if request.steps < 2 * request.checkpoint_every:
        raise TrainingError(
            f"{request.steps} steps with a checkpoint every {request.checkpoint_every} leave fewer than two"
        )
    if recipe.needs == "teacher" and request.teacher is None:
        raise TrainingError(f"{recipe.name} distils a diffusion model: name its folder with --teacher")
    if recipe.needs != "teacher" and request.teacher is not None:
        raise TrainingError(f"--teacher: {recipe.name} has none")
    if recipe.needs == "from" and request.begin is None:
        raise TrainingError(f"{recipe.name} tunes a diffusion model: name its folder with --from")
    if request.begin is not None and request.network is not None:
        raise TrainingError("--network: --from says it already")
    if resume:
        _check_unchanged(request, recipe)
    else:
        _check_free(request)


def _check_free(request: Request) -> None:
    if there := next((path for path in map(request.beside, LEAVES) if path.exists()), None):
        goes_on = "--resume goes on" if request.description.exists() else "it is of no training: move it away"
        raise TrainingError(f"{there}: is there already: {goes_on}, or name another trajectory")


def _check_unchanged(request: Request, recipe: Recipe) -> None:
    try:
        before = json.loads(request.description.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{request.out}: there is nothing to go on with ({request.description} is not there); leave --resume out "
            "to begin"
        ) from error
    now = request.described(recipe)
    free = set() if recipe.curriculum else {"steps"}  # without a curriculum, a longer training continues a shorter one
    for name in now.keys() - free:
        if before.get(name) != now[name]:
            raise TrainingError(f"{name}: the training began with {before.get(name)!r}, and goes on with that")
    if (made := last_step(request.out)) > request.steps:
        raise TrainingError(f"--steps {request.steps}: {made} are made already; give a larger number to go on")


def _beginning(request: Request, recipe: Recipe, teacher: Model | None) -> Model | None:
    """The model whose weights the network begins with, and whose architecture it has."""
    if request.begin is None:
        takes_teachers = teacher is not None and teacher.kind in recipe.begins_from and request.network is None
        return teacher if takes_teachers else None
    model = read_model(request.begin, "--from")
    if model.kind not in recipe.begins_from:
        raise TrainingError(
            f"--from: {request.begin} is a {model.kind} model, and {recipe.name} begins from "
            f"{' or '.join(recipe.begins_from)}"
        )
    return model


def _network(request: Request, recipe: Recipe, shape: Sequence[int], begin: Model | None) -> nn.Module:
    """The network with the weights that training begins with."""
    if begin is not None:
        _check_fits(begin.folder, shape, "--from")
        network = begin.folder.network()
        network.load_state_dict(begin.network.state_dict())
    else:
        if request.network is None:
            network = small_unet(shape, default_widths(shape), **recipe.network_options)
        else:
            try:
                folder = DiffusersFolder.read(request.network)
                network = folder.network()
            except ObjectiveError as error:
                raise TrainingError(f"--network: {str(error).removeprefix('model: ')}") from error
            _check_fits(folder, shape, "--network")
        initialize(network, torch.Generator().manual_seed(derive_seed(request.seed, "weights")))
    recipe.prepare(network)
    return network


def _check_fits(folder: DiffusersFolder, shape: Sequence[int], option: str) -> None:
    """Refuse a network that does not take images, or latents, of this shape."""
    try:
        expected = folder.image_shape()
    except ObjectiveError as error:
        raise TrainingError(f"{option}: {error}") from error
    if tuple(expected) != tuple(shape):
        raise TrainingError(
            f"{option}: {folder.path} is for {list(expected)}, and what is trained on is {list(shape)}; "
            "give images of that size, or another network or autoencoder"
        )


def _write_description(request: Request, recipe: Recipe, data: TrainingData, *, resume: bool) -> None:
    path, images = request.description, data.fingerprint
    before = json.loads(path.read_text(encoding="utf-8")).get("images", images) if resume else images
    if before != images:
        notice(f"{request.data}: the run before this one had {before}, and this one has {images}")
    text = json.dumps({**request.described(recipe), "images": images}, indent=2) + "\n"
    write_atomically(path, text.encode(), error=TrainingError)
    if data.reference is None:
        data.write_reference(path.with_name("images.npz"))


def _study_text(request: Request, recipe: Recipe, data: TrainingData, latents: Latents | None) -> str:
    """A study file that searches the trajectory, with paths relative to its folder."""
    model = request.beside(".model").name
    settings: dict[str, Any] = {
        "checkpoints": request.out.name,
        "model": model,
        "sampler": recipe.sampler,
        "loss": "fid" if data.features is None else f"fid@{data.features}",
        **({} if data.features is None else {"held_out_metrics": [f"fid@{data.features}2"]}),
        "reference": data.reference or f"{model}/images.npz",
        "images": 1000,
    }
    if latents is not None:
        own = f"{model}/autoencoder"
        settings["decoder"] = latents.decoder(
            own if request.autoencoder is None else str(request.autoencoder.absolute())
        )
    study: Mapping[str, Any] = {
        "objective": {"file": "diffusers_unconditional.py", "settings": settings},
        "optimizers": ["EMAGrid", "LCSC", "LCSCGradient", "CMA"],
        "seeds": [0],
        "budget": {"evaluations": 300},
        "storage": "sqlite:///studies.db",
        "held_out": {"images": 10000, "top": 5},
    }
    file, name = request.beside(".yaml").name, experiment_name(request.beside("").name) or "training"
    head = f"# {recipe.name} on {data.name}, {request.steps} steps: lcsc run {shlex.quote(file)}\n"
    head += f"name: {json.dumps(name)}\n"  # in quotes, since it may look like a number
    return head + yaml.safe_dump(dict(study), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


@torch.no_grad()
def _write_average(request: Request, network: nn.Module) -> None:
    """Write an average of the checkpoints as the weights of the model's folder: a good teacher or start."""
    trajectory = Trajectory.open(request.out)
    network.load_state_dict(trajectory.merge(power_ema_coefficients(trajectory.steps, SIGMA_REL)))
    write_weights(request.beside(".model"), network.cpu())
