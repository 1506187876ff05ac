"""A classifier is trained; its saved checkpoints are combined so that the combination's loss on other data is lowest.

Run it with ``python package/samplers/lcsc/example.py`` in the root of the repository; it needs optunahub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
import optunahub

Array = npt.NDArray[np.float64]
CLASSES = 5
FEATURES = 20
EVERY = 10  # steps between two checkpoints
TRIALS = 200

rng = np.random.default_rng(0)
centres = rng.standard_normal((CLASSES, FEATURES))


def draw(count: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Points ``[N, D]`` around the centres, and their classes ``[N]``."""
    labels = rng.integers(CLASSES, size=count)
    return centres[labels] + 2.5 * rng.standard_normal((count, FEATURES)), labels


def loss_and_gradient(weights: Array, data: tuple[Array, npt.NDArray[np.int64]]) -> tuple[float, Array]:
    """The cross-entropy of a linear classifier ``[D, C]``, and its gradient."""
    points, labels = data
    scores = points @ weights
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    loss = -np.log(shares[np.arange(len(labels)), labels]).mean()
    return float(loss), points.T @ (shares - np.eye(CLASSES)[labels]) / len(labels)


def train() -> Array:
    """``[K, D, C]``: the checkpoints of a training with small batches and a large step."""
    points, labels = draw(500)
    weights = np.zeros((FEATURES, CLASSES))
    saved: list[Array] = []
    for step in range(1, 40 * EVERY + 1):
        batch = rng.integers(len(labels), size=8)
        _, gradient = loss_and_gradient(weights, (points[batch], labels[batch]))
        weights = weights - 0.2 * gradient
        if step % EVERY == 0:
            saved.append(weights)
    return np.stack(saved)


checkpoints = train()
search_data = draw(2000)
unseen_data = draw(20000)
steps = range(EVERY, EVERY * len(checkpoints) + 1, EVERY)
package = optunahub.load_local_module("samplers/lcsc", registry_root=str(Path(__file__).parents[2]))
optuna.logging.set_verbosity(optuna.logging.WARNING)
last_loss, _ = loss_and_gradient(checkpoints[-1], unseen_data)
print(f"last checkpoint: {last_loss:.4f}")

for kind in (package.LCSCSampler, package.LCSCQuadraticSampler, package.LCSCGradientSampler):
    sampler = kind(steps, seed=0, budget=TRIALS)

    def objective(trial: optuna.Trial, sampler: Any = sampler) -> float:
        """The loss of the merged classifier."""
        merged = np.tensordot(sampler.suggest(trial), checkpoints, axes=1)
        loss, slope = loss_and_gradient(merged, search_data)
        if sampler.candidate(trial).gradient:
            trial.set_user_attr("gradient", np.tensordot(checkpoints, slope, axes=2).tolist())
        return loss

    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=TRIALS)
    best = np.array([study.best_params[f"c{i}"] for i in range(len(checkpoints))])
    best_loss, _ = loss_and_gradient(np.tensordot(best, checkpoints, axes=1), unseen_data)
    print(f"{kind.__name__}: {study.best_value:.4f} searched, {best_loss:.4f} on unseen data")
