"""Fine-tuning all weights: the steps by hand, what it leaves behind, that it goes on bit for bit, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, TrainingError
from lcsc_opt.base.files import only_process
from lcsc_opt.base.records import HELD_OUT, Candidate, Constraint, Evaluation, Noise
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.metrics.loss import Loss
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.one_model import ONE, OneModel
from lcsc_opt.optimizers.gradient import FIRST_KEEP_WEIGHT, DualAscent
from lcsc_opt.sampling import ConsistencyFunction, ConsistencySampler, ImageNoise, NetworkSettings
from lcsc_opt.search.refining import RefineSettings, refine
from lcsc_opt.trajectory import Trajectory
from tests.trajectory.trajectory_examples import append

SHAPE, STEPS = (1, 4, 4), (10, 20, 30)
EMA = ema_coefficients(STEPS, 0.95)
SHORT = RefineSettings(images=240, images_per_step=40, rate=1e-2, checkpoint_every=1, seed=3)


class Network(nn.Module):
    """A constant buffer, a counter, and weights of which a training has moved all but the last bias."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)
            self.last.bias.fill_(0.1)  # type: ignore[union-attr]
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: Tensor, times: Tensor, class_labels: Tensor | None = None) -> Tensor:
        level = (1 + times.to(x.dtype).abs()).rsqrt()[:, None, None, None]
        return 0.7 * torch.tanh(self.last(torch.tanh(self.first(x * level))))


class Features:
    """Smooth and not linear."""

    name, dimension = "smooth", 5

    def __init__(self) -> None:
        self.matrix = torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.matrix.to(images.dtype))


pytestmark = pytest.mark.usefixtures("one_thread")  # sums over several threads have other last bits


@pytest.fixture(autouse=True)
def fewer_images_tell_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.objective.merge_sample_score.FEWEST_KEPT", 500)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., MergeSampleScore]:
    """The objective, anew each time as each process has its own."""

    def made(*, keep: str | None = None, dtype: torch.dtype = torch.float32, batch_size: int = 16) -> MergeSampleScore:
        path = tmp_path / f"{dtype}.trajectory"
        if not path.exists():
            append(path, *STEPS, weights=lambda step: Network(step).to(dtype))
        real = torch.rand(200, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.8 - 0.2
        features = Features()(real).numpy()
        scores = MetricSuite({"inception": Reference.of_features(Features(), features)}, keep=keep)
        network = Network(0).double() if dtype == torch.float64 else Network(0)
        sampler = ConsistencySampler(
            ConsistencyFunction(network),
            image_shape=SHAPE,
            sigmas=[10.0],
            noise=ImageNoise(0),
            settings=NetworkSettings(device="cpu"),
        )
        return MergeSampleScore(Trajectory.open(path), sampler, scores, images=120, batch_size=batch_size)

    return made


Build = Callable[..., MergeSampleScore]


def run(objective: Objective, out: Path, settings: RefineSettings = SHORT, *, resume: bool = False) -> Any:
    return refine(objective, settings, out, start=lambda: EMA, held_out_images=400, resume=resume)


def measured(evaluation: Evaluation) -> tuple[float, dict[str, float]]:
    return evaluation.loss, dict(evaluation.metrics)


def noise_of(step: int) -> Noise:
    return Noise("refine", 3 * 2**20 + step - 1)


def curve(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]


def rows(out: Path) -> list[dict[str, Tensor]]:
    trajectory = Trajectory.open(out)
    return [trajectory.checkpoint(index) for index in range(len(trajectory))]


def test_the_gradient_in_all_weights_is_that_of_the_loss(build: Build) -> None:
    objective = build(dtype=torch.float64)
    assert objective.trajectory is not None
    weights = objective.trajectory.merge(EMA)
    model = OneModel(weights, frozenset(["first.weight", "last.weight"]))
    of_model, candidate = objective.on_weights(model), Candidate(ONE, 40, Noise("own"))
    evaluation = of_model.evaluate(candidate, gradient=True)
    assert measured(evaluation) == measured(objective.evaluate(Candidate(EMA, 40, Noise("own")), gradient=True))
    assert set(model.gradients) == model.varying
    for name, index in [("first.weight", (0, 0, 0, 0)), ("first.weight", (3, 0, 1, 2)), ("last.weight", (0, 2, 1, 1))]:
        losses = []
        for shift in (1e-6, -2e-6):
            weights[name][index] += shift
            losses.append(of_model.evaluate(candidate).loss)
        weights[name][index] += 1e-6
        assert float(model.gradients[name][index]) == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4)


