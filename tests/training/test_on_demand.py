"""What every recipe's run must do: be the same for the same seed, and go on wherever it was put down."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.training import consistency, diffusion, on_demand
from lcsc_opt.training.networks import initialize
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from tests.training.training_examples import RECIPES, Recipe, ToyNetwork


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return recipe.train(tmp_path_factory.mktemp("undisturbed") / "run.trajectory")


def test_a_trajectory_has_a_checkpoint_every_so_many_steps(undisturbed: Trajectory) -> None:
    assert undisturbed.steps == (4, 8, 12, 16, 20)
    assert undisturbed.merge([0, 0, 0, 0, 1]).keys() == ToyNetwork().state_dict().keys()
    folder = undisturbed.path
    assert {entry.name for entry in folder.parent.iterdir()} == {folder.name}, "nothing partial is left"
    assert not list(folder.glob("*.pt"))


def test_the_same_seed_trains_the_same_bytes(recipe: Recipe, undisturbed: Trajectory, tmp_path: Path) -> None:
    torch.manual_seed(99)  # neither the global generator nor the weights that come from it matter
    state = torch.get_rng_state()
    again = recipe.train(tmp_path / "again.trajectory")
    assert again.sha256 == undisturbed.sha256
    ToyNetwork()
    assert not torch.equal(torch.get_rng_state(), state), "building a network draws from the global generator"


def test_a_run_trains_the_same_bytes_on_any_number_of_threads(
    recipe: Recipe, undisturbed: Trajectory, tmp_path: Path
) -> None:
    torch.set_num_threads(4)
    try:
        assert recipe.train(tmp_path / "run.trajectory").sha256 == undisturbed.sha256
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


def test_a_run_trains_where_gradients_are_off(recipe: Recipe, undisturbed: Trajectory, tmp_path: Path) -> None:
    with torch.no_grad():
        assert recipe.train(tmp_path / "run.trajectory").sha256 == undisturbed.sha256


OTHER_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, change) for name in RECIPES for change in ({"seed": 1}, {"learning_rate": 2e-3}, {"batch_size": 9})),
    ("consistency", {"sigma_max": 10.0}),
    ("consistency", {"noise_mean": 0.0}),
    ("diffusion", {"timesteps": 500}),
    ("diffusion", {"beta_schedule": "squaredcos_cap_v2"}),
]


@pytest.mark.parametrize(("name", "change"), OTHER_SETTINGS)
def test_other_settings_train_other_weights(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    first = RECIPES[name].train(tmp_path / "first.trajectory", steps=8)
    other = RECIPES[name].train(tmp_path / "other.trajectory", steps=8, **change)
    assert other.sha256 != first.sha256


# put down and taken up again


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
        (ToyNetwork, "forward", 1, False),  # before anything
        (ToyNetwork, "forward", 3, False),  # before the first checkpoint
        (torch, "save", 1, False),  # at the first checkpoint: before the state
        (torch, "save", 1, True),  # with the state not at its place yet
        (TrajectoryWriter, "append", 1, False),  # with the state, without its checkpoint
        (TrajectoryWriter, "append", 1, True),
        (ToyNetwork, "forward", 11, False),  # between checkpoints
        (torch, "save", 3, True),
        (TrajectoryWriter, "append", 3, False),
        (TrajectoryWriter, "append", 3, True),
        (TrajectoryWriter, "append", 5, False),
        (TrajectoryWriter, "append", 5, True),  # all is trained
        (Path, "replace", -1, False),  # with the state gone, the folder not at its place yet
    ],
)
def test_a_run_stopped_anywhere_and_continued_trains_the_same_bytes(
    recipe: Recipe, undisturbed: Trajectory, tmp_path: Path, owner: Any, name: str, call: int, after: bool
) -> None:
    path = tmp_path / "run.trajectory"
    with pytest.MonkeyPatch.context() as patch:
        if owner is Path:
            patch.setattr(Path, "replace", partial_replace_stops(Path.replace))
        else:
            stop_at(patch, owner, name, call, after=after)
        with pytest.raises(Stop):
            recipe.train(path)
    assert not path.exists()
    assert recipe.train(path).sha256 == undisturbed.sha256
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name}
    assert {entry.name for entry in path.iterdir()} == {entry.name for entry in undisturbed.path.iterdir()}


def partial_replace_stops(original: Any) -> Any:
    def replace(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise Stop
        result: Path = original(self, target)
        return result

    return replace


def test_the_state_is_never_behind_the_checkpoints(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # else other arithmetic, such as other threads, would train a saved checkpoint again to other bytes
    stop_at(monkeypatch, TrajectoryWriter, "append", 3, after=True)
    with pytest.raises(Stop):
        recipe.train(tmp_path / "run.trajectory")
    (state,) = tmp_path.glob("*.partial/*.pt")
    assert torch.load(state, weights_only=True)["step"] == 12


def test_a_state_never_leaves_a_checkpoint_behind(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a kill after it would: the run goes on from the state, and trains no step before it again
    original, sync, on_disk = on_demand._Run._save_state, os.fsync, []

    def noting(run: Any) -> None:
        original(run)
        manifest = run.state_path.parent / "manifest.json"
        on_disk.append(Trajectory.open(manifest.parent).steps if manifest.exists() else ())

    monkeypatch.setattr(on_demand._Run, "_save_state", noting)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.02), sync(descriptor)))  # a slow disk
    recipe.train(tmp_path / "run.trajectory")
    assert on_disk == [(4, 8, 12, 16, 20)[:count] for count in range(5)]


def test_training_goes_on_while_a_checkpoint_is_written(
    recipe: Recipe, undisturbed: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, write, written, trained = on_demand._Run._train_step, os.write, threading.Event(), []

    def noting(run: Any) -> float:
        loss = original(run)
        trained.append(run.step)
        if run.step == 7:
            written.set()
        return loss

    def held(descriptor: int, content: Any) -> int:
        assert threading.current_thread() is not threading.main_thread()
        assert written.wait(120)
        return write(descriptor, content)

    monkeypatch.setattr(on_demand._Run, "_train_step", noting)
    monkeypatch.setattr(os, "write", held)
    assert recipe.train(tmp_path / "run.trajectory").sha256 == undisturbed.sha256
    assert trained == list(range(1, 21))


def test_a_continued_run_does_not_train_again_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.trajectory"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, diffusion, "diffusion_loss", 14)
        with pytest.raises(Stop):
            RECIPES["diffusion"].train(path)
    steps: list[int] = []
    original = on_demand._Run._train_step

    def noting(run: Any) -> float:
        steps.append(run.step)
        return original(run)

    monkeypatch.setattr(on_demand._Run, "_train_step", noting)
    RECIPES["diffusion"].train(path)
    assert steps == list(range(12, 20))


def test_a_finished_trajectory_is_opened_at_once(recipe: Recipe, undisturbed: Trajectory) -> None:
    def build() -> nn.Module:
        raise AssertionError("nothing needs a network")

    assert recipe.train(undisturbed.path, build=build).sha256 == undisturbed.sha256


# what goes wrong


@pytest.mark.parametrize(("steps", "every"), [(3, 5), (5, 5), (9, 5)])
def test_fewer_than_two_checkpoints_are_refused(recipe: Recipe, tmp_path: Path, steps: int, every: int) -> None:
    with pytest.raises(TrajectoryError, match=f"{steps} steps with a checkpoint every {every} leave fewer than two"):
        recipe.train(tmp_path / "run.trajectory", steps=steps, checkpoint_every=every)
    assert not list(tmp_path.iterdir())


def test_a_training_that_diverges_says_so(recipe: Recipe, tmp_path: Path) -> None:
    class Diverging(ToyNetwork):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return super().forward(x, c_noise) * math.nan

    with pytest.raises(TrajectoryError, match=r"diverged at step 1 \(loss nan\); lower its learning_rate"):
        recipe.train(tmp_path / "run.trajectory", build=Diverging)


def test_a_path_that_cannot_be_written_is_named(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajectoryError, match="choose a cache folder with LCSC_CACHE"):
        recipe.train(tmp_path / "file" / "run.trajectory")


def test_a_damaged_state_is_named(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, TrajectoryWriter, "append", 2)
        with pytest.raises(Stop):
            recipe.train(tmp_path / "run.trajectory")
    (state,) = tmp_path.glob("*.partial/*.pt")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(TrajectoryError, match=r"training\.safe\.pt: is damaged; delete it"):
        recipe.train(tmp_path / "run.trajectory")


# names and weights


@pytest.mark.parametrize("module", [consistency, diffusion])
def test_every_setting_the_network_and_the_recipe_change_the_key(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {consistency: consistency.ConsistencyTraining, diffusion: diffusion.DiffusionTraining}[module]
    training = kind()
    keys = {training.key("net"), training.key("other net")}
    for field in dataclasses.fields(training):
        value = getattr(training, field.name)
        other = value + ("_other" if isinstance(value, str) else 1)
        keys.add(dataclasses.replace(training, **{field.name: other}).key("net"))
    assert training.key("net") == kind().key("net")
    assert len(training.key("net")) == 16
    monkeypatch.setattr(module, "RECIPE", "another")
    keys.add(training.key("net"))
    assert len(keys) == 3 + len(dataclasses.fields(training))


def test_recipes_never_share_a_key() -> None:
    assert len({recipe.tiny.key("net") for recipe in RECIPES.values()}) == len(RECIPES)


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
