"""One row that was trained on its own samples: the step by hand, where it stands, which way is the better one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.base.records import Candidate, Noise
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.metrics import Reference, Scores
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import ImageNoise, NetworkSettings
from lcsc_opt.sampling.function import FunctionSampler
from lcsc_opt.search.self_training import append_self_trained, with_weight
from lcsc_opt.training.recipes import Cd, TrainingRecipe
from lcsc_opt.training.recipes.base import Batch, Kind
from lcsc_opt.trajectory import Trajectory
from tests.trajectory.trajectory_examples import make_trajectory

STEPS = (10, 20, 30)
EMA = ema_coefficients(STEPS, 0.9)


class Scale(nn.Module):
    """Images are noise times a number: ``x [N, 1, 2, 2]`` → the same."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale]))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Narrow(TrainingRecipe):
    """Learns nine tenths of the standard deviation of the images: what trains on its own samples grows narrower."""

    name: ClassVar[str] = "narrow"
    kind: ClassVar[Kind] = "ddpm"
    begins_from: ClassVar[tuple[Kind, ...]] = ()
    optimizer: ClassVar[Any] = "Adam"
    batch_size: int = 500
    learning_rate: float = 0.01

    def loss(self, batch: Batch) -> Tensor:
        return (batch.network(torch.ones(1)) - 0.9 * batch.images.std()).square().sum()


class Pixels:
    name, dimension = "scaled-pixels", 4

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def objective(tmp_path: Path) -> MergeSampleScore:
    """Checkpoints of scale 0.2, 0.25, 0.3 and real images of 0.5: searches want more than any has."""
    scales = {10: Scale(0.2), 20: Scale(0.25), 30: Scale(0.3)}
    trajectory = make_trajectory(tmp_path / "scales.trajectory", STEPS, weights=scales.__getitem__)
    real = 0.5 * torch.randn(400, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy()
    scores = Scores({"inception": Reference.of_features(Pixels(), real)})
    sampler = FunctionSampler(
        Scale(0.0),
        lambda model, noise: model(noise),
        image_shape=(1, 2, 2),
        nfe=1,
        noise=ImageNoise(0),
        settings=NetworkSettings("cpu"),
    )
    return MergeSampleScore(trajectory, sampler, scores, images=200)


def append(objective: MergeSampleScore, out: Path, recipe: TrainingRecipe | None = None, **changes: Any) -> Any:
    how = {"samples": 1000, "steps": 5, "seed": 3, **changes}
    return append_self_trained(objective, recipe or Narrow(), out, start=lambda: EMA, **how)


def rows(path: Path) -> list[float]:
    trajectory = Trajectory.open(path)
    return [float(trajectory.checkpoint(index)["scale"]) for index in range(len(trajectory))]


def test_a_step_is_the_recipes_on_samples_of_the_start(objective: MergeSampleScore, tmp_path: Path) -> None:
    images = objective.images(EMA, Noise("neon", 3), 1000)
    network = Scale(0.0)
    network.load_state_dict(Trajectory.open(tmp_path / "scales.trajectory").merge(EMA))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(derive_seed(3, "neon", 0))
    chosen = torch.randint(1000, (500,), generator=generator)
    batch = Batch(images[chosen], 0, 1, network, network, generator)
    Narrow().loss(batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    out = tmp_path / "neon.trajectory"
    append(objective, out, steps=1)
    assert rows(out)[1] == float(network.scale.detach()), "of one step the average is the iterate"


def test_the_row_stands_second_and_the_others_are_what_they_were(objective: MergeSampleScore, tmp_path: Path) -> None:
    out = tmp_path / "neon.trajectory"
    step, _ = append(objective, out)
    made, before = Trajectory.open(out), Trajectory.open(tmp_path / "scales.trajectory")
    assert (made.steps, step) == ((10, 11, 20, 30), 11)
    for index, old in ((0, 0), (2, 1), (3, 2)):
        assert made.checkpoint(index)["scale"] == before.checkpoint(old)["scale"]
    assert int(made.checkpoint(1)["count"]) == 7, "what is not trained is the start's"
    assert not list(tmp_path.glob("*pending*"))


def test_away_from_it_is_better_where_it_loses_what_real_images_have(
    objective: MergeSampleScore, tmp_path: Path
) -> None:
    out = tmp_path / "neon.trajectory"
    _, losses = append(objective, out)
    begun = float(Trajectory.open(tmp_path / "scales.trajectory").merge(EMA)["scale"])
    trained = rows(out)[1]
    assert trained < begun, "it learned to be narrower"
    assert losses[1.0] < losses[0.5] < losses[0.0] < losses[-0.5]
    merged = Trajectory.open(out).merge(with_weight(EMA, 1, 2.0))["scale"]
    assert float(merged) == pytest.approx(3 * begun - 2 * trained, rel=1e-5)
    assert losses[0.0] == pytest.approx(objective.evaluate(Candidate(EMA)).loss, rel=1e-5)


def test_checkpoints_one_step_apart_leave_no_room(objective: MergeSampleScore, tmp_path: Path) -> None:
    near = objective.on_weights(make_trajectory(tmp_path / "near", (1, 2), weights=lambda _: Scale(0.2)))
    with pytest.raises(StudySpecError, match="no room for a row"):
        append_self_trained(near, Narrow(), tmp_path / "neon.trajectory", start=lambda: np.array([0.5, 0.5]))


class Diverges(Narrow):
    name: ClassVar[str] = "diverges"

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * float("nan")


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"recipe": Diverges()}, "n.trajectory", "training on its own samples: the loss of step 1 is nan"),
        ({"recipe": Cd()}, "n.trajectory", "cd needs a teacher; give ct or ict"),
        ({}, "neon", "end the name in .trajectory"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    objective: MergeSampleScore, tmp_path: Path, changes: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(LcscError, match=message):
        append(objective, tmp_path / name, **{"samples": 20, "steps": 2, **changes})
    assert [path.name for path in tmp_path.iterdir()] == ["scales.trajectory"]
