"""One step of every recipe against the formula of its paper in float64, with the same random numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from lcsc_opt.base.errors import StudySpecError, TrainingError
from lcsc_opt.training.preparing import parse_recipe
from lcsc_opt.training.recipes import RECIPES, Batch, TrainingRecipe
from lcsc_opt.training.recipes.consistency import Cd, Ct, Ict
from lcsc_opt.training.recipes.diffusion import Ddpm, Edm, Flow

N, PIXELS = 5, 4
IMAGES = 0.7 * torch.randn(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))
X = IMAGES.flatten(1).double()


class Affine(nn.Module):
    """F(x, c) = a x + b c."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.a * x + self.b * c[:, None, None, None]


STUDENT, TARGET = (0.3, 0.0004), (0.5, -0.0002)


def batch(recipe: TrainingRecipe, *, step: int = 0, steps: int = 100, teacher: object = None) -> Batch:
    return Batch(
        images=IMAGES,
        step=step,
        steps=steps,
        network=Affine(*STUDENT),
        target=Affine(*TARGET),
        generator=torch.Generator().manual_seed(7),
        noise_scale=recipe.noise_scale,
        teacher=teacher,  # type: ignore[arg-type]
    )


def loss(recipe: TrainingRecipe, **given: Any) -> float:
    return recipe.loss(batch(recipe, **given)).item()


def column(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)[:, None]


def f(weights: tuple[float, float], x: Tensor, s: Tensor, *, low: float = 0.002, scale: float = 250) -> Tensor:
    """Song et al. 2023, Eq. 5 and Appendix C; with ``low`` 0 and ``scale`` 1/4 Karras et al. 2022, Table 1."""
    (a, b), data = weights, 0.5
    skip = data**2 / ((s - low) ** 2 + data**2)
    norm = (s**2 + data**2).sqrt()
    return skip * x + data * (s - low) / norm * (a * x / norm + b * scale * s.log())


def karras(i: Tensor, count: int) -> Tensor:
    """The i-th of ``count`` noise levels, increasing (Karras et al. 2022, Eq. 5)."""
    low, high = 0.002 ** (1 / 7), 20 ** (1 / 7)
    return (low + i / (count - 1) * (high - low)) ** 7


