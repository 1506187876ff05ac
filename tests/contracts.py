"""The contracts of objectives, optimizers, feature extractors, checkpoint formats and storages, as checks to call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import TrialState
from torch import Tensor

from lcsc_opt.base.errors import StudyStoreError, TrajectoryError
from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients, Cost, Evaluation, Noise
from lcsc_opt.base.study_spec import OptimizerSpec
from lcsc_opt.checkpoints.order import checkpoint_steps
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.coefficients.profiles import check_coefficients, check_steps, default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.arrays import array_of
from lcsc_opt.database.connection import in_database, open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.metrics.extractors.base import FeatureExtractor
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers.parametrization import attach_evaluation, candidate_of
from lcsc_opt.optimizers.registry import build_optimizer, configure
from lcsc_opt.optimizers.told_losses import LARGEST_LOSS

SPREAD_TOLERANCE = 1e-6  # relative, for a loss whose images were sampled in two parts
STEPS = tuple(range(100, 1300, 100))
_SLOPE = np.linspace(-0.6, 0.9, len(STEPS))
TARGET = _SLOPE / _SLOPE.sum()  # [K], where the quadratic loss of check_optimizer is lowest
FAILURE_LOSS = 1e6  # what an optimizer is told for a failed evaluation
CUTS = (0.0, 0.1, 0.5, 0.9, 0.999)  # lengths of a truncated file, relative to the whole one
STORED_COEFFICIENTS = 500
SMALLEST = 5e-324  # the smallest positive double


def check_objective(
    build: Callable[[], Objective], *, images: int | None = None, step: float = 1e-4, tolerance: float = 1e-2
) -> None:
    """Evaluate a few candidates, and compare what an objective answers with what it promises.

    * ``steps`` are at least two, and increase.
    * ``describe()`` is JSON, and the same for every objective that is built with the same settings.
    * The same candidate has the same finite loss, bit for bit, also in an objective that was built again.
    * ``images`` and ``noise`` of a candidate are honoured, if an evaluation has images at all.
    * A gradient is the derivative of the loss in the K coefficients. Without one, the objective gives a reason.
    * If it has stages, the loss does not depend on how images are divided.
    * Both hold for a loss that is corrected for the bias of few images, too.

    Args:
        build: makes the objective; called twice.
        images: how many an evaluation samples; ``None`` is the objective's own number.
        step: length of the step of the central difference, in coefficients.
        tolerance: that of the derivative along a direction, relative to the larger of it and the gradient's length.

    Raises:
        AssertionError: one of these is not kept.
    """
    objective = build()
    rebuilt = build()
    check_steps(objective.steps)
    described = objective.describe()
    assert json.loads(json.dumps(described)) == described, "describe(): changes when it is stored as JSON"
    assert described == rebuilt.describe(), "describe(): differs between two objectives with the same settings"
    origin = default_origin(objective.steps)
    candidate = Candidate(origin, images=images)
    first = _evaluate(objective, candidate)
    for same in (objective, rebuilt):
        loss = _evaluate(same, candidate).loss
        assert loss == first.loss, (
            f"evaluate: the same candidate has the loss {first.loss!r} the first time, and {loss!r} the second time"
        )
    last_checkpoint = np.eye(len(origin))[-1]
    assert math.isfinite(objective(last_checkpoint)), "the last checkpoint alone has no finite loss"
    if objective.samples.per_evaluation:
        _check_images(objective, candidate, first)
    of_step = dataclasses.replace(candidate, unbiased=True)
    for asked, evaluation in ((candidate, first), (of_step, _evaluate(objective, of_step))):
        _check_gradient(objective, asked, evaluation, step=step, tolerance=tolerance)
        if isinstance(objective, StagedObjective):
            _check_stages(objective, asked, evaluation)


def _evaluate(objective: Objective, candidate: Candidate) -> Evaluation:
    evaluation = objective.evaluate(candidate)
    kind = type(evaluation).__name__
    assert isinstance(evaluation, Evaluation), f"evaluate: returned {kind}, expected an Evaluation"
    assert math.isfinite(evaluation.loss), f"evaluate: the loss is {evaluation.loss}, expected a finite number"
    return evaluation


def _check_images(objective: Objective, candidate: Candidate, evaluation: Evaluation) -> None:
    images = candidate.images
    if images is None:
        images = objective.samples.per_evaluation
    sampled = evaluation.cost.images
    assert sampled == images, f"cost.images: {sampled} for an evaluation of {images} images"
    fewer = Candidate(candidate.coefficients, images=max(images // 2, 2))
    sampled = _evaluate(objective, fewer).cost.images
    assert sampled == fewer.images, f"candidate.images: {fewer.images} were asked for, and {sampled} sampled"
    on_held_out_noise = Candidate(candidate.coefficients, images=candidate.images, noise=HELD_OUT)
    held_out_loss = _evaluate(objective, on_held_out_noise).loss
    assert held_out_loss != evaluation.loss, "candidate.noise: the same loss on held-out noise as on the search's"


def _check_gradient(
    objective: Objective,
    candidate: Candidate,
    evaluation: Evaluation,
    *,
    step: float,
    tolerance: float,
) -> None:
    """Compare the gradient with central differences along two directions."""
    if objective.why_no_gradient() is not None:
        return
    coefficients = candidate.coefficients
    with_gradient = objective.evaluate(dataclasses.replace(candidate, gradient=True))
    gradient = with_gradient.gradient
    if gradient is None or gradient.shape != (len(coefficients),):
        raise AssertionError(
            f"candidate.gradient: expected a gradient of {len(coefficients)} numbers, got {gradient!r}"
        )
    assert math.isclose(with_gradient.loss, evaluation.loss, rel_tol=1e-6), (
        f"candidate.gradient: the loss is {with_gradient.loss}, without a gradient {evaluation.loss}"
    )

    def loss_at(moved: Coefficients) -> float:
        return _evaluate(objective, dataclasses.replace(candidate, coefficients=moved)).loss

    space = AffineSpace(objective.steps, coefficients)
    generator = np.random.default_rng(0)
    for _ in range(2):
        direction = space.to_coefficients(generator.standard_normal(space.shape)) - coefficients
        direction = direction / np.linalg.norm(direction)  # of length one, and its sum is zero
        ahead = loss_at(coefficients + step * direction)
        behind = loss_at(coefficients - step * direction)
        expected = (ahead - behind) / (2 * step)
        derivative = float(gradient @ direction)
        scale = max(abs(expected), float(np.linalg.norm(gradient)))
        assert abs(derivative - expected) <= tolerance * scale, (
            f"candidate.gradient: {derivative:.6g} along a direction in which the loss changes by {expected:.6g}"
        )


def _check_stages(objective: StagedObjective, candidate: Candidate, evaluation: Evaluation) -> None:
    """Sample the images in two parts, and compare the loss with that of one evaluation."""
    count = objective.images_of(candidate)
    first_half = objective.sample(candidate, objective.prepare(candidate), 0, count // 2)
    second_half = objective.sample(candidate, objective.prepare(candidate), count // 2, count)
    in_parts, _ = objective.score(candidate, [first_half, second_half])
    assert math.isclose(in_parts.loss, evaluation.loss, rel_tol=SPREAD_TOLERANCE), (
        f"score: {in_parts.loss} of images sampled in two parts, and {evaluation.loss} of all at once"
    )


def check_optimizer(name: str, options: Mapping[str, Any] | None = None, *, budget: int = 60) -> None:
    """Search a quadratic function of 12 coefficients, and check what an optimizer asks.

    * Every candidate, and the recommendation, is ``[K]``, finite, and sums to one.
    * The same seed and the same losses give the same candidates, bit for bit. A search resumes by repeating them.
    * All randomness comes from the seed: numpy's global generator changes nothing, and is not changed.
    * Several candidates may be asked before the first tell, unless the optimizer says that it asks one at a time.
    * A failed evaluation, told as a very large loss, does not end the search.

    Args:
        name: as in Nevergrad's registry, which includes our optimizers.
        options: as in a study file.
        budget: evaluations of each search.

    Raises:
        AssertionError: one of these does not hold.
        StudySpecError: a candidate's coefficients are not valid, or there is no such optimizer or option.
    """
    spec = OptimizerSpec(name=name, options=dict(options or {}))
    global_state = str(np.random.get_state())  # noqa: NPY002 - compared, not drawn from
    asked = _search(spec, budget)
    assert str(np.random.get_state()) == global_state, "draws from numpy's global generator"  # noqa: NPY002
    assert _search(spec, budget) == asked, "the same seed and answers gave other candidates"
    in_flight = 1 if configure(spec).prefers_sequential_asks else 3
    asked_ahead = _search(spec, budget, in_flight=in_flight)
    repeated = _search(spec, budget, in_flight=in_flight)
    assert repeated == asked_ahead, f"{in_flight} at once: another sequence"
    _search(spec, budget, some_fail=True)  # only that it runs to its end


def _search(spec: OptimizerSpec, budget: int, *, in_flight: int = 1, some_fail: bool = False) -> list[bytes]:
    """Search the quadratic function with a new optimizer, and check each candidate and the recommendation.

    Args:
        spec: the optimizer.
        budget: evaluations.
        in_flight: how many candidates are asked before the first of them is told.
        some_fail: whether one evaluation in five is told as failed.

    Returns:
        The bytes of each candidate's coefficients, in the order in which they were asked.
    """
    space = AffineSpace(STEPS, default_origin(STEPS))
    optimizer = build_optimizer(spec, space, budget=budget, workers=in_flight, seed=3)
    with_gradient = configure(spec).needs_gradient
    asked: list[bytes] = []
    waiting: list[Any] = []
    told_count = 0
    while len(asked) < budget and not getattr(optimizer, "finished", False):
        if len(waiting) == in_flight:
            parameter = waiting.pop(0)
            if some_fail and told_count % 5 == 2:
                attach_evaluation(parameter, None)
                optimizer.tell(parameter, FAILURE_LOSS)
            else:
                _tell_loss(optimizer, parameter, with_gradient=with_gradient)
            told_count += 1
        parameter = optimizer.ask()
        waiting.append(parameter)
        asked.append(_checked(parameter.value).tobytes())
    for parameter in waiting:
        _tell_loss(optimizer, parameter, with_gradient=with_gradient)
    _checked(optimizer.recommend().value)
    return asked


def _tell_loss(optimizer: Any, parameter: Any, *, with_gradient: bool) -> None:
    """Evaluate the quadratic function for a candidate, and tell its loss."""
    difference = candidate_of(parameter).coefficients - TARGET
    loss = min(float(np.square(difference).sum()) + 1.0, LARGEST_LOSS)
    gradient = 2 * difference if with_gradient else None
    attach_evaluation(parameter, Evaluation(loss, gradient=gradient))
    optimizer.tell(parameter, loss)


def _checked(coefficients: Coefficients) -> Coefficients:
    return check_coefficients(np.array(coefficients, dtype=np.float64), len(STEPS))


def check_extractor(
    extractor: FeatureExtractor, images: Tensor, *, differentiable: bool = True, tolerance: float = 1e-4
) -> None:
    """Send images through an extractor, together and one by one.

    * ``name`` is a text, ``dimension`` the number of features of an image.
    * Features are ``[B, D]`` float32 and finite, the same every time.
    * Features of an image do not depend on the other images of its batch.
    * If ``differentiable``, features have a graph back to the images. Logits, if any, come with the same features.

    Args:
        extractor: what to check.
        images: ``[B, C, H, W]`` in [−1, 1], at least two, all different.
        differentiable: whether a graph is expected; only searches that follow gradients need one.
        tolerance: the tolerance of differences between batches, relative to the largest feature.

    Raises:
        AssertionError: one of these is not kept.
    """
    assert isinstance(extractor.name, str), "name: is no text"
    count = len(images)
    with torch.no_grad():
        features = extractor(images)
        repeated = extractor(images)
        one_by_one = torch.cat([extractor(images[i : i + 1]) for i in range(count)])
    shape = tuple(features.shape)
    expected = (count, extractor.dimension)
    assert shape == expected, f"features: have the shape {shape}, expected {expected}"
    assert features.dtype == torch.float32, f"features: are {features.dtype}, expected float32"
    assert bool(torch.isfinite(features).all()), "features: are not finite"
    assert torch.equal(features, repeated), "features: of the same images differ the second time"
    scale = features.abs().max().clamp(min=1e-12)
    apart = float((features - one_by_one).abs().max() / scale)
    assert apart <= tolerance, f"features: of an image alone differ by {apart:.2g} from those in a batch"
    if differentiable:
        _check_graph(extractor, images)
    features_and_logits = getattr(extractor, "features_and_logits", None)
    if features_and_logits is not None:
        with torch.no_grad():
            same_features, logits = features_and_logits(images)
        assert torch.equal(same_features, features), "features_and_logits: other features than a call"
        assert logits.shape[:-1] == (count,), f"logits: have the shape {tuple(logits.shape)}"


def _check_graph(extractor: FeatureExtractor, images: Tensor) -> None:
    leaf = images.detach().clone().requires_grad_()
    features = extractor(leaf)
    assert features.requires_grad, "features: have no graph; pass differentiable=False if none is needed"
    (gradient,) = torch.autograd.grad(features.sum(), leaf)
    is_finite = bool(torch.isfinite(gradient).all())
    is_zero = not bool(gradient.abs().sum() > 0)
    assert is_finite and not is_zero, "features: their gradient in the images is zero or not finite"  # noqa: PT018


def check_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, key: str | None = None, step: int | None = None
) -> None:
    """Read a checkpoint, whole and truncated.

    * The state dict comes back by name, dtype and shape, bit for bit.
    * The training step is found, if one is expected.
    * A truncated file is refused with a :class:`~lcsc_opt.base.errors.TrajectoryError` that names it, with no other
      error, and never gives fewer or other weights.

    Args:
        path: a file, or a folder.
        tensors: what was saved in it.
        key: which state dict of the file; ``None`` finds it.
        step: the step that the path, the metadata or the content give; ``None`` expects nothing.

    Raises:
        AssertionError: one of these is not kept.
        TrajectoryError: the checkpoint cannot be read at all.
    """
    _compare(read_checkpoint(path, key=key).tensors, tensors)
    if step is not None:
        read_step = checkpoint_steps([path])[0]
        assert read_step == step, f"{path}: its step is read as {read_step}, expected {step}"
    if path.is_file():
        for share in CUTS:
            _check_truncated(path, share, tensors, key)


def _check_truncated(path: Path, share: float, tensors: Mapping[str, Tensor], key: str | None) -> None:
    """Read the first ``share`` of a file: it is refused by name, or nothing but padding was cut off."""
    with tempfile.TemporaryDirectory() as folder:
        truncated = Path(folder) / path.name
        truncated.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        try:
            _compare(read_checkpoint(truncated, key=key).tensors, tensors)
        except TrajectoryError as error:
            if str(truncated) not in str(error):
                raise AssertionError(f"a truncated file is refused without its name: {error}") from error
        except AssertionError as error:
            raise AssertionError(f"{share:.1%} of the file are read as if they were all: {error}") from error
        except Exception as error:
            raise AssertionError(
                f"the first {share:.1%} of the file raise {type(error).__name__}, expected a TrajectoryError"
            ) from error


def _compare(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Compare what was read with what was saved: names, dtypes, shapes and bits."""
    differing = sorted(tensors.keys() ^ saved.keys())
    assert not differing, f"other tensors than were saved: {', '.join(differing[:3])}"
    for name, expected in saved.items():
        tensor = tensors[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), (
            f"{name}: read as {tensor.dtype} {list(tensor.shape)}, saved as {expected.dtype} {list(expected.shape)}"
        )
        assert torch.equal(_bits(tensor), _bits(expected)), f"{name}: other numbers than were saved"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def check_storage(url: str) -> None:
    """Write a study into a database, read it back, and delete it.

    * 500 coefficients, losses and gradients come back bit for bit, also the smallest numbers and negative zero.
    * A trial's number is the index of its ask. A candidate is stored, as running, before its result is.
    * Failures keep their reasons. Study attributes can be set again; other settings are refused.
    * One coordinator holds a study; a second one gets an error.

    Args:
        url: the URL of a database that this may write to.

    Raises:
        AssertionError: one of these is not kept.
        StudyStoreError: the database cannot be opened or written.
    """
    storage = open_storage(url, write=True)
    name = f"contract-{uuid.uuid4().hex}/LCSC/0"
    study = StoredStudy.open_or_create(storage, name, {"specification": {"seed": 0}})
    try:
        with study.hold():
            _check_hold(url, name)
            _check_trials(study)
        for value in ({"a": [1, None, 0.1]}, "ü" * 5000, None):
            study.set_attribute("note", value)
            assert study.attributes["note"] == value, "a study attribute is read as another value than was written"
    finally:
        in_database(storage, lambda: storage.delete_study(storage.get_study_id_from_name(name)))
    if name in read_contents(storage).studies:
        raise AssertionError(f"{url}: a study that was deleted is still listed")


