"""How far from optimal is an EMA, where the optimum is known? The figure and the table of ``docs/theory.md``.

    python benchmarks/theory.py

SGD on a quadratic, theta <- theta - step (curvature theta + noise), is linear in the noise. So the expected excess loss
of any combination of its iterates is the quadratic form 1/2 a' M a. The matrix M [K, K] and the best coefficients are
known in closed form (:func:`gram`). A search chooses coefficients after a run: then the same formulas hold with the
run's own matrix (:func:`gram_of_run`), and runs are simulated. Takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import scipy.linalg
import scipy.optimize
from common import markdown, parse
from contest.page import insert
from plotly.subplots import make_subplots

from lcsc_opt.coefficients.profiles import (
    LARGEST_SIGMA_REL,
    ema_coefficients,
    normalize,
    power_ema_coefficients,
)
from lcsc_opt.views.figures.theme import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION, template
from lcsc_opt.views.figures.writing import write_figure

Floats = npt.NDArray[np.float64]
PAGE = Path(__file__).parents[1] / "docs" / "theory.md"
FIGURE = PAGE.parent / "images" / "theory.svg"
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # training steps
CHECKPOINTS = 32
SHOWN = 512  # training steps of the run whose coefficients are drawn


@dataclasses.dataclass(frozen=True, eq=False)
class Quadratic:
    """1/2 sum_d curvature_d theta_d^2, with noisy gradients. Its minimum is 0, at the origin.

    Attributes:
        name: of the problem.
        curvature: ``[D]``, positive.
        noise: ``[D]`` variance of the gradient's noise, independent between steps and axes.
        start: ``[D]`` of SGD.
        step_size: of step n = 1, 2, …
    """

    name: str
    curvature: Floats
    noise: Floats
    start: Floats
    step_size: Callable[[int], float]


def strongly_convex() -> Quadratic:
    """Step sizes 1 / (beta n) as in Theorem 3.1 of the second version, with beta = 1 the smallest curvature."""
    curvature = np.linspace(1.0, 3.5, 6)
    return Quadratic("strongly convex", curvature, np.ones(6), np.ones(6), lambda n: 1.0 / n)


def noisy_quadratic(batch: int = 1) -> Quadratic:
    """Curvature 1 / d, and noise whose variance is the curvature's (Zhang et al. 2019), with a constant step size.

    ``batch`` divides the variance.
    """
    curvature = 1.0 / np.arange(1, 101)
    name = "noisy quadratic" + ("" if batch == 1 else f", batch × {batch}")
    return Quadratic(name, curvature, curvature / batch, np.ones(100), lambda _: 0.5)


def moments(problem: Quadratic, length: int) -> tuple[Floats, Floats, Floats]:
    """Mean, variance and factor of every iterate, by the recursion theta_{n+1} = r_n theta_n - step_n noise_n.

    Returns:
        Mean and variance ``[N + 1, D]`` of theta_0 … theta_N, and r ``[N, D]`` with r_n = 1 - step_n curvature.
    """
    steps = np.array([problem.step_size(n) for n in range(1, length + 1)])
    factors = 1.0 - steps[:, None] * problem.curvature
    mean, variance = np.empty((2, length + 1, len(problem.curvature)))
    mean[0], variance[0] = problem.start, 0.0
    for n, factor in enumerate(factors):
        mean[n + 1] = factor * mean[n]
        variance[n + 1] = factor**2 * variance[n] + steps[n] ** 2 * problem.noise
    return mean, variance, factors


def gram(problem: Quadratic, steps: Sequence[int]) -> Floats:
    """M ``[K, K]``: the expected excess loss of sum_i a_i theta_{n_i} is 1/2 a' M a.

    M_ij = sum_d curvature_d (E theta_i E theta_j + Cov(theta_i, theta_j)). For i <= j the covariance is the variance of
    theta_i times the product of the factors between the two.

    Args:
        problem: minimized by SGD.
        steps: ``[K]``, increasing, at least 1.
    """
    mean, variance, factors = moments(problem, steps[-1])
    covariance = np.zeros((len(steps), len(steps), len(problem.curvature)))
    for j, step in enumerate(steps):
        if j:
            between = factors[steps[j - 1] : step].prod(axis=0)
            covariance[:j, j] = covariance[:j, j - 1] * between
            covariance[j, :j] = covariance[:j, j]
        covariance[j, j] = variance[step]
    chosen = mean[list(steps)]
    return np.asarray((chosen * problem.curvature) @ chosen.T + covariance @ problem.curvature)


def gram_of_run(problem: Quadratic, steps: Sequence[int], rng: np.random.Generator) -> Floats:
    """M ``[K, K]`` of one simulated run: the run's own excess loss of sum_i a_i theta_{n_i} is 1/2 a' M a."""
    _, _, factors = moments(problem, steps[-1])
    theta, kept = problem.start, {}
    for n, factor in enumerate(factors, start=1):
        noise = rng.standard_normal(len(theta)) * np.sqrt(problem.noise)
        theta = factor * theta - problem.step_size(n) * noise
        kept[n] = theta
    chosen = np.array([kept[step] for step in steps])
    return np.asarray((chosen * problem.curvature) @ chosen.T)


def excess_loss(matrix: Floats, coefficients: Floats) -> float:
    """1/2 a' M a."""
    return float(coefficients @ matrix @ coefficients) / 2


