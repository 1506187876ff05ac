"""What ``--dry-run`` can know of an objective's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lcsc_opt.base.study_file import parse_studies
from lcsc_opt.cli import run as lcsc
from lcsc_opt.search.plan import plans
from lcsc_opt.search.studies import dry_run as estimated

TIMED = """
from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.objective.contract import Objective


class Settings(FrozenModel):
    def check(self):
        pass


class Sleeping(Objective):
    steps = (1, 2, 3)
    images_per_evaluation = 100

    def describe(self):
        return {}

    def evaluate(self, candidate, *, gradient=False):
        images = candidate.images or 100
        loss = float(candidate.coefficients @ candidate.coefficients)
        return Evaluation(loss, cost=Cost(images, seconds=images / 1000))


def build(settings):
    return Sleeping()
"""


def test_a_dry_run_estimates_the_run(workplace: Path) -> None:
    Path("timed.py").write_text(TIMED)
    content = {"name": "timed", "objective": {"file": "timed.py"}, "optimizers": ["LCSC"], "budget": {"images": 1000}}
    content |= {"held_out": {"images": 200, "top": 2}}  # 10 evaluations, and 3 of twice as many images

    def left() -> float | None:
        [plan] = plans(parse_studies(content, source="study"), workplace)
        return estimated([plan], "sqlite:///studies.db")[0][2]

    assert left() is None
    assert not Path("studies.db").exists()
    Path("timed.yaml").write_text(yaml.safe_dump({**content, "budget": {"images": 400}, "held_out": None}))
    assert lcsc(["run", "timed.yaml"]) == 0
    assert left() == pytest.approx(1.2, abs=1e-6)  # stored seconds are as they were told
    assert lcsc(["run", "timed.yaml", "budget.images=1000", "held_out={images: 200, top: 2}"]) == 0
    assert left() == 0
