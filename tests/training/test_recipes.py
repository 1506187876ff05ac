"""One step of every recipe against the formula of its paper, image by image, with the same random numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from lcsc_opt.base.errors import StudySpecError, TrainingError
from lcsc_opt.training.preparing import parse_recipe
from lcsc_opt.training.recipes import RECIPES, Batch, TrainingRecipe
from lcsc_opt.training.recipes.consistency import Cd, Ct, Ect, Ict, Slct
from lcsc_opt.training.recipes.diffusion import Ddpm, Edm, Flow

N, PIXELS = 5, 4
IMAGES = 0.7 * torch.randn(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))


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


def f(weights: tuple[float, float], x: float, s: float, *, low: float, scale: float, data: float = 0.5) -> float:
    """Song et al. 2023, Eq. 5 and Appendix C; with ``low`` 0 and ``scale`` 1/4 Karras et al. 2022, Table 1."""
    a, b = weights
    skip = data**2 / ((s - low) ** 2 + data**2)
    out = data * (s - low) / math.sqrt(s**2 + data**2)
    return skip * x + out * (a * x / math.sqrt(s**2 + data**2) + b * scale * math.log(s))


def karras(i: int, count: int, low: float, high: float) -> float:
    """The i-th of ``count`` noise levels, increasing (Karras et al. 2022, Eq. 5)."""
    ends = low ** (1 / 7), high ** (1 / 7)
    return (ends[0] + i / (count - 1) * (ends[1] - ends[0])) ** 7


def pixels(tensor: Tensor) -> list[list[float]]:
    return tensor.flatten(1).tolist()


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_ddpm_is_equation_14() -> None:
    recipe, generator = Ddpm(), draws()
    t = torch.randint(1000, (N,), generator=generator).tolist()
    noise = pixels(torch.randn(IMAGES.shape, generator=generator))
    a, b = STUDENT
    total = 0.0
    for i, image in enumerate(pixels(IMAGES)):
        kept = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t[i] + 1))  # alpha_bar
        for x, e in zip(image, noise[i], strict=True):
            total += (e - (a * (math.sqrt(kept) * x + math.sqrt(1 - kept) * e) + b * t[i])) ** 2
    assert recipe.loss(batch(recipe)).item() == pytest.approx(total / (N * PIXELS), rel=1e-4)


def test_edm_is_the_weighted_error_of_the_denoised_image() -> None:
    recipe, generator = Edm(), draws()
    sigma = [math.exp(-1.2 + 1.2 * z) for z in torch.randn(N, generator=generator).tolist()]
    noise = pixels(torch.randn(IMAGES.shape, generator=generator))
    total = 0.0
    for i, image in enumerate(pixels(IMAGES)):
        s = sigma[i]
        weight = (s**2 + 0.25) / (s * 0.5) ** 2
        for y, n in zip(image, noise[i], strict=True):
            total += weight * (f(STUDENT, y + s * n, s, low=0, scale=0.25) - y) ** 2
    assert recipe.loss(batch(recipe)).item() == pytest.approx(total / (N * PIXELS), rel=1e-4)


@pytest.mark.parametrize(("step", "levels"), [(0, 2), (50, 107), (99, 151)])
def test_ct_is_algorithm_3(step: int, levels: int) -> None:
    recipe, generator = Ct(last_levels=150, first_rate=0.9), draws()
    n = torch.randint(levels - 1, (N,), generator=generator).tolist()
    z = pixels(torch.randn(IMAGES.shape, generator=generator))
    total = 0.0
    for i, image in enumerate(pixels(IMAGES)):
        low, high = (karras(n[i] + end, levels, 0.002, 20) for end in (0, 1))
        for x, e in zip(image, z[i], strict=True):
            student = f(STUDENT, x + high * e, high, low=0.002, scale=250)
            total += (student - f(TARGET, x + low * e, low, low=0.002, scale=250)) ** 2
    assert recipe.level_count(step, 100) == levels
    assert recipe.loss(batch(recipe, step=step)).item() == pytest.approx(total / N, rel=1e-3)


def test_ct_has_the_schedules_of_its_paper() -> None:
    recipe = Ct(last_levels=150, first_rate=0.9)  # s0 = 2: CIFAR-10 in Song et al. 2023, Table 3
    counts = [recipe.level_count(step, 800_000) for step in (0, 200_000, 400_000, 799_999)]
    assert counts == [math.ceil(math.sqrt(share * (151**2 - 4) + 4) - 1) + 1 for share in (0, 0.25, 0.5, 1 - 1 / 8e5)]
    assert recipe.target_rate(0, 100) == pytest.approx(0.9)
    assert recipe.target_rate(99, 100) == pytest.approx(math.exp(2 * math.log(0.9) / 151))


def test_the_target_of_ct_follows_within_a_few_steps_of_a_short_training() -> None:
    steps = 300
    kept = math.prod(Ct().target_rate(step, steps) for step in range(steps - 20, steps))
    assert kept < 0.01  # of the target 20 steps before the end; the paper's rate, for 800,000 steps, keeps 0.97


def test_cd_is_algorithm_2_with_a_step_of_heun() -> None:
    recipe, generator = Cd(), draws()

    def teacher(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma[:, None, None, None] ** 2)  # of standard normal images

    n = torch.randint(17, (N,), generator=generator).tolist()
    z = pixels(torch.randn(IMAGES.shape, generator=generator))
    total = 0.0
    for i, image in enumerate(pixels(IMAGES)):
        low, high = (karras(n[i] + end, 18, 0.002, 20) for end in (0, 1))
        for x, e in zip(image, z[i], strict=True):
            noisy = x + high * e
            slope = (noisy - noisy / (1 + high**2)) / high
            euler = noisy + (low - high) * slope
            led = noisy + (low - high) * (slope + (euler - euler / (1 + low**2)) / low) / 2
            student = f(STUDENT, noisy, high, low=0.002, scale=250)
            total += (student - f(TARGET, led, low, low=0.002, scale=250)) ** 2
    assert recipe.loss(batch(recipe, teacher=teacher)).item() == pytest.approx(total / N, rel=1e-4)
    assert recipe.target_rate(3, 10) == 0.95


def test_ict_is_equation_7() -> None:
    recipe, generator = Ict(), draws()
    levels = [karras(i, 11, 0.002, 20) for i in range(11)]
    cumulative = [0.5 * (1 + math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2))) for s in levels]
    chances = torch.tensor([b - a for a, b in itertools.pairwise(cumulative)], dtype=torch.float64)
    n = torch.multinomial(chances, N, replacement=True, generator=generator).tolist()
    z = pixels(torch.randn(IMAGES.shape, generator=generator))
    c = 0.00054 * math.sqrt(PIXELS)
    total = 0.0
    for i, image in enumerate(pixels(IMAGES)):
        low, high = levels[n[i]], levels[n[i] + 1]
        square = 0.0
        for x, e in zip(image, z[i], strict=True):
            student = f(STUDENT, x + high * e, high, low=0.002, scale=250)
            square += (student - f(STUDENT, x + low * e, low, low=0.002, scale=250)) ** 2
        total += (math.sqrt(square + c * c) - c) / (high - low)
    assert recipe.loss(batch(recipe)).item() == pytest.approx(total / N, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(4000, 10, 160), (400_000, 10, 1280), (20, 10, 40), (1000, 2, 150), (90, 10, 35)]
)
def test_the_discretization_of_ict_is_its_papers(steps: int, first: int, last: int) -> None:
    recipe = Ict(first_discretization=first, last_discretization=last)
    stage = math.floor(steps / (math.log2(math.floor(last / first)) + 1))  # K' of Song & Dhariwal 2023, Table 1
    for step in {0, 1, stage - 1, stage, 2 * stage, steps // 2, steps - 1}:
        assert recipe.discretization(step, steps) == min(first * 2 ** (step // stage), last)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 3))
def test_the_last_discretization_is_reached_however_short_the_run(first: int, steps: int, doublings: int) -> None:
    recipe = Ict(first_discretization=first, last_discretization=first * 2**doublings)
    counts = [recipe.discretization(step, steps) for step in range(steps)]
    assert (counts[0], counts[-1]) == (first, first * 2 ** min(doublings, steps - 1))


@given(st.integers(1, 300), st.floats(-3, 1), st.floats(0.3, 3), st.floats(1, 100))
def test_chances_of_noise_levels_are_lognormal(count: int, mean: float, std: float, sigma_max: float) -> None:
    recipe = Ict(
        first_discretization=count, last_discretization=count, noise_mean=mean, noise_std=std, sigma_max=sigma_max
    )
    levels, found = recipe.levels(0, 1)
    below = stats.lognorm.cdf(levels.numpy(), s=std, scale=math.exp(mean))
    assert found.shape == (count,)
    assert found.tolist() == pytest.approx((below[1:] - below[:-1]).tolist(), abs=1e-12)


@pytest.mark.parametrize(("step", "stage"), [(0, 1), (60, 5)])
def test_ect_is_its_loss(step: int, stage: int) -> None:
    recipe, generator = Ect(), draws()
    t = [math.exp(-1.1 + 2 * z) for z in torch.randn(N, generator=generator).tolist()]
    noise = pixels(torch.randn(IMAGES.shape, generator=generator))
    c = 0.00054 * math.sqrt(PIXELS)
    total, zeros = 0.0, 0
    for i, image in enumerate(pixels(IMAGES)):
        r = max(t[i] * (1 - (1 + 8 / (1 + math.exp(t[i]))) / 2**stage), 0)
        zeros += r == 0
        square = 0.0
        for x, e in zip(image, noise[i], strict=True):
            target = f(STUDENT, x + r * e, r, low=0, scale=250) if r else x
            square += (f(STUDENT, x + t[i] * e, t[i], low=0, scale=250) - target) ** 2
        total += (1 / t[i] ** 2 + 1 / 0.5**2) * (math.sqrt(square + c * c) - c)
    assert (zeros > 0) == (stage == 1)  # the first stage begins as a diffusion model
    assert recipe.loss(batch(recipe, step=step)).item() == pytest.approx(total / N, rel=1e-3)


def test_flow_is_the_velocity_of_straight_paths_between_coupled_pairs() -> None:
    recipe, generator = Flow(), draws()
    noise = torch.randn(IMAGES.shape, generator=generator)
    share = torch.rand(N, generator=generator).tolist()
    coupled = pixels(best_order(noise))
    a, b = STUDENT
    total = 0.0
    for i, image in enumerate(pixels(IMAGES)):
        for x_1, x_0 in zip(image, coupled[i], strict=True):
            t = 1 - share[i]  # of the paper
            velocity = -(a * ((1 - t) * x_0 + t * x_1) + b * 1000 * share[i])
            total += (velocity - (x_1 - x_0)) ** 2
    assert recipe.loss(batch(recipe)).item() == pytest.approx(total / (N * PIXELS), rel=1e-4)


def best_order(noise: Tensor) -> Tensor:
    """Of all orders of the noise the one that is nearest to the images."""
    orders = (torch.tensor(order) for order in itertools.permutations(range(N)))
    return noise[min(orders, key=lambda order: float((noise[order] - IMAGES).square().sum()))]


@pytest.mark.parametrize(("step", "count"), [(0, 10), (40, 40)])
def test_slct_is_the_cauchy_loss_and_a_diffusion_loss_where_there_is_little_noise(step: int, count: int) -> None:
    recipe, generator = Slct(diffusion_share=0.6), draws()
    levels = [karras(i, count + 1, 0.002, 20) for i in range(count + 1)]
    cumulative = [0.5 * (1 + math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2))) for s in levels]
    chances = torch.tensor([b - a for a, b in itertools.pairwise(cumulative)], dtype=torch.float64)
    n = torch.multinomial(chances, N, replacement=True, generator=generator).tolist()
    z = pixels(best_order(torch.randn(IMAGES.shape, generator=generator)))
    c = 0.03456 if count == 10 else math.exp(-1.15 * math.log(count) - 0.85)
    consistency, diffusion, early = 0.0, 0.0, 0
    for i, image in enumerate(pixels(IMAGES)):
        low, high = levels[n[i]], levels[n[i] + 1]
        squares, errors = 0.0, 0.0
        for x, e in zip(image, z[i], strict=True):
            student = f(STUDENT, x + high * e, high, low=0.002, scale=250)
            squares += (student - f(STUDENT, x + low * e, low, low=0.002, scale=250)) ** 2 / PIXELS
            errors += (student - x) ** 2 / PIXELS
        consistency += math.log(1 + squares / (2 * c**2)) / (high - low) / N
        if n[i] < 0.6 * count:
            early += 1
            diffusion += (1 / high**2 + 1 / 0.5**2) * errors
    assert 0 < early < N
    loss = recipe.loss(batch(recipe, step=step)).item()
    assert loss == pytest.approx(consistency + 5 * diffusion / early, rel=1e-3)


def test_slct_trains_no_scale_of_a_normalization() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(1, 4), nn.LayerNorm(2))
    with torch.no_grad():
        network[1].weight.fill_(3.0)  # type: ignore[operator, union-attr]
    Slct().prepare(network)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"0.weight", "0.bias", "1.bias", "2.bias"}
    assert torch.equal(network.state_dict()["1.weight"], torch.ones(4))


TEACHER: Callable[[Tensor, Tensor], Tensor] = lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2)  # noqa: E731


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_student_has_a_gradient(name: str) -> None:
    recipe = RECIPES[name]()
    given = batch(recipe, step=30, teacher=TEACHER)
    recipe.loss(given).backward()  # type: ignore[no-untyped-call]
    assert given.network.a.grad is not None
    assert given.target.a.grad is None


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_generator_gives_the_same_loss(name: str) -> None:
    recipe = RECIPES[name]()
    losses = [float(recipe.loss(batch(recipe, teacher=TEACHER)).detach()) for _ in range(2)]
    other = dataclasses.replace(batch(recipe, teacher=TEACHER), generator=torch.Generator().manual_seed(8))
    assert losses[0] == losses[1] != float(recipe.loss(other).detach())


def test_settings_of_a_recipe_are_parsed_and_refused() -> None:
    assert parse_recipe("ict", ["sigma_max=8e1", "last_discretization=1280"]) == Ict(
        sigma_max=80, last_discretization=1280
    )
    for name, setting, message in (
        ("ict", "sigma_mx=80", r"sigma_mx: unknown key, did you mean|sigma_mx: unknown key"),
        ("cd", "rate=1.5", "rate: expected less than 1, got 1.5"),
        ("edm", "sigma_max=[1", "not valid YAML"),
        ("edm", "sigma_max", "expected KEY=VALUE"),
        ("idm", "a=1", "no such recipe"),
    ):
        with pytest.raises((StudySpecError, TrainingError), match=message):
            parse_recipe(name, [setting])