def best_signed(matrix: Floats) -> Floats:
    """``[K]``: minimizes a' M a among coefficients with sum one: M^-1 1 / (1' M^-1 1), by a Lagrange multiplier.

    M must be positive definite. That needs noise, or at least as many axes as checkpoints.
    """
    return normalize(scipy.linalg.solve(matrix, np.ones(len(matrix)), assume_a="pos"))


def best_convex(matrix: Floats) -> Floats:
    """``[K]``: minimizes a' M a among coefficients with sum one, none of them negative.

    a' M a is homogeneous, so the solution has the direction of the minimum of 1/2 b' M b - 1' b over b >= 0. That is a
    problem of non-negative least squares with a root of M (Lawson & Hanson 1974).
    """
    root = scipy.linalg.cholesky(matrix, lower=True)
    target = scipy.linalg.solve_triangular(root, np.ones(len(matrix)), lower=True)
    found, _ = scipy.optimize.nnls(root.T, target, maxiter=100 * len(matrix))
    return normalize(found)


def best_of(matrix: Floats, candidates: Sequence[Floats]) -> Floats:
    """The candidate with the lowest excess loss."""
    return min(candidates, key=functools.partial(excess_loss, matrix))


def emas(steps: Sequence[int]) -> list[Floats]:
    """EMA profiles (Liu et al. 2024, Eq. 6) of 400 rates, from the last checkpoint alone to the first one."""
    lengths = np.geomspace(0.2, 100 * steps[-1], 400)
    return [ema_coefficients(steps, float(math.exp(-1 / length))) for length in lengths]


def polynomial_decay(count: int, eta: float) -> Floats:
    """``[K]``: the weights of K iterates in the running average of Shamir & Zhang (2013, Sec. 4).

    mean_t = (1 - (eta + 1) / (t + eta)) mean_{t-1} + (eta + 1) / (t + eta) theta_t.
    """
    weights = np.zeros(count)
    for t in range(1, count + 1):
        new = (eta + 1) / (t + eta)
        weights *= 1 - new
        weights[t - 1] = new
    return weights


def shamir_zhang_bound(problem: Quadratic, length: int) -> float:
    """17 G^2 (1 + log N) / (beta N), Theorem 3.1 of the second version, which is Shamir & Zhang's (2013, Theorem 1).

    G^2 is the largest expected squared norm of a stochastic gradient during the run.
    """
    mean, variance, _ = moments(problem, length)
    squares = ((mean**2 + variance) @ problem.curvature**2 + problem.noise.sum())[:-1]
    beta = float(problem.curvature.min())
    return 17 * float(squares.max()) * (1 + math.log(length)) / (beta * length)


COLOURS = {
    "last checkpoint": (GREY, "dot"),
    "best EMA": (GREY, "dash"),
    "best power EMA": (SKY, "dash"),
    "best suffix average": (ORANGE, "dashdot"),
    "best polynomial decay": (BLUE, "dot"),
    "best convex": (GREEN, "solid"),
    "best signed": (VERMILLION, "solid"),
}


PROBLEMS = (strongly_convex(), noisy_quadratic(), noisy_quadratic(100))
RUNS = 20


def steps_of(length: int) -> list[int]:
    """The checkpoints of a run of this length: equal intervals, the last at its end."""
    return [length * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)]


@functools.cache
def profiles(length: int) -> dict[str, list[Floats]]:
    """Family → the coefficients for each value of its parameter, for families with a parameter."""
    steps, count = steps_of(length), CHECKPOINTS
    widths = np.geomspace(1e-3, LARGEST_SIGMA_REL, 400)  # Karras et al. 2024, Eq. 3
    return {
        "best EMA": emas(steps),
        "best power EMA": [power_ema_coefficients(steps, float(width)) for width in widths],
        # Rakhlin et al. 2012; the last of them is Polyak's
        "best suffix average": [np.repeat([0.0, 1.0 / k], [count - k, k]) for k in range(1, count + 1)],
        "best polynomial decay": [polynomial_decay(CHECKPOINTS, float(eta)) for eta in np.geomspace(0.01, 1000, 200)],
    }


