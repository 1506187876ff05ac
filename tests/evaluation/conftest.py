from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.trajectory import TrajectoryWriter

MODULES = itertools.count()  # a name is imported once only


@pytest.fixture(autouse=True)
def importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are new interpreters, which find the examples by their module's name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of a node with a CPU, and of one with two and two GPUs."""
    from tests.evaluation.ray_clusters import add_node, small_cluster  # Ray is optional

    with small_cluster(num_cpus=1, node_name="one") as c:
        add_node(c, num_cpus=2, num_gpus=2, node_name="two")
        yield c


@pytest.fixture
def folder(workplace: Path) -> Path:
    """With an objective for workers of a cluster."""
    from tests.evaluation.ray_clusters import OBJECTIVE

    (workplace / "stages_on_ray.py").write_text(OBJECTIVE)
    return workplace


@pytest.fixture
def own_files(folder: Path) -> Path:
    """A study with an objective of its own, a module beside it, and checkpoints."""
    own, module = folder / "own", f"ray_own_module_{next(MODULES)}"
    own.mkdir()
    (own / "ray_own_objective.py").write_text(
        "from lcsc_opt.objective.settings import CheckpointSettings\n"
        f"import {module}\n\n\n"
        "def build(settings, context):\n"
        f"    made = {module}.Own(settings['number'])\n"
        "    made.trajectory = CheckpointSettings(checkpoints=settings['checkpoints']).trajectory(context)\n"
        "    return made\n"
    )
    (own / f"{module}.py").write_text(
        "from tests.evaluation.staged_examples import Stages\n\n\n"
        "class Own(Stages):\n"
        "    def __init__(self, number):\n"
        "        super().__init__()\n"
        "        self.number = number\n\n"
        "    def score(self, candidate, parts):\n"
        "        import dataclasses\n"
        "        evaluation, back = super().score(candidate, parts)\n"
        "        metrics = {'gpu': float(parts[0].environment or -1)}\n"
        "        return dataclasses.replace(evaluation, loss=self.number, metrics=metrics), back\n"
    )
    with TrajectoryWriter(own / "run.trajectory") as writer:
        for step in (1, 2, 3):
            writer.append(step, {"weights": torch.full((1000,), float(step))})
    return own