def test_steps_are_adams_and_the_answer_is_their_average(build: Build, tmp_path: Path) -> None:
    objective, out = build(dtype=torch.float64), tmp_path / "r.trajectory"
    answer, *_ = run(objective, out)
    name, made = "first.weight", rows(out)
    m = v = np.zeros(made[0][name].shape)
    average = expected = made[0][name].numpy()
    for step in range(1, SHORT.steps + 1):
        model = OneModel(made[step - 1], frozenset([name]))
        objective.on_weights(model).evaluate(Candidate(ONE, 40, noise_of(step)), gradient=True)
        gradient = model.gradients[name].numpy()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        expected = expected - 1e-2 * (m / (1 - 0.9**step)) / np.sqrt(v / (1 - 0.999**step))
        np.testing.assert_allclose(made[step][name].numpy(), expected, rtol=1e-9)
        average = average + 4 / (step + 3) * (expected - average)
    np.testing.assert_allclose(load_file(answer)[name].numpy(), average, rtol=1e-9)


def test_what_it_leaves(build: Build, tmp_path: Path) -> None:
    objective, out = build(), tmp_path / "new" / "r.trajectory"
    settings = RefineSettings(images=300, images_per_step=40, rate=1e-2, checkpoint_every=2, seed=0)
    file, begun, refined = run(objective, out, settings)
    assert objective.trajectory is not None
    start, made = objective.trajectory.merge(EMA), rows(out)
    assert Trajectory.open(out).steps == (0, 2, 4, 6)  # the seventh step is in the average only
    assert all(torch.equal(made[0][name], part) for name, part in start.items())
    for name in ("last.bias", "count"):  # the same in all checkpoints, or no number that moves
        assert torch.equal(made[-1][name], start[name])
    assert not torch.equal(made[-1]["first.bias"], start["first.bias"])
    assert [line["step"] for line in curve(out)] == [1, 2, 3, 4, 5, 6, 7]
    assert not out.with_suffix(".state.pt").exists()
    assert measured(begun) == measured(objective.evaluate(Candidate(EMA, 400, HELD_OUT)))
    answer = objective.on_weights(OneModel(load_file(file), frozenset()))
    assert measured(refined) == measured(answer.evaluate(Candidate(ONE, 400, HELD_OUT)))
    assert refined.loss < 0.9 * begun.loss
    searched = objective.on_weights(Trajectory.open(out))
    assert searched.evaluate(Candidate(np.eye(4)[0], 400, HELD_OUT)).loss == begun.loss
    assert searched.evaluate(Candidate(np.full(4, 0.25)), gradient=True).gradient is not None