def _check_hold(url: str, name: str) -> None:
    second = StoredStudy.open(open_storage(url, write=True), name)
    with contextlib.suppress(StudyStoreError), second.hold():
        raise AssertionError("a second coordinator may hold a study that one holds already")


def _check_trials(study: StoredStudy) -> None:
    """Store three candidates; let the first one fail, finish the second, and leave the third running."""
    coefficients, gradient = np.random.default_rng(0).standard_normal((2, STORED_COEFFICIENTS))
    coefficients[:3] = (SMALLEST, -0.0, 1 / 3)
    candidate = Candidate(coefficients, images=7, noise=Noise("search", 3))
    evaluation = Evaluation(1 / 3, {"fid": 1e-300}, Cost(images=7, seconds=0.1), gradient=gradient)
    numbers = [study.add_candidate(candidate) for _ in range(3)]
    assert numbers == [0, 1, 2], "the number of a trial is not the index of its ask"
    states = {trial.state for trial in study.trials()}
    assert states == {TrialState.RUNNING}, "a candidate is not there before its result"

    study.finish(numbers[1], evaluation)
    study.fail(numbers[0], [{"reason": "no «image» 😀", "seconds": 0.1}])
    failed, finished, running = study.trials()
    assert running.state == TrialState.RUNNING, "a trial that did not end has ended"
    assert (failed.state, failed.value) == (TrialState.FAIL, None), "a failed trial is complete"
    assert "no «image» 😀" in str(failed.user_attrs), "the reason of a failure is lost"
    assert finished.value == 1 / 3, f"a loss of {1 / 3!r} is read as {finished.value!r}"
    for attribute, written in (("coefficients", coefficients), ("gradient", gradient)):
        stored = array_of(finished.user_attrs[attribute])
        assert stored.tobytes() == written.tobytes(), f"{attribute}: are read as other numbers than were written"
