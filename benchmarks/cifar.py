"""A trial of the paper's size, for ``gpu.py``: a consistency network for CIFAR-10, 10,000 images, InceptionV3, K = 200.

Networks and weights are random, so the losses mean nothing, but the times are real: a U-Net of about 55 M parameters on
32×32 images, one step of sampling, InceptionV3 in its real file format, and a trajectory stored as differences in
float16 (22 GB for K = 200). A search with CMA-ES runs as in ``lcsc run``; on a GPU its stages overlap. The time of a
trial is that from one result to the next. ``quick`` takes a smaller network.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import nn

from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.base.progress import progress
from lcsc_opt.base.records import CHANNELS_LAST
from lcsc_opt.base.study_spec import BudgetSpec, OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Evaluator, InProcessEvaluator
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.metrics import Loss, MetricSuite, Reference, SuiteMetrics
from lcsc_opt.metrics.extractors.published import InceptionExtractor
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.sampling import DiffusersSampler, ImageNoise, NetworkSettings, SchedulerSettings, build_scheduler
from lcsc_opt.study.loop import Loop
from lcsc_opt.study.planning import most_in_flight
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

IMAGE_SHAPE = (3, 32, 32)
SPREAD = 0.01  # standard deviation of a weight between checkpoints
WARM_UP = 3  # first trials, which do not count: they draw noise, choose kernels, compile


def build(arguments: argparse.Namespace, folder: Path, device: torch.device) -> MergeSampleScore:
    """Network, trajectory, extractor and reference, all random."""
    model = network(quick=arguments.quick)
    trajectory = make(model, folder / "random.trajectory", arguments.checkpoints)
    settings = NetworkSettings(device=str(device), dtype=arguments.dtype)
    sampler = DiffusersSampler(
        model,
        build_scheduler("consistency", None),
        SchedulerSettings(steps=1),
        noise=ImageNoise(0, IMAGE_SHAPE),
        settings=settings,
    )
    torch.save(inception_weights(), folder / "inception.pth")
    extractor = InceptionExtractor(folder / "inception.pth", device=device)
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(16 if arguments.quick else 4096, *IMAGE_SHAPE, generator=generator) * 2 - 1
    return MergeSampleScore(
        trajectory,
        sampler,
        MetricSuite({"inception": Reference.of_images(extractor, real)}, SuiteMetrics.of(Loss.parse("fid"))),
        images=arguments.images,
        device=device,
    )


def network(*, quick: bool) -> nn.Module:
    """A U-Net of diffusers of about 55 M parameters, with attention at 16×16."""
    allow_mismatched_torchvision()
    from diffusers import UNet2DModel

    widths = [32, 64, 64] if quick else [160, 288, 288]
    model: nn.Module = cast("Any", UNet2DModel)(
        sample_size=IMAGE_SHAPE[-1],
        in_channels=IMAGE_SHAPE[0],
        out_channels=IMAGE_SHAPE[0],
        block_out_channels=widths,
        layers_per_block=1 if quick else 4,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    )
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    return model


def make(model: nn.Module, path: Path, checkpoints: int) -> Trajectory:
    """The network's weights, and steps from them that add up."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    steps = [SPREAD / checkpoints**0.5 * torch.randn(2**20, generator=generator) for _ in range(8)]
    with TrajectoryWriter(path, dtype="float16") as writer, progress("making checkpoints", checkpoints) as advance:
        for number in range(checkpoints):
            for tensor in weights.values():
                flat, step = tensor.view(-1), steps[number % len(steps)]
                for start in range(0, flat.numel(), len(step)):
                    piece = flat[start : start + len(step)]
                    piece += step[: piece.numel()]
            writer.append(number, weights, wait=False)
            advance()
    return Trajectory.open(path)


def inception_weights() -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of the published file."""
    allow_mismatched_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    class Unloaded(inception.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state_dict: Any, *_: Any, **__: Any) -> None:
            """Do nothing: the weights stay random."""

    with mock.patch.object(inception, "load_state_dict_from_url", return_value={}):
        model = Unloaded("random", ["2048"])
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    return dict(model.state_dict())


def search(objective: MergeSampleScore, folder: Path, trials: int) -> tuple[list[float], dict[str, float]]:
    """Seconds from each result to the next, and mean seconds of each part."""
    space = AffineSpace(objective.steps, default_origin(objective.steps))
    optimizer = build_optimizer(OptimizerSpec(name="CMA"), space, budget=trials, workers=1, seed=0)
    study = StoredStudy.open_or_create(open_storage(f"sqlite:///{folder / 'cifar.db'}", write=True), "cifar/CMA/0", {})
    told: list[float] = []
    evaluator: Evaluator = Pipeline(objective) if objective.overlaps else InProcessEvaluator(objective)
    objective.layout = CHANNELS_LAST
    with contextlib.closing(evaluator), study.hold(), progress("cifar", trials) as advance:
        running = Loop(
            study,
            Driver(lambda: optimizer, "the optimizer"),
            evaluator,
            budget=BudgetSpec(evaluations=trials),
            in_flight=most_in_flight(1, pipelined=objective.overlaps),
        )

        def on_progress(search: Loop) -> None:
            if search.told > len(told):  # it is also called while there is nothing to tell
                told.append(time.perf_counter())
                advance()

        running.on_progress = on_progress
        running.run()
    costs = [trial.user_attrs["cost"] for trial in study.trials()[WARM_UP:]]
    parts = ("merge", "sample", "features", "metric")
    means = {part: statistics.mean(cost[f"{part}_seconds"] for cost in costs) for part in parts}
    return [b - a for a, b in zip(told[WARM_UP - 1 :], told[WARM_UP:], strict=False)], means
