from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lcsc_opt
from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.records import SEARCH, Candidate, Evaluation, as_json
from lcsc_opt.objective.contract import CoefficientFunction, Objective

STEPS = (10, 20, 30)


def function(returned: Any) -> Objective:
    return CoefficientFunction(lambda _: returned, STEPS, name="constant")


class Recorder(Objective):
    """An objective that keeps the candidate it was asked for."""

    steps = STEPS  # type: ignore[assignment]

    def evaluate(self, candidate: Candidate) -> Evaluation:
        self.candidate = candidate
        return Evaluation(2.5, {"fid": 9.0})

    def describe(self) -> dict[str, Any]:
        return {}


def test_an_objective_is_called_with_coefficients_and_gives_its_loss() -> None:
    recorder = Recorder()
    assert recorder([0.5, -0.25, 0.75]) == 2.5
    candidate = recorder.candidate
    assert (candidate.coefficients.tolist(), candidate.coefficients.dtype) == ([0.5, -0.25, 0.75], np.float64)
    assert (candidate.noise, candidate.images) == (SEARCH, None)


@pytest.mark.parametrize("wrong", [[0.5, 0.5], [1.0, 1.0, 1.0], [math.nan, 0.5, 0.5]])
def test_wrong_coefficients_never_reach_the_objective(wrong: list[float]) -> None:
    with pytest.raises(StudySpecError):
        CoefficientFunction(lambda _: pytest.fail("was called"), STEPS, name="none")(wrong)


def test_what_reports_use_is_described_apart_from_what_decides_the_loss() -> None:
    alone = CoefficientFunction(sum, STEPS, name="total")
    both = CoefficientFunction(sum, STEPS, name="total", held_out=max, held_out_name="largest")
    assert both.describe() == alone.describe() == {"callable": "total", "steps": [10, 20, 30]}
    assert both.describe_reports() == {"held_out": "largest"}
    assert alone.describe_reports() == {"held_out": None}
    assert Recorder().describe_reports() == {}


def test_a_callable_cannot_change_the_candidate() -> None:
    def spoil(coefficients: np.ndarray) -> float:
        coefficients[:] = 0
        return 0.0

    candidate = Candidate(np.array([0.2, 0.3, 0.5]))
    CoefficientFunction(spoil, STEPS, name="spoil").evaluate(candidate)
    assert candidate.coefficients.tolist() == [0.2, 0.3, 0.5]


@pytest.mark.parametrize("returned", [3, 3.0, np.float32(3), np.array(3.0), torch.tensor(3.0, requires_grad=True)])
def test_every_kind_of_number_is_a_loss(returned: Any) -> None:
    loss = function(returned)(np.full(3, 1 / 3))
    assert (type(loss), loss) == (float, 3.0)


@pytest.mark.parametrize("returned", [None, "three", [1.0, 2.0], {}, 1j, torch.ones(2)])
def test_what_is_no_number_is_an_error(returned: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"^constant returned .*; it must return one number, lower is better$"):
        function(returned)(np.full(3, 1 / 3))


@pytest.mark.parametrize("returned", [None, "three", [1.0, 2.0], [[1.0], [2.0, 3.0]]])
def test_what_is_no_gradient_is_an_error(returned: Any) -> None:
    objective = CoefficientFunction(sum, STEPS, name="total", gradient=lambda _: returned)
    with pytest.raises(ObjectiveError, match=r"^the gradient of total was .*; it must return \[3\] numbers$"):
        objective.evaluate(Candidate(np.full(3, 1 / 3), gradient=True))


NUMPYS = """
import pathlib
import numpy as np
import torch

import lcsc_opt

class Own(lcsc_opt.Objective):
    steps = np.array([1, 2, 3])

    def evaluate(self, candidate):
        loss = np.square(candidate.coefficients, dtype=np.float32).sum()
        return lcsc_opt.Evaluation(loss=loss, metrics={"sum": loss, "count": np.int64(3), "tensor": torch.ones(())})

    def describe(self):
        return DESCRIBED

def build(settings):
    return Own()
"""


@pytest.mark.parametrize(
    "described",
    [
        '{"classes": np.arange(4).max(), "scale": np.float32(0.5), "on": np.bool_(True)}',
        '{"mean": np.zeros(3), "dtype": torch.float32, "shape": (1, 2), "of": torch.ones(2)}',
        '{"path": pathlib.Path("a"), "labels": {"b", "a"}, np.int64(3): {1: None}}',
    ],
)
def test_an_objective_may_describe_itself_and_measure_in_numbers_of_numpy_and_torch(
    workplace: Path, described: str
) -> None:
    (workplace / "own.py").write_text(NUMPYS.replace("DESCRIBED", described))
    study = {"name": "own", "objective": {"file": "own.py"}, "optimizers": ["LCSC"], "budget": {"evaluations": 2}}
    for budget in (2, 3):  # the second continues: what is stored is what it describes again
        study["budget"] = {"evaluations": budget}
        [found] = lcsc_opt.run(study, storage="sqlite:///s.db")
        assert len(found.trials) == budget
    assert {type(value) for value in found.trials[0]["metrics"].values()} == {float}


def test_what_has_another_text_in_every_process_is_no_description() -> None:
    with pytest.raises(ObjectiveError, match=r"^describe: <object object at 0x\w+> is another text in every process"):
        as_json({"network": [object()]})
    assert as_json({"b", "a", "c"}) == ["a", "b", "c"], "whatever the order of a set"
