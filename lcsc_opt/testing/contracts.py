"""The contracts of objectives, optimizers, feature extractors, checkpoint formats and storages, as checks to call."""

from __future__ import annotations

import contextlib
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
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.checkpoints.finding import checkpoint_step
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.coefficients.profiles import check_coefficients, check_steps, default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.connection import in_database, open_storage
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.metrics.extractors.base import FeatureExtractor
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers.parametrization import attach_evaluation, candidate_of
from lcsc_opt.optimizers.registry import asks_one_at_a_time, build_optimizer, needs_gradient

SPREAD_TOLERANCE = 1e-6  # relative, for a loss whose images were sampled in two parts
STEPS = tuple(range(100, 1300, 100))
TARGET = np.linspace(-0.6, 0.9, len(STEPS)) / np.linspace(-0.6, 0.9, len(STEPS)).sum()
LARGEST_LOSS = 1e20  # Nevergrad clips above 5e20
CUTS = (0.0, 0.1, 0.5, 0.9, 0.999)  # shares of the file that are left after a cut
K = 500
SMALLEST = 5e-324


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

    Args:
        build: makes the objective; called twice.
        images: how many an evaluation samples; ``None`` takes the objective's own number.
        step: length of the step of the central difference, in coefficients.
        tolerance: of the derivative along a direction, relative to the larger of it and the gradient's length.

    Raises:
        AssertionError: one of these is not kept.
    """
    objective, other = build(), build()
    check_steps(objective.steps)
    described = objective.describe()
    assert json.loads(json.dumps(described)) == described, "describe(): is not the same after it was stored as JSON"
    assert described == other.describe(), "describe(): differs between two that were built with the same settings"
    origin = default_origin(objective.steps)
    candidate = Candidate(origin, images=images)
    first = _evaluated(objective, candidate)
    for again in (objective, other):
        assert _evaluated(again, candidate).loss == first.loss, (
            f"evaluate: the same candidate has the loss {first.loss!r}, and another one the second time"
        )
    assert math.isfinite(objective(np.eye(len(origin))[-1])), "the last checkpoint alone has no finite loss"
    if objective.images_per_evaluation:
        _check_images(objective, candidate, first)
    _check_gradient(objective, candidate, first, step=step, tolerance=tolerance)
    if isinstance(objective, StagedObjective):
        last = objective.images_of(candidate)
        halves = ((0, last // 2), (last // 2, last))
        parts = [objective.sample(candidate, objective.prepare(candidate), *images) for images in halves]
        whole, _ = objective.score(candidate, parts)
        assert math.isclose(whole.loss, first.loss, rel_tol=SPREAD_TOLERANCE), (
            f"score: {whole.loss} of images sampled in two parts, and {first.loss} of all at once"
        )


def _evaluated(objective: Objective, candidate: Candidate) -> Evaluation:
    evaluation = objective.evaluate(candidate)
    assert isinstance(evaluation, Evaluation), f"evaluate: gave {type(evaluation).__name__}, expected an Evaluation"
    assert math.isfinite(evaluation.loss), f"evaluate: the loss is {evaluation.loss}, expected a finite number"
    return evaluation


def _check_images(objective: Objective, candidate: Candidate, first: Evaluation) -> None:
    wanted = objective.images_per_evaluation if candidate.images is None else candidate.images
    assert first.cost.images == wanted, f"cost.images: {first.cost.images} for an evaluation of {wanted} images"
    fewer = Candidate(candidate.coefficients, images=max(wanted // 2, 2))
    counted = _evaluated(objective, fewer).cost.images
    assert counted == fewer.images, f"candidate.images: {fewer.images} were asked for, and {counted} sampled"
    unseen = _evaluated(objective, Candidate(candidate.coefficients, images=candidate.images, noise=HELD_OUT))
    assert unseen.loss != first.loss, "candidate.noise: the loss on held-out noise is that of the search's"


def _check_gradient(
    objective: Objective, candidate: Candidate, first: Evaluation, *, step: float, tolerance: float
) -> None:
    if objective.why_no_gradient() is not None:
        return
    evaluation = objective.evaluate(candidate, gradient=True)
    gradient, count = evaluation.gradient, len(candidate.coefficients)
    if gradient is None or gradient.shape != (count,):
        raise AssertionError(f"evaluate(gradient=True): expected a gradient of {count} numbers, got {gradient!r}")
    assert math.isclose(evaluation.loss, first.loss, rel_tol=1e-6), (
        f"evaluate(gradient=True): the loss is {evaluation.loss}, without a gradient {first.loss}"
    )
    space, generator = AffineSpace(objective.steps, candidate.coefficients), np.random.default_rng(0)
    for _ in range(2):  # directions of length one, which sum to zero
        moved = space.to_coefficients(generator.standard_normal(space.shape)) - candidate.coefficients
        direction = moved / np.linalg.norm(moved)
        ahead, behind = (
            _evaluated(objective, Candidate(candidate.coefficients + sign * step * direction, images=candidate.images))
            for sign in (1, -1)
        )
        found, expected = float(gradient @ direction), (ahead.loss - behind.loss) / (2 * step)
        assert abs(found - expected) <= tolerance * max(abs(expected), float(np.linalg.norm(gradient))), (
            f"evaluate(gradient=True): {found:.6g} along a direction in which the loss changes by {expected:.6g}"
        )


def check_optimizer(name: str, options: Mapping[str, Any] | None = None, *, budget: int = 60) -> None:
    """Search a quadratic function of 12 coefficients, and check what an optimizer asks.

    * Every candidate, and the recommendation, is ``[K]``, finite, and sums to one.
    * The same seed and the same losses give the same candidates, bit for bit. A search resumes by repeating them.
    * All randomness comes from the seed: numpy's global generator changes nothing, and is not changed.
    * Several candidates may be asked before the first tell, unless the optimizer says that it asks one at a time.
    * A failed evaluation, told as a very large loss, does not end the search.

    Args:
        name: in Nevergrad's registry, which includes ours.
        options: of the study file.
        budget: evaluations.

    Raises:
        AssertionError: one of these is not kept.
        StudySpecError: a candidate's coefficients are not valid, or there is no such optimizer or option.
    """
    spec = OptimizerSpec(name=name, options=dict(options or {}))
    state = str(np.random.get_state())  # noqa: NPY002 - compared, not drawn from
    first = _Run(spec, budget).bits
    assert str(np.random.get_state()) == state, "draws from numpy's global generator"  # noqa: NPY002
    assert first == _Run(spec, budget).bits, "the same seed and answers gave other candidates"
    in_flight = 1 if asks_one_at_a_time(spec) else 3
    one, other = (_Run(spec, budget, in_flight=in_flight).bits for _ in range(2))
    assert one == other, f"{in_flight} at once: another sequence"
    _Run(spec, budget, fails=True)


class _Run:
    """One search; checks each candidate as it is asked."""

    def __init__(self, spec: OptimizerSpec, budget: int, *, in_flight: int = 1, fails: bool = False) -> None:
        space = AffineSpace(STEPS, default_origin(STEPS))
        self.optimizer = build_optimizer(spec, space, budget=budget, workers=in_flight, seed=3)
        self.bits: list[bytes] = []  # of what was asked
        self.losses: list[float] = []
        self._gradient = needs_gradient(spec)
        waiting: list[Any] = []
        while len(self.bits) < budget and not getattr(self.optimizer, "finished", False):
            if len(waiting) == in_flight:
                self._tell(waiting.pop(0), fails=fails and len(self.losses) % 5 == 2)
            waiting.append(self.optimizer.ask())
            self.bits.append(_checked(waiting[-1].value).tobytes())
        for parameter in waiting:
            self._tell(parameter, fails=False)
        _checked(self.optimizer.recommend().value)

    def _tell(self, parameter: Any, *, fails: bool) -> None:
        candidate = candidate_of(parameter)
        distance = float(np.square(candidate.coefficients - TARGET).sum())
        loss = 1e6 if fails else min(distance + 1.0, LARGEST_LOSS)
        gradient = 2 * (candidate.coefficients - TARGET) if self._gradient else None
        attach_evaluation(parameter, None if fails else Evaluation(loss, gradient=gradient))
        self.optimizer.tell(parameter, loss)
        self.losses.append(loss)


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
        tolerance: of differences between batches, relative to the largest feature.

    Raises:
        AssertionError: one of these is not kept.
    """
    assert isinstance(extractor.name, str), "name: is no text"
    count = len(images)
    with torch.no_grad():
        features, again = extractor(images), extractor(images)
        alone = torch.cat([extractor(images[i : i + 1]) for i in range(count)])
    expected = (count, extractor.dimension)
    assert tuple(features.shape) == expected, f"features: have the shape {tuple(features.shape)}, expected {expected}"
    assert features.dtype == torch.float32, f"features: are {features.dtype}, expected float32"
    assert bool(torch.isfinite(features).all()), "features: are not finite"
    assert torch.equal(features, again), "features: of the same images differ the second time"
    apart = float((features - alone).abs().max() / features.abs().max().clamp(min=1e-12))
    assert apart <= tolerance, f"features: of an image alone differ by {apart:.2g} from those in a batch"
    if differentiable:
        leaf = images.detach().clone().requires_grad_()
        linked = extractor(leaf)
        assert linked.requires_grad, "features: have no graph; pass differentiable=False where none is wanted"
        (gradient,) = torch.autograd.grad(linked.sum(), leaf)
        kept = bool(torch.isfinite(gradient).all()) and bool(gradient.abs().sum() > 0)
        assert kept, "features: their gradient in the images is zero or not finite"
    if (both := getattr(extractor, "features_and_logits", None)) is not None:
        with torch.no_grad():
            same, logits = both(images)
        assert torch.equal(same, features), "features_and_logits: other features than a call"
        assert logits.shape[:-1] == (count,), f"logits: have the shape {tuple(logits.shape)}"


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
        found = checkpoint_step(path)
        assert found == step, f"{path}: its step is read as {found}, expected {step}"
    if path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            for share in CUTS:
                cut = Path(folder) / path.name
                cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
                try:
                    _compare(read_checkpoint(cut, key=key).tensors, tensors)  # a cut may remove only padding
                except TrajectoryError as error:
                    if str(cut) not in str(error):
                        raise AssertionError(f"a truncated file is refused without its name: {error}") from error
                except AssertionError as error:
                    raise AssertionError(f"{share:.1%} of the file are read as if they were all: {error}") from error
                except Exception as error:
                    said = f"the first {share:.1%} of the file raise {type(error).__name__}, expected a TrajectoryError"
                    raise AssertionError(said) from error


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    apart = sorted(found.keys() ^ expected.keys())
    assert not apart, f"other tensors than were saved: {', '.join(apart[:3])}"
    for name, tensor in expected.items():
        read = found[name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), (
            f"{name}: read as {read.dtype} {list(read.shape)}, saved as {tensor.dtype} {list(tensor.shape)}"
        )
        bits = (one.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for one in (read, tensor))
        assert torch.equal(*bits), f"{name}: other numbers than were saved"


