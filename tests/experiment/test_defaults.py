"""What is chosen where a study file says nothing, in files and in Python, and that stored studies keep it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from lcsc_opt.base.study_file import StudyFile, parse_study_file
from lcsc_opt.experiment.defaults import completed
from lcsc_opt.objective.contract import CoefficientFunction, Objective, Samples
from lcsc_opt.trajectory.adapters import BASE
from tests.commands import Typed
from tests.model_studies import write_model_study

Chosen = list[tuple[list[str], Any]]


class Items(CoefficientFunction):
    """A function that says that it merges weights and draws items, as a score does."""

    samples = Samples(per_evaluation=10)
    trajectory: Any = "none that is merged"


class Images(Items):
    """A function that says that it samples images."""

    sampler: Any = "none that is called"


class WithoutWeights(Images):
    """Images that come from no weights."""

    trajectory = None


class Loras(Images):
    """Images of a network to which LoRAs are added."""

    trajectory: Any = SimpleNamespace(names=("to_q.lora_A.weight", "to_q.lora_B.weight"), metadata={}, steps=(1, 2, 3))


class LorasWithStrength(Loras):
    """The same, whose first checkpoint is the base."""

    trajectory: Any = SimpleNamespace(names=Loras.trajectory.names, metadata={BASE: "1"}, steps=(0, 1, 2))


def objective(kind: type[CoefficientFunction], *, gradient: bool) -> Objective:
    return kind(max, (1, 2, 3), name="max", gradient=(lambda a: a) if gradient else None)


def spec(**changes: Any) -> StudyFile:
    return parse_study_file({"name": "s", "objective": {"file": "function.py"}, **changes}, source="test")


def chosen(study: StudyFile, stored: Mapping[str, Mapping[str, Any]], made: Objective | None) -> Chosen:
    """Optimizers and rows; without an objective, none may be loaded."""

    def load() -> Objective:
        assert made is not None, "loaded although everything is known"
        return made

    return [
        ([optimizer.name for optimizer in complete.optimizers], complete.space.rows)
        for complete in completed(study, lambda: stored, load)
    ]


@pytest.mark.parametrize(
    ("kind", "gradient", "expected"),
    [
        (Images, True, [(["EMAGrid"], None), (["LCSCGradient"], "channels")]),
        (Images, False, [(["EMAGrid", "LCSCQuadratic"], None)]),
        (Items, True, [(["EMAGrid", "LCSCGradient"], None)]),
        (Items, False, [(["EMAGrid", "LCSCQuadratic"], None)]),
        (WithoutWeights, True, [(["EMAGrid", "LCSCGradient"], None)]),
        (Loras, True, [(["EMAGrid", "Grid"], None), (["LCSCGradient"], "channels")]),  # which epoch is the best, too
        (LorasWithStrength, False, [(["EMAGrid", "LCSCQuadratic"], None)]),
    ],
)
def test_optimizers_and_rows_follow_from_what_the_objective_gives(
    kind: type[CoefficientFunction], gradient: bool, expected: Chosen
) -> None:
    assert chosen(spec(), {}, objective(kind, gradient=gradient)) == expected


def test_what_is_said_is_not_chosen_and_loads_nothing() -> None:
    said = spec(optimizers=["LCSCGradient", "CMA"], space="affine")
    assert chosen(said, {}, None) == [(["LCSCGradient", "CMA"], None)]
    assert chosen(spec(optimizers=["LCSC"]), {}, None) == [(["LCSC"], None)], "rows are for gradients"
    assert chosen(spec(optimizers=["LCSC"], space={"rows": "layers"}), {}, None) == [(["LCSC"], "layers")]


def stored(optimizer: str, rows: str | None) -> Mapping[str, Any]:
    return {"specification": {"optimizer": {"name": optimizer, "options": {}}, "space": {"rows": rows}}}


def test_stored_studies_keep_what_they_have() -> None:
    studies = {
        "s/EMAGrid/0": stored("EMAGrid", None),
        "s/LCSCGradient/0": stored("LCSCGradient", None),
        "other/LCSC/0": stored("LCSC", "layers"),
    }
    assert chosen(spec(), studies, None) == [(["EMAGrid", "LCSCGradient"], None)]


def test_a_grid_alone_was_interrupted_before_its_search() -> None:
    made = objective(Images, gradient=True)
    studies = {"s/EMAGrid/0": stored("EMAGrid", None)}
    assert chosen(spec(), studies, made) == [(["EMAGrid"], None), (["LCSCGradient"], "channels")]


def test_a_short_study_file_runs_and_a_dry_run_says_what_was_chosen(typed: Typed, workplace: Any) -> None:
    file = str(write_model_study(workplace, budget={"evaluations": 2}))
    said = typed("run", file, "~optimizers", "--dry-run")
    assert said.err.count("using LCSCQuadratic, because there is no gradient: ") == 1
    planned, _, times = said.out.partition("\n\n")
    assert times.startswith("evaluations that a time buys, as --budget '10 min' for each search\n")
    shown = planned.splitlines()[2:]
    assert [line.split()[0].split("/")[1] for line in shown] == ["EMAGrid", "LCSCQuadratic"]
    assert "one row" in shown[1]
    typed("run", file, "~optimizers", "--optimizer", "EMAGrid")  # as if the search had been interrupted in it
    typed("run", file, "~optimizers")
    assert "finished already" in typed("run", file, "~optimizers").err
