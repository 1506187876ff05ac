"""A model trained briefly on its own samples, as one more checkpoint to search with: Neon (arXiv 2510.03597).

Training on its own samples makes a model worse. A step in the opposite direction makes it better:
θ ← (1 + w) θ − w θ_self. With θ_self as one more row of the trajectory, this is an ordinary combination with the
coefficient −w for that row. So a search finds w together with the other coefficients.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, TrainingError
from lcsc_opt.base.files import only_process, remove
from lcsc_opt.base.progress import progress
from lcsc_opt.base.records import Candidate, Coefficients, Noise
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.optimizers.gradient import averaging_share
from lcsc_opt.sampling.consistency import ConsistencySampler
from lcsc_opt.sampling.network import NetworkSampler, load_weights
from lcsc_opt.training.networks import descend
from lcsc_opt.training.recipes import Batch, TrainingRecipe
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

_NOISE_GROUP = "neon"
_WEIGHTS = (-0.5, 0.0, 0.5, 1.0, 2.0, 4.0)  # values of w that are tried at the end, on both sides of zero


def append_self_trained(
    objective: Objective,
    recipe: TrainingRecipe,
    out: Path,
    *,
    start: Callable[[], Coefficients],
    samples: int = 10_000,
    steps: int = 200,
    seed: int = 0,
) -> tuple[int, dict[float, float]]:
    """Write the checkpoints of an objective with one more row, the start trained on its own samples.

    Args:
        objective: of the checkpoints.
        recipe: the one that the checkpoints were trained with; its loss is minimized.
        out: the new trajectory, ``NAME.trajectory``; it does not exist if this fails before the losses are measured.
        start: finds the coefficients ``[K]`` of the start.
        samples: how many images are sampled, once, to train on.
        steps: of training.
        seed: of the samples, the batches and the noise.

    Returns:
        The training step that the row is stored under; and w → loss of (1 + w) θ − w θ_self on the search's noise,
        where w = 0 is the start.

    Raises:
        ObjectiveError: the objective does not sample images directly with one unconditional network, or its
            checkpoints are no packed trajectory.
        StudySpecError: the name is taken, another process writes there, or the steps leave no room for a row.
        TrainingError: the recipe needs a teacher, or the loss is not finite.
        TrajectoryError: a checkpoint cannot be written.
    """
    if not isinstance(objective, MergeSampleScore) or not isinstance(objective.sampler, NetworkSampler):
        raise ObjectiveError("neon: the objective samples no images with one network, so there is none to train")
    sampler, trajectory = objective.sampler, objective.trajectory
    if not isinstance(trajectory, Trajectory):
        raise ObjectiveError("neon: the objective's checkpoints are no packed trajectory")
    if sampler.labels is not None or sampler.decoder is not None:
        reason = "is one of latents" if sampler.labels is None else "has classes, and recipes train models without"
        raise ObjectiveError(f"neon: the model {reason}; train it on its own samples by yourself, and pack that")
    if out.suffix != ".trajectory":
        raise StudySpecError(f"{out}: is to be a trajectory; end the name in .trajectory")
    if recipe.needs == "teacher":
        raise TrainingError(f"--recipe: {recipe.name} needs a teacher; give ct or ict for a consistency model")

    busy = StudySpecError(f"{out}: another process writes it; wait until it is done, or give another name")
    with only_process(out, busy=busy):
        if out.exists():
            raise StudySpecError(f"{out}: exists already; give another name")
        place = _second_place(trajectory.steps)
        coefficients = start()
        images = objective.images(coefficients, Noise(_NOISE_GROUP, seed), samples)
        begun = trajectory.merge(coefficients)
        row = {**begun, **_self_trained(sampler, begun, images, recipe, steps=steps, seed=seed)}
        step = trajectory.steps[place - 1] + 1
        pending = out.with_name(f"{out.stem}.pending.trajectory")
        remove(pending)  # left by a killed process
        with TrajectoryWriter(pending, metadata={_NOISE_GROUP: str(step)}) as writer:
            for index, before in enumerate(trajectory.steps):
                if index == place:
                    writer.append(step, {name: part.to(begun[name]) for name, part in row.items()})
                writer.append(before, trajectory.checkpoint(index))
        pending.rename(out)
    return step, _losses(objective.on_weights(Trajectory.open(out)), coefficients, place)


def _losses(longer: Objective, coefficients: Coefficients, place: int) -> dict[float, float]:
    """W → loss of the start led away from the row ``place``."""
    losses: dict[float, float] = {}
    with progress("weights of the new row", len(_WEIGHTS)) as advance:
        for weight in _WEIGHTS:
            losses[weight] = float(longer.evaluate(Candidate(with_weight(coefficients, place, weight))).loss)
            advance(note=f"w {weight:g}: {losses[weight]:.4g}")
    return losses


def with_weight(coefficients: Coefficients, place: int, weight: float) -> Coefficients:
    """``[K]`` of a model and w → ``[K + 1]`` of (1 + w) θ − w θ_self, where θ_self is the row ``place``."""
    return np.insert((1 + weight) * coefficients, place, -weight, axis=-1)


def _second_place(steps: Sequence[int]) -> int:
    """The index of the new row: just after the first checkpoint that is two steps or more before the next.

    The new row's step is one later than that checkpoint's. A row stands for the steps since the row before it, so an
    EMA gives the new row almost no weight, and searches start as they did without it. At the end it would get the most.

    Raises:
        StudySpecError: no two checkpoints are two steps apart.
    """
    for place, (before, after) in enumerate(itertools.pairwise(steps), start=1):
        if after - before > 1:
            return place
    raise StudySpecError("the checkpoints are one step apart and leave no room for a row; pack them with --steps")


def _self_trained(
    sampler: NetworkSampler,
    weights: Mapping[str, Tensor],
    images: Tensor,
    recipe: TrainingRecipe,
    *,
    steps: int,
    seed: int,
) -> dict[str, Tensor]:
    """Train on ``images`` ``[n, C, H, W]``; gives the average of the iterates, name → trained tensor.

    A recipe with a curriculum is at the end of it.

    Raises:
        TrainingError: the loss is not finite.
    """
    network: nn.Module = copy.deepcopy(sampler.network)
    load_weights(network, weights)
    with torch.inference_mode(mode=False):
        network.train().requires_grad_(requires_grad=True)
        parameters = dict(network.named_parameters())
        average = {name: part.detach().clone() for name, part in parameters.items()}
        optimizer = getattr(torch.optim, recipe.optimizer)(list(parameters.values()), lr=recipe.learning_rate)
        rate = recipe.target_rate(steps - 1, steps)
        target = network if rate is None else copy.deepcopy(network).requires_grad_(requires_grad=False)
        device = next(iter(parameters.values())).device
        generator = torch.Generator(device)
        own = sampler.function.noise_scale if isinstance(sampler, ConsistencySampler) else recipe.noise_scale

        def loss(step: int) -> Tensor:
            generator.manual_seed(derive_seed(seed, _NOISE_GROUP, step))
            chosen = torch.randint(len(images), (recipe.batch_size,), generator=generator, device=device)
            batch = images[chosen.cpu()].to(device)
            try:
                return recipe.loss(Batch(batch, steps - 1, steps, network, target, generator, noise_scale=own))
            except (TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise TrainingError(f"--recipe {recipe.name}: it cannot train this model ({reason})") from error

        @torch.no_grad()
        def follow(done: int) -> None:
            for name, part in average.items():
                part.lerp_(parameters[name], averaging_share(done))
            if rate is not None:
                torch._foreach_lerp_(list(target.parameters()), list(parameters.values()), 1 - rate)

        descend(loss, optimizer, steps=steps, description="training on its own samples", after=follow)
    return average