def check_storage(url: str) -> None:
    """Write a study into a database, read it back, and delete it.

    * 500 coefficients, losses and gradients come back bit for bit, also the smallest numbers and negative zero.
    * A trial's number is the index of its ask. A candidate is stored, as running, before its result is.
    * Failures keep their reasons. Study attributes can be set again; other settings are refused.
    * One coordinator holds a study; a second one gets an error.

    Args:
        url: of a database that this may write to.

    Raises:
        AssertionError: one of these is not kept.
        StudyStoreError: the database cannot be opened or written.
    """
    storage, name = open_storage(url, write=True), f"contract-{uuid.uuid4().hex}/LCSC/0"
    study = StoredStudy.open_or_create(storage, name, {"specification": {"seed": 0}})
    try:
        with study.hold():
            second = StoredStudy.open(open_storage(url, write=True), name)
            with contextlib.suppress(StudyStoreError), second.hold():
                raise AssertionError("a second coordinator may hold a study that one holds already")
            _check_trials(study)
        for value in ({"a": [1, None, 0.1]}, "ü" * 5000, None):
            study.set_attribute("note", value)
            assert study.attributes["note"] == value, "a study attribute is read as another value than was written"
    finally:
        in_database(storage, lambda: storage.delete_study(storage.get_study_id_from_name(name)))
    if name in our_studies(storage):
        raise AssertionError(f"{url}: a study that was deleted is still listed")