def stopped(objective: MergeSampleScore, out: Path, step: int, error: BaseException | None = None) -> dict[str, Any]:
    """Refine, let the evaluation of a step fail, and give the state that is left."""
    evaluate, error = MergeSampleScore.evaluate, error or KeyboardInterrupt()

    def stopping(self: MergeSampleScore, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        if candidate.noise == noise_of(step):
            raise error
        return evaluate(self, candidate, gradient=gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergeSampleScore, "evaluate", stopping)
        with pytest.raises(type(error)):
            run(objective, out)
    state: dict[str, Any] = torch.load(out.with_suffix(".state.pt"), weights_only=True)
    return state


@pytest.mark.parametrize(
    ("keep", "step", "error"),
    [(None, 1, KeyboardInterrupt()), ("precision", 4, KeyboardInterrupt()), (None, 4, MemoryError())],
)
def test_interrupted_it_goes_on_bit_for_bit(
    build: Build, tmp_path: Path, keep: str | None, step: int, error: BaseException
) -> None:
    whole, parted = tmp_path / "whole.trajectory", tmp_path / "parted.trajectory"
    expected = run(build(keep=keep), whole)
    state = stopped(build(keep=keep), parted, step, error)
    assert state["done"] == (step - 1 if isinstance(error, KeyboardInterrupt) else 0)
    found = run(build(keep=keep), parted, resume=True)
    assert [measured(each) for each in found[1:]] == [measured(each) for each in expected[1:]]
    assert found[0].read_bytes() == expected[0].read_bytes()
    assert Trajectory.open(parted).sha256 == Trajectory.open(whole).sha256
    losses = [[(line["step"], line["loss"]) for line in curve(path)] for path in (whole, parted)]
    assert losses[0] == losses[1]


def test_what_is_kept_weighs_more_where_it_is_lost(build: Build, tmp_path: Path) -> None:
    objective, out = build(keep="precision"), tmp_path / "r.trajectory"
    state = stopped(objective, out, SHORT.steps)
    run(objective, out, resume=True)
    kept = DualAscent()
    for step, row in enumerate(rows(out)[: state["done"]], start=1):
        candidate = Candidate(ONE, 40, noise_of(step), kept.weight, Constraint(*state["constraint"]))
        kept.update(objective.on_weights(OneModel(row, frozenset())).evaluate(candidate))
    assert state["keep_weight"] == kept.weight != FIRST_KEEP_WEIGHT
    answers = [out.with_suffix(".safetensors"), run(build(), tmp_path / "plain.trajectory")[0]]
    assert not torch.equal(*(load_file(answer)["first.weight"] for answer in answers))


def test_what_is_not_finite_ends_it_and_names_the_step(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, out = build(), tmp_path / "r.trajectory"
    sample = objective.sampler.sample

    def broken(noise: Noise, start: int, stop: int) -> Tensor:
        images = sample(noise, start, stop)
        return images / 0 if noise == noise_of(5) else images

    monkeypatch.setattr(objective.sampler, "sample", broken)
    with pytest.raises(
        TrainingError, match=r"step 5: .*not finite; the checkpoints before it are complete in .*r\.traj"
    ):
        run(objective, out)
    assert Trajectory.open(out).steps == (0, 1, 2, 3, 4)


def test_nothing_is_written_over_or_mixed(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.trajectory"
    with pytest.raises(StudySpecError, match="there is nothing to resume; leave --resume out to start"):
        run(build(), out, resume=True)
    stopped(build(), out, 3)
    assert "stopped after step 2; stored up to it" in capsys.readouterr().err
    with pytest.raises(StudySpecError, match="exists already; continue with --resume, or give another name"):
        run(build(), out)
    other = SHORT.model_copy(update={"rate": 2e-2})
    with pytest.raises(
        StudySpecError, match=r"was started with other settings: settings\.rate was 0\.01, is now 0\.02"
    ):
        run(build(), out, other, resume=True)
    with pytest.raises(StudySpecError, match=r"was started with other settings: objective\.scores"):
        run(build(keep="precision"), out, resume=True)
    with only_process(out), pytest.raises(StudySpecError, match="another process refines to it"):
        run(build(), out, resume=True)  # it would set back the curve of the other, and write over its state
    run(build(), out, resume=True)
    interrupted = tmp_path / "damaged.trajectory"
    interrupted.with_suffix(".state.pt").write_bytes(b"no state")
    with pytest.raises(TrainingError, match="is damaged; start again under another name"):
        run(build(), interrupted, resume=True)


def test_objectives_without_a_gradient_in_weights_are_refused(
    objective: Objective, build: Build, tmp_path: Path
) -> None:
    with pytest.raises(ObjectiveError, match="refine: the objective samples no images"):
        run(objective, tmp_path / "r.trajectory")
    without = build()
    without.scores.loss = Loss.parse("precision")
    with pytest.raises(ObjectiveError, match=r"precision.* in the loss has no gradient.*; search coefficients"):
        run(without, tmp_path / "r.trajectory")
    assert not (tmp_path / "r.trajectory").exists()
