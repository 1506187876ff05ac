"""Profiles one study: real trials, what they had to do, and what this machine can do at best."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import SEARCH
from lcsc_opt.base.spans import FEATURES, SAMPLE
from lcsc_opt.base.study_file import StudySpec
from lcsc_opt.checkpoints.names import WEIGHTS
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.names import BASELINES
from lcsc_opt.diagnostics.profiling.advice import EXACT, Circumstances, advice
from lcsc_opt.diagnostics.profiling.machine import (
    arithmetic_rate,
    device_peak_bytes,
    memory_rate,
    peak_bytes,
    read_rate,
)
from lcsc_opt.diagnostics.profiling.parts import Profile, Work, divide
from lcsc_opt.diagnostics.profiling.trace import write_trace
from lcsc_opt.diagnostics.profiling.trials import TrialTimes, run_trials, throw_away_database
from lcsc_opt.diagnostics.profiling.work import operations_per_image
from lcsc_opt.evaluation.devices import cores
from lcsc_opt.objective.contract import Objective
from lcsc_opt.optimizers import needs_gradient
from lcsc_opt.sampling.network import DTYPES
from lcsc_opt.search.experiment import Experiment
from lcsc_opt.search.plan import StudyPlan, plans, total_evaluations
from lcsc_opt.trajectory import Trajectory

SETTINGS = ("images", "batch_size", "dtype", "channels_last", "compile")  # that advice may name
NEARLY = 0.9  # of a store's bytes: a device with so many in use holds the store, except what all checkpoints share
TRACED_TRIALS = 1  # after the warm-up, which is in the trace, too


def plan_to_profile(spec: StudySpec, directory: Path, optimizer: str | None = None) -> tuple[StudyPlan, int]:
    """One study of a study file, and how many studies the file stands for, or has with this optimizer.

    Args:
        spec: the file's content.
        directory: where it lies.
        optimizer: whose asks are profiled; without it the first of the file that is not a grid of a few EMAs.

    Raises:
        OptimizerError: an unknown optimizer or option; the message names it.
    """
    searching = [listed.name for listed in spec.optimizers if listed.name not in BASELINES]
    chosen = optimizer or next(iter(searching), spec.optimizers[0].name)
    [plan] = plans(spec, directory, optimizers=[chosen], seeds=spec.seeds[:1])
    return plan, len(spec.seeds) * (1 if optimizer else len(spec.optimizers))


def profile_study(
    plan: StudyPlan, *, trials: int, studies: int = 1, beside: Path | None = None, trace: Path | None = None
) -> Profile:
    """Run a few trials of a study in a database that is thrown away, and say where their time goes.

    Args:
        plan: of the study.
        trials: how many are measured, after a warm-up.
        studies: how many such studies there are to run.
        beside: the folder of the study's own database, so that the other one is on the same disk.
        trace: a file for a Chrome trace of two more trials.

    Raises:
        SearchFailedError: no trial could be measured.
    """
    with throw_away_database(beside) as storage:
        experiment = Experiment(storage, plan)
        times = run_trials(experiment, plan, trials)
        objective = experiment.objective
        memory, device = peak_bytes(), sampling_device(objective)
        device_memory = None if device is None else device_peak_bytes(device)
        settings = sampling_settings(plan)
        work = _work(objective, plan, times, device, settings)
        if trace is not None:
            write_trace(trace, lambda: run_trials(experiment, plan, TRACED_TRIALS, name="trace"))
    profile = Profile(
        study=plan.name,
        trials=times.trials,
        failed=times.failed,
        seconds=times.seconds,
        parts=divide(times, work),
        images=times.cost["images"],
        memory_bytes=memory,
        device_bytes=device_memory,
        evaluations=total_evaluations(plan.spec.budget, objective),
        studies=studies,
        device=_name(device),
    )
    return dataclasses.replace(profile, advice=advice(profile, _circumstances(plan, objective, settings, device)))


def sampling_settings(plan: StudyPlan) -> dict[str, Any]:
    """The settings of the plan's objective that decide how fast it samples, with their values.

    They come from the class ``Settings`` in the objective's file, as all of ours have it; without it, none are known.
    """
    objective = plan.spec.objective
    path = find("objectives", objective.file, beside=plan.directory)
    fields = getattr(getattr(load_file(path), "Settings", None), "model_fields", {})
    return {name: objective.settings.get(name, fields[name].default) for name in SETTINGS if name in fields}


@torch.no_grad()
def sampling_device(objective: Objective) -> torch.device | None:
    """The device that images come from; ``None`` where it is not known, or there are no images."""
    if objective.sampler is None:
        return None
    with torch.compiler.set_stance("force_eager"):  # one image is no shape to compile for
        return objective.sampler.sample(SEARCH, 0, 1).device


def _work(
    objective: Objective,
    plan: StudyPlan,
    times: TrialTimes,
    device: torch.device | None,
    settings: dict[str, Any],
) -> Work:
    """What an average trial did, and the machine's limits for it."""
    gradient = needs_gradient(plan.optimizer)
    work = Work(**_reading(objective, device, gradient=gradient))
    if device is None:
        return work
    try:
        operations = operations_per_image(objective, default_origin(objective.steps), gradient=gradient)
    except (LcscError, RuntimeError, ValueError) as error:
        notice(f"operations could not be counted: {' '.join(str(error).split())[:200]}")
        return work
    images, full = times.cost["images"], arithmetic_rate(torch.float32, device)
    dtype = DTYPES.get(settings.get("dtype", "fp32"), torch.float32)
    return dataclasses.replace(
        work,
        sample_operations=images * operations.get(SAMPLE, 0.0) or None,
        features_operations=images * operations.get(FEATURES, 0.0) or None,
        sample_rate=full if dtype == torch.float32 else arithmetic_rate(dtype, device),
        features_rate=full,  # extractors compute in float32
    )


def _reading(objective: Objective, device: torch.device | None, *, gradient: bool) -> dict[str, float]:
    """Bytes of the store that a trial reads, twice with a gradient, and how fast they can be read."""
    trajectory = objective.trajectory
    if not isinstance(trajectory, Trajectory):
        return {}
    size = trajectory.nbytes
    resident = device is not None and device.type == "cuda" and torch.cuda.memory_allocated(device) > NEARLY * size
    rate = memory_rate(device, size) if device is not None and resident else read_rate(trajectory.path / WEIGHTS)
    return {"merge_bytes": size * (2 if gradient else 1), "read_rate": rate}


def _circumstances(
    plan: StudyPlan, objective: Objective, settings: dict[str, Any], device: torch.device | None
) -> Circumstances:
    trajectory = objective.trajectory
    stored = (trajectory.stored or EXACT) if isinstance(trajectory, Trajectory) else None
    on_gpu = device is not None and device.type == "cuda"
    places = torch.cuda.device_count() if on_gpu else cores()
    return Circumstances(settings, stored, plan.workers, places)


def _name(device: torch.device | None) -> str:
    if device is None:
        return "this machine"
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