def _check_trials(study: StoredStudy) -> None:
    numbers = np.random.default_rng(0).standard_normal((2, K))
    numbers[0, :3] = (SMALLEST, -0.0, 1 / 3)
    candidate = Candidate(numbers[0], images=7, noise=Noise("search", 3))
    evaluation = Evaluation(1 / 3, {"fid": 1e-300}, Cost(images=7, seconds=0.1), gradient=numbers[1])
    keys = [study.add_candidate(candidate) for _ in range(3)]
    assert keys == [0, 1, 2], "the number of a trial is not the index of its ask"
    assert {trial.state for trial in study.trials()} == {TrialState.RUNNING}, (
        "a candidate is not there before its result"
    )
    study.finish(keys[1], evaluation, tell_index=0)
    study.fail(keys[0], [{"reason": "no «image» 😀", "seconds": 0.1}], tell_index=1)
    failed, finished, running = study.trials()
    assert running.state == TrialState.RUNNING, "a trial that did not end has ended"
    assert (failed.state, failed.value) == (TrialState.FAIL, None), "a failed trial is complete"
    assert "no «image» 😀" in str(failed.user_attrs), "the reason of a failure is lost"
    assert finished.value == 1 / 3, f"a loss of {1 / 3!r} is read as {finished.value!r}"
    for attribute, wanted in (("coefficients", numbers[0]), ("gradient", numbers[1])):
        found = np.array(finished.user_attrs[attribute], dtype=np.float64)
        assert found.tobytes() == wanted.tobytes(), f"{attribute}: are read as other numbers than were written"
