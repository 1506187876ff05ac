"""Consistency training: the parts against their equations, and that a run can be put down anywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from lcsc_opt.errors import TrajectoryError
from lcsc_opt.sampling import ConsistencyFunction, noise_levels
from lcsc_opt.training import consistency
from lcsc_opt.training.consistency import (
    ConsistencyTraining,
    consistency_loss,
    discretization,
    initialize,
    interval_probabilities,
    pseudo_huber,
    train_consistency,
)
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

TINY = ConsistencyTraining(steps=20, checkpoint_every=4, batch_size=8, last_discretization=40)


class ToyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.level = nn.Linear(1, 8)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)) + self.level(c_noise[:, None] / 1000)[:, :, None, None]
        output: Tensor = self.last(nn.functional.silu(hidden))
        return output


def training_images() -> Tensor:
    """Bright or dark squares."""
    signs = torch.randint(2, (64, 1, 1, 1), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    return signs * torch.full((64, 1, 4, 4), 0.5)


IMAGES = training_images()


def train(path: Path, training: ConsistencyTraining = TINY, build: Callable[[], nn.Module] = ToyNetwork) -> Trajectory:
    return train_consistency(build, IMAGES, training=training, path=path)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return train(tmp_path_factory.mktemp("undisturbed") / "run.trajectory")


# the curriculum of noise levels


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(4000, 10, 160), (400_000, 10, 1280), (20, 10, 40), (1000, 2, 150), (90, 10, 35)]
)
def test_the_discretization_is_the_papers(steps: int, first: int, last: int) -> None:
    training = ConsistencyTraining(steps=steps, first_discretization=first, last_discretization=last)
    stage = math.floor(steps / (math.log2(math.floor(last / first)) + 1))  # K' of Song & Dhariwal 2023, Table 1
    for step in {0, 1, stage - 1, stage, 2 * stage, steps // 2, steps - 1}:
        levels = min(first * 2 ** (step // stage), last) + 1
        assert discretization(step, training) == levels - 1


def test_the_discretization_doubles_from_first_to_last() -> None:
    training = ConsistencyTraining()
    counts = [discretization(step, training) for step in range(training.steps)]
    assert sorted(set(counts)) == [10, 20, 40, 80, 160]
    assert counts == sorted(counts)
    assert [counts.count(count) for count in (10, 20, 40, 80, 160)] == [800] * 5


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 40))
def test_the_last_discretization_is_reached_however_short_the_run(first: int, steps: int, factor: int) -> None:
    last = first * 2 ** (factor % 4)
    training = ConsistencyTraining(steps=steps, first_discretization=first, last_discretization=last)
    counts = [discretization(step, training) for step in range(steps)]
    assert counts[0] == first
    assert counts[-1] == min(last, first * 2 ** (steps - 1))


# which noise levels are trained


@given(st.integers(1, 300), st.floats(-3, 1), st.floats(0.3, 3), st.floats(1, 100))
def test_interval_probabilities_are_lognormal(count: int, mean: float, std: float, sigma_max: float) -> None:
    training = ConsistencyTraining(noise_mean=mean, noise_std=std, sigma_max=sigma_max)
    levels = noise_levels(count + 1, sigma_min=training.sigma_min, sigma_max=sigma_max)
    found = interval_probabilities(levels, training)
    below = stats.lognorm.cdf(levels.numpy(), s=std, scale=math.exp(mean))
    assert found.shape == (count,)
    assert found.tolist() == pytest.approx((below[1:] - below[:-1]).tolist(), abs=1e-12)
    assert (found >= 0).all()
    assert found.sum() <= 1 + 1e-12


def test_the_defaults_leave_out_little_noise() -> None:
    training = ConsistencyTraining()
    levels = noise_levels(161, sigma_min=training.sigma_min, sigma_max=training.sigma_max)
    assert 0.95 < interval_probabilities(levels, training).sum() < 1


# the loss


@given(st.integers(1, 3), st.integers(1, 6), st.floats(1e-6, 1e3))
def test_pseudo_huber_is_its_formula(channels: int, size: int, scale: float) -> None:
    x = scale * torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = 0.00054 * math.sqrt(channels * size * size)
    squared = [float((image**2).sum()) for image in x]
    expected = [math.sqrt(s + c * c) - c for s in squared]
    assert pseudo_huber(x).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert pseudo_huber(-x).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert (pseudo_huber(x) >= 0).all()
    assert not pseudo_huber(0 * x).any()


def test_the_loss_compares_the_student_above_with_the_teacher_below() -> None:
    network = ToyNetwork()
    initialize(network, torch.Generator().manual_seed(0))
    function = ConsistencyFunction(network)
    levels = noise_levels(6, sigma_min=0.002, sigma_max=20.0)
    weights = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1], dtype=torch.float64)
    batch = IMAGES[:16]
    loss = consistency_loss(function, batch, levels, weights, torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(loss, network.first.weight)

    generator = torch.Generator().manual_seed(3)
    interval = torch.multinomial(weights, 16, replacement=True, generator=generator)
    z = torch.randn(batch.shape, generator=generator)
    losses = []
    for i in range(16):
        low, high = (levels[interval[i] + end].float().reshape(1) for end in (0, 1))
        teacher = function(batch[i] + low * z[i : i + 1], low).detach()  # no gradient goes through it
        student = function(batch[i] + high * z[i : i + 1], high)
        losses.append(pseudo_huber(student - teacher) / (high - low))
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, network.first.weight)[0], rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss_and_samples_become_the_data(tmp_path: Path) -> None:
    training = dataclasses.replace(TINY, steps=600, checkpoint_every=300, batch_size=32, learning_rate=1e-2)
    data = torch.full((64, 1, 4, 4), 0.5)
    trajectory = train_consistency(ToyNetwork, data, training=training, path=tmp_path / "run.trajectory")
    before, after = ToyNetwork(), ToyNetwork()
    initialize(before, torch.Generator().manual_seed(0))
    after.load_state_dict(trajectory.merge([0.0, 1.0]))
    levels = noise_levels(41, sigma_min=training.sigma_min, sigma_max=training.sigma_max)
    weights = interval_probabilities(levels, training)
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    losses, errors = [], []
    for network in (before, after):
        function = ConsistencyFunction(network)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            losses.append(float(consistency_loss(function, data.repeat(20, 1, 1, 1), levels, weights, generator)))
            errors.append(float((function(20 * noise, torch.full((500,), 20.0)) - 0.5).square().mean()))
    assert losses[1] < 0.5 * losses[0]
    assert errors[1] < 0.5 * errors[0]


# a run


def test_a_trajectory_has_a_checkpoint_every_so_many_steps(undisturbed: Trajectory) -> None:
    assert undisturbed.steps == (4, 8, 12, 16, 20)
    assert undisturbed.merge([0, 0, 0, 0, 1]).keys() == ToyNetwork().state_dict().keys()
    folder = undisturbed.path
    assert {entry.name for entry in folder.parent.iterdir()} == {folder.name}, "nothing partial is left"
    assert not list(folder.glob("*.pt"))


def test_the_same_seed_trains_the_same_bytes(undisturbed: Trajectory, tmp_path: Path) -> None:
    torch.manual_seed(99)  # neither the global generator nor the weights that come from it matter
    state = torch.get_rng_state()
    again = train(tmp_path / "again.trajectory")
    assert again.sha256 == undisturbed.sha256
    ToyNetwork()
    assert not torch.equal(torch.get_rng_state(), state), "building a network draws from the global generator"


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"learning_rate": 2e-3}, {"batch_size": 9}, {"sigma_max": 10.0}, {"noise_mean": 0.0}]
)
def test_other_settings_train_other_weights(undisturbed: Trajectory, tmp_path: Path, change: dict[str, Any]) -> None:
    other = train(tmp_path / "other.trajectory", dataclasses.replace(TINY, **change))
    assert other.sha256 != undisturbed.sha256


class Stop(BaseException):
    """As Ctrl-C: not an Exception."""


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool = False) -> None:
    """Let the ``call``-th call of a function stop the process, before or after doing its work."""
    original, calls = getattr(owner, name), iter(range(1, 10_000))

    def stopping(*arguments: Any, **named: Any) -> Any:
        now = next(calls) == call
        if now and not after:
            raise Stop
        result = original(*arguments, **named)
        if now:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, stopping)


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (consistency, "consistency_loss", 1, False),  # before anything
        (consistency, "consistency_loss", 3, False),  # before the first checkpoint
        (torch, "save", 1, False),  # at the first checkpoint: before the state
        (torch, "save", 1, True),  # with the state not at its place yet
        (TrajectoryWriter, "append", 1, False),  # with the state, without its checkpoint
        (TrajectoryWriter, "append", 1, True),
        (consistency, "consistency_loss", 11, False),  # between checkpoints
        (torch, "save", 3, True),
        (TrajectoryWriter, "append", 3, False),
        (TrajectoryWriter, "append", 3, True),
        (TrajectoryWriter, "append", 5, False),
        (TrajectoryWriter, "append", 5, True),  # all is trained
        (Path, "replace", -1, False),  # with the state gone, the folder not at its place yet
    ],
)
def test_a_run_stopped_anywhere_and_continued_trains_the_same_bytes(
    undisturbed: Trajectory, tmp_path: Path, owner: Any, name: str, call: int, after: bool
) -> None:
    path = tmp_path / "run.trajectory"
    with pytest.MonkeyPatch.context() as patch:
        if owner is Path:
            patch.setattr(Path, "replace", partial_replace_stops(Path.replace))
        else:
            stop_at(patch, owner, name, call, after=after)
        with pytest.raises(Stop):
            train(path)
    assert not path.exists()
    assert train(path).sha256 == undisturbed.sha256
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name}
    assert {entry.name for entry in path.iterdir()} == {entry.name for entry in undisturbed.path.iterdir()}


def partial_replace_stops(original: Any) -> Any:
    def replace(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise Stop
        result: Path = original(self, target)
        return result

    return replace


def test_the_state_is_never_behind_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # else other arithmetic, such as other threads, would train a saved checkpoint again to other bytes
    stop_at(monkeypatch, TrajectoryWriter, "append", 3, after=True)
    with pytest.raises(Stop):
        train(tmp_path / "run.trajectory")
    (state,) = tmp_path.glob("*.partial/*.pt")
    assert torch.load(state, weights_only=True)["step"] == 12


def test_a_continued_run_does_not_train_again_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.trajectory"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, consistency, "consistency_loss", 14)
        with pytest.raises(Stop):
            train(path)
    steps: list[int] = []
    original = consistency.discretization
    monkeypatch.setattr(
        consistency, "discretization", lambda step, training: steps.append(step) or original(step, training)
    )
    train(path)
    assert steps == list(range(12, 20))


def test_a_finished_trajectory_is_opened_at_once(undisturbed: Trajectory) -> None:
    def build() -> nn.Module:
        raise AssertionError("nothing needs a network")

    assert train(undisturbed.path, build=build).sha256 == undisturbed.sha256


# what goes wrong


@pytest.mark.parametrize(("steps", "every"), [(3, 5), (5, 5), (9, 5)])
def test_fewer_than_two_checkpoints_are_refused(tmp_path: Path, steps: int, every: int) -> None:
    with pytest.raises(TrajectoryError, match=f"{steps} steps with a checkpoint every {every} leave fewer than two"):
        train(tmp_path / "run.trajectory", dataclasses.replace(TINY, steps=steps, checkpoint_every=every))
    assert not list(tmp_path.iterdir())


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    class Diverging(ToyNetwork):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return super().forward(x, c_noise) * math.nan

    with pytest.raises(TrajectoryError, match=r"diverged at step 1 \(loss nan\); lower its learning_rate"):
        train(tmp_path / "run.trajectory", build=Diverging)


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajectoryError, match="choose a cache folder with LCSC_CACHE"):
        train(tmp_path / "file" / "run.trajectory")


# names and weights


def test_every_setting_and_the_network_change_the_key() -> None:
    training = ConsistencyTraining()
    keys = {training.key("net"), training.key("other net")}
    for field in dataclasses.fields(training):
        keys.add(dataclasses.replace(training, **{field.name: getattr(training, field.name) + 1}).key("net"))
    assert len(keys) == 2 + len(dataclasses.fields(training))
    assert training.key("net") == ConsistencyTraining().key("net")
    assert len(training.key("net")) == 16


def test_the_recipe_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ConsistencyTraining().key("net")
    monkeypatch.setattr(consistency, "RECIPE", consistency.RECIPE + 1)
    assert ConsistencyTraining().key("net") != before


def test_weights_are_drawn_from_the_generator_only() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        network = ToyNetwork()
        initialize(network, torch.Generator().manual_seed(seed))
        return network.state_dict()

    first, same, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["first.weight"], other["first.weight"])


@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(50, 400), lambda: nn.Conv2d(16, 64, 3), lambda: nn.Conv2d(16, 64, 3, groups=4)]
)
def test_weights_are_distributed_as_pytorchs_own(build: Callable[[], nn.Module]) -> None:
    module, default = build(), build()
    initialize(module, torch.Generator().manual_seed(0))
    for name, drawn in module.state_dict().items():
        reference = default.state_dict()[name]
        assert float(drawn.abs().max()) == pytest.approx(float(reference.abs().max()), rel=0.2)
        assert float(drawn.std()) == pytest.approx(float(reference.std()), rel=0.2)


def test_normalization_layers_start_as_the_identity() -> None:
    network = ToyNetwork()
    nn.init.uniform_(network.norm.weight)
    nn.init.uniform_(network.norm.bias)
    initialize(network, torch.Generator().manual_seed(0))
    assert (network.norm.weight == 1).all()
    assert (network.norm.bias == 0).all()