@functools.cache
def expected(problem: Quadratic, length: int) -> tuple[dict[str, Floats], dict[str, float]]:
    """The best coefficients chosen before the run, and their expected losses."""
    matrix = gram(problem, steps_of(length))
    best = {name: best_of(matrix, candidates) for name, candidates in profiles(length).items()}
    best |= {"best convex": best_convex(matrix), "best signed": best_signed(matrix)}
    found = {"last checkpoint": np.eye(CHECKPOINTS)[-1], **best}
    return found, {name: excess_loss(matrix, coefficients) for name, coefficients in found.items()}


@functools.cache
def hindsight(problem: Quadratic, length: int) -> dict[str, float]:
    """Losses of the best coefficients chosen after the run, means over :data:`RUNS` runs."""
    rows = []
    for seed in range(RUNS):
        matrix = gram_of_run(problem, steps_of(length), np.random.default_rng(seed))
        found = {"best EMA": best_of(matrix, profiles(length)["best EMA"])}
        found |= {"best convex": best_convex(matrix), "best signed": best_signed(matrix)}
        rows.append({name: excess_loss(matrix, coefficients) for name, coefficients in found.items()})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def gap_table() -> list[str]:
    """Markdown: for each problem, the best EMA's loss divided by that of the best signed coefficients."""
    names = [
        *(f"{problem.name}, before" for problem in PROBLEMS),
        *(f"{problem.name}, after" for problem in PROBLEMS[1:]),
    ]
    rows = [["N", *names]]
    for length in LENGTHS:
        known = [*(expected(problem, length)[1] for problem in PROBLEMS)]
        known += [hindsight(problem, length) for problem in PROBLEMS[1:]]
        rows.append([f"{length:,}", *(f"{losses['best EMA'] / losses['best signed']:.2f}" for losses in known)])
    return markdown(rows)


def draw() -> go.Figure:
    """Losses divided by the lowest, against the length of training: chosen before a run, and after it; coefficients."""
    noisy = PROBLEMS[1:]
    titles = [
        *(f"{problem.name}, before the run" for problem in PROBLEMS),
        *(f"{problem.name}, after the run" for problem in noisy),
        f"coefficients, {noisy[-1].name}, N = {SHOWN}",
    ]
    made = make_subplots(rows=2, cols=3, subplot_titles=titles, horizontal_spacing=0.06, vertical_spacing=0.17)
    for column, problem in enumerate(PROBLEMS, start=1):
        _add_gaps(made, [expected(problem, length)[1] for length in LENGTHS], row=1, col=column, legend=column == 1)
    for column, problem in enumerate(noisy, start=1):
        _add_gaps(made, [hindsight(problem, length) for length in LENGTHS], row=2, col=column, legend=False)
    _add_coefficients(made, noisy[-1], row=2, col=3)
    made.update_yaxes(title_text="loss / that of best signed", col=1)
    made.update_annotations(font_size=13)
    made.update_layout(template=template("light"), width=1350, height=760, legend={"orientation": "h", "y": -0.12})
    return made


def _add_gaps(made: go.Figure, losses: Sequence[Mapping[str, float]], *, row: int, col: int, legend: bool) -> None:
    for name, (colour, dash) in COLOURS.items():
        if name in losses[0]:
            gaps = [known[name] / known["best signed"] for known in losses]
            line = {"color": colour, "dash": dash, "width": 2}
            made.add_scatter(x=LENGTHS, y=gaps, name=name, line=line, mode="lines", showlegend=legend, row=row, col=col)
    made.update_xaxes(title_text="training steps N", type="log", tickvals=LENGTHS, row=row, col=col)
    made.update_yaxes(range=[0.9, 2.5 if row == 1 else 4.5], row=row, col=col)


def _add_coefficients(made: go.Figure, problem: Quadratic, **place: int) -> None:
    steps, found = steps_of(SHOWN), expected(problem, SHOWN)[0]
    after = best_signed(gram_of_run(problem, steps, np.random.default_rng(0)))
    shown = {name: (found[name], *COLOURS[name]) for name in ("best EMA", "best convex", "best signed")}
    shown["best signed after one run"] = (after, VERMILLION, "dot")
    for name, (coefficients, colour, dash) in shown.items():
        line = {"color": colour, "dash": dash, "width": 2, "shape": "hvh"}
        legend = name not in COLOURS
        made.add_scatter(x=steps, y=coefficients, name=name, line=line, mode="lines", showlegend=legend, **place)
    made.update_xaxes(title_text="training step of the checkpoint", **place)


def main() -> None:
    """Write the table and the figure."""
    parse(__doc__)
    lines = gap_table()
    print("\n".join(lines))
    insert(PAGE, {"gap": lines})
    write_figure(FIGURE, draw())
    print(FIGURE)


if __name__ == "__main__":
    main()