def lognormal_pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``[N, 1]`` n, and the noise levels n and n + 1 of ``count`` + 1 (Song & Dhariwal 2023, Table 1)."""
    levels = karras(torch.arange(count + 1, dtype=torch.float64), count + 1)
    chances = (0.5 * (1 + torch.erf((levels.log() + 1.1) / (math.sqrt(2) * 2)))).diff()
    n = torch.multinomial(chances, N, replacement=True, generator=generator)[:, None]
    return n, levels[n], levels[n + 1]


def teacher(x: Tensor, sigma: Tensor) -> Tensor:
    """Of standard normal images."""
    return x / (1 + sigma[:, None, None, None] ** 2)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def normal(generator: torch.Generator) -> Tensor:
    return torch.randn(IMAGES.shape, generator=generator)


def flat(images: Tensor) -> Tensor:
    return images.flatten(1).double()


def test_ddpm_is_equation_14() -> None:
    generator, (a, b) = draws(), STUDENT
    t = torch.randint(1000, (N,), generator=generator)
    e = flat(normal(generator))
    kept = column([math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(last + 1)) for last in t.tolist()])
    predicted = a * (kept.sqrt() * X + (1 - kept).sqrt() * e) + b * column(t)
    assert loss(Ddpm()) == pytest.approx(float((e - predicted).square().mean()), rel=1e-4)


def test_edm_is_the_weighted_error_of_the_denoised_image() -> None:
    generator = draws()
    s = (1.2 * column(torch.randn(N, generator=generator)) - 1.2).exp()
    error = f(STUDENT, X + s * flat(normal(generator)), s, low=0, scale=0.25) - X
    expected = ((s**2 + 0.25) / (s * 0.5) ** 2 * error.square()).mean()
    assert loss(Edm()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("step", "levels"), [(0, 2), (50, 107), (99, 151)])
def test_ct_is_algorithm_3(step: int, levels: int) -> None:
    recipe, generator = Ct(last_levels=150, first_rate=0.9), draws()
    n = column(torch.randint(levels - 1, (N,), generator=generator))
    z, low, high = flat(normal(generator)), karras(n, levels), karras(n + 1, levels)
    gap = f(STUDENT, X + high * z, high) - f(TARGET, X + low * z, low)
    assert recipe.level_count(step, 100) == levels
    assert loss(recipe, step=step) == pytest.approx(float(gap.square().sum() / N), rel=1e-3)


def test_the_target_of_ct_has_the_rates_of_its_paper() -> None:
    recipe = Ct(last_levels=150, first_rate=0.9)  # s0 = 2: CIFAR-10 in Song et al. 2023, Table 3
    assert recipe.target_rate(0, 100) == pytest.approx(0.9)
    assert recipe.target_rate(99, 100) == pytest.approx(math.exp(2 * math.log(0.9) / 151))


def test_cd_is_algorithm_2_with_a_step_of_heun() -> None:
    generator = draws()
    n = column(torch.randint(17, (N,), generator=generator))
    low, high = karras(n, 18), karras(n + 1, 18)
    noisy = X + high * flat(normal(generator))
    slope = (noisy - noisy / (1 + high**2)) / high
    euler = noisy + (low - high) * slope
    led = noisy + (low - high) * (slope + (euler - euler / (1 + low**2)) / low) / 2
    gap = f(STUDENT, noisy, high) - f(TARGET, led, low)
    assert loss(Cd(), teacher=teacher) == pytest.approx(float(gap.square().sum() / N), rel=1e-4)
    assert Cd().target_rate(3, 10) == 0.95


def pseudo_huber(gap: Tensor) -> Tensor:
    """``[N, 1]``: Song & Dhariwal 2023, Eq. 8."""
    c = 0.00054 * math.sqrt(PIXELS)
    return (gap.square().sum(1, keepdim=True) + c * c).sqrt() - c


def test_ict_is_equation_7() -> None:
    generator = draws()
    _, low, high = lognormal_pairs(10, generator)
    z = flat(normal(generator))
    gap = f(STUDENT, X + high * z, high) - f(STUDENT, X + low * z, low)
    assert loss(Ict()) == pytest.approx(float((pseudo_huber(gap) / (high - low)).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(4000, 10, 160), (400_000, 10, 1280), (20, 10, 40), (1000, 2, 150), (90, 10, 35)]
)
def test_the_discretization_of_ict_is_its_papers(steps: int, first: int, last: int) -> None:
    recipe = Ict(first_discretization=first, last_discretization=last)
    stage = math.floor(steps / (math.log2(math.floor(last / first)) + 1))  # K' of Song & Dhariwal 2023, Table 1
    for step in {0, 1, stage - 1, stage, 2 * stage, steps // 2, steps - 1}:
        assert recipe.discretization(step, steps) == min(first * 2 ** (step // stage), last)


@given(st.integers(1, 300), st.floats(-3, 1), st.floats(0.3, 3), st.floats(1, 100))
def test_chances_of_noise_levels_are_lognormal(count: int, mean: float, std: float, sigma_max: float) -> None:
    recipe = Ict(
        first_discretization=count, last_discretization=count, noise_mean=mean, noise_std=std, sigma_max=sigma_max
    )
    levels, found = recipe.levels(0, 1)
    below = stats.lognorm.cdf(levels.numpy(), s=std, scale=math.exp(mean))
    assert found.shape == (count,)
    assert found.tolist() == pytest.approx((below[1:] - below[:-1]).tolist(), abs=1e-12)


def test_flow_is_the_velocity_of_straight_paths() -> None:
    generator, (a, b) = draws(), STUDENT
    x_0 = flat(normal(generator))
    share = column(torch.rand(N, generator=generator))
    velocity = -(a * (share * x_0 + (1 - share) * X) + b * 1000 * share)  # the paper's t is 1 - share
    assert loss(Flow()) == pytest.approx(float((velocity - (X - x_0)).square().mean()), rel=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_student_has_a_gradient_and_the_generator_decides_the_loss(name: str) -> None:
    recipe = RECIPES[name]()
    given = batch(recipe, step=30, teacher=teacher)
    found = recipe.loss(given)
    found.backward()  # type: ignore[no-untyped-call]
    assert given.network.a.grad is not None
    assert given.target.a.grad is None
    other = dataclasses.replace(given, generator=torch.Generator().manual_seed(8))
    assert loss(recipe, step=30, teacher=teacher) == found.item() != recipe.loss(other).item()


def test_settings_of_a_recipe_are_parsed_and_refused() -> None:
    changes = {"sigma_max": 80, "last_discretization": 1280}
    assert parse_recipe("ict", changes) == Ict(sigma_max=80, last_discretization=1280)
    for name, key, value, message in (
        ("ict", "sigma_mx", 80, "sigma_mx: unknown key"),
        ("cd", "rate", 1.5, "rate: Input should be less than 1, got 1.5"),
        ("ct", "sigma_max", 0.001, "ct: sigma_max: expected more than sigma_min, 0.002, got 0.001"),
        ("ict", "first_discretization", 200, "last_discretization: expected at least first_discretization, 200"),
        ("ict", "noise_mean", 100, "ict: noise_mean: with noise_std, it leaves no noise between"),
        ("idm", "a", 1, "no such recipe"),
    ):
        with pytest.raises((StudySpecError, TrainingError), match=message):
            parse_recipe(name, {key: value})
