"""Studies that tune numbers of the sampler: stored, continued bit for bit, reported with EMA* at its best numbers."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

import lcsc_opt
from lcsc_opt.base.errors import LcscError, StudySpecError, StudyStoreError
from lcsc_opt.database.arrays import tuned_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.search.held_out import HeldOutPlan, score_held_out
from tests.commands import Typed

OBJECTIVE = """
import numpy as np

from lcsc_opt.base.records import Evaluation
from lcsc_opt.objective.contract import Objective
from lcsc_opt.sampling.base import Tunable

TARGET = np.array([-0.2, 0.3, 0.9])


class Bowl(Objective):
    steps = (10, 20, 30)
    tunable = {"guidance": Tunable(1.5, low=0.0, differentiable=True), "churn": Tunable(0.0)}

    def evaluate(self, candidate, *, gradient=False):
        guidance = candidate.tuned.get("guidance", 1.5)
        shift = {"search": 0.0, "selection": 0.01, "held-out": 0.02}.get(candidate.noise.group, 0.0)
        distance = candidate.coefficients - TARGET
        error = guidance - 3.2 - shift
        loss = float(np.square(distance).sum() + 0.1 * error**2)
        loss += (candidate.tuned.get("churn", 0.4) - 0.4) ** 2
        derivatives = {"guidance": 0.2 * error, "churn": 0.0}
        slopes = np.append(2 * distance, [derivatives[name] for name in candidate.tuned])
        return Evaluation(loss, {"fid": loss}, gradient=slopes if gradient else None)

    def why_no_gradient(self):
        return None

    def describe(self):
        return {"kind": "bowl"}


def build(settings, context):
    return Bowl()
"""

TUNE = {"guidance": {"low": 1, "high": 6}}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The content of a study file, in whose folder the process is."""
    (tmp_path / "bowl.py").write_text(OBJECTIVE)
    monkeypatch.chdir(tmp_path)
    return {
        "name": "guided",
        "objective": {"file": "bowl.py"},
        "tune": TUNE,
        "optimizers": ["EMAGrid", "LCSC", "LCSCGradient"],
        "budget": {"evaluations": 50},
        "held_out": {"top": 3},
    }


def stored(name: str) -> StoredStudy:
    return StoredStudy.open(open_storage("sqlite:///studies.db", write=False), name)


def test_numbers_are_stored_with_each_trial_and_found(study: dict[str, Any]) -> None:
    lcsc_opt.run(study)
    reader = HistoryReader(stored("guided/LCSC/0").storage)
    for optimizer in ("EMAGrid", "LCSC", "LCSCGradient"):
        trials = stored(f"guided/{optimizer}/0").trials()
        values = [tuned_of(trial)["guidance"] for trial in trials]
        assert all(1 <= value <= 6 for value in values)
        assert len(set(values)) > 3
        answer = reader.answer_model(reader.read_study(f"guided/{optimizer}/0"))
        assert answer is not None
        assert answer.tuned["guidance"] == pytest.approx(3.2, abs=0.5)


def test_the_baseline_of_a_report_is_an_average_at_its_best_number(study: dict[str, Any]) -> None:
    lcsc_opt.run(study)
    searched = StoredStudy.open(open_storage("sqlite:///studies.db", write=True), "guided/LCSC/0")
    objective = lcsc_opt.load_study("guided/LCSC/0", "sqlite:///studies.db").objective
    report = score_held_out(searched, objective, HeldOutPlan(images=0, baselines=True))
    [ema] = report.baselines
    assert ema.trial is not None
    grid = stored("guided/EMAGrid/0")
    best = tuned_of(grid.trials()[ema.trial])["guidance"]
    coefficients = grid.trials()[ema.trial].user_attrs["coefficients"]
    distance = sum((a - b) ** 2 for a, b in zip(coefficients, (-0.2, 0.3, 0.9), strict=True))
    assert ema.measured.loss == pytest.approx(distance + 0.1 * (best - 3.22) ** 2)


@pytest.mark.parametrize("optimizer", ["EMAGrid", "LCSC", "LCSCGradient", "CMA"])
def test_a_search_is_continued_from_its_stored_numbers(study: dict[str, Any], optimizer: str) -> None:
    """A replay compares each number that the optimizer asks with the stored one, bit for bit."""
    del study["held_out"]
    study |= {"optimizers": [optimizer], "budget": {"evaluations": 23}}
    lcsc_opt.run(study)
    before = [(trial.user_attrs["coefficients"], tuned_of(trial)) for trial in stored(f"guided/{optimizer}/0").trials()]
    lcsc_opt.run(study, budget=30)
    after = [(trial.user_attrs["coefficients"], tuned_of(trial)) for trial in stored(f"guided/{optimizer}/0").trials()]
    assert after[:23] == before
    assert 23 < len(after) <= 30


def test_a_number_without_a_derivative_is_bracketed_and_continued(study: dict[str, Any]) -> None:
    del study["held_out"]
    study |= {"optimizers": ["LCSCGradient"], "tune": {**TUNE, "churn": {"low": 0, "high": 1}}}
    lcsc_opt.run({**study, "budget": {"evaluations": 47}})
    before = [(trial.user_attrs["coefficients"], tuned_of(trial)) for trial in stored("guided/LCSCGradient/0").trials()]
    lcsc_opt.run({**study, "budget": {"evaluations": 120}})
    after = [(trial.user_attrs["coefficients"], tuned_of(trial)) for trial in stored("guided/LCSCGradient/0").trials()]
    assert after[:47] == before
    assert after[-1][1]["churn"] == pytest.approx(0.4, abs=0.05)
    assert after[-1][1]["guidance"] == pytest.approx(3.2, abs=0.3)


def test_a_search_whose_stored_number_is_another_is_not_continued(study: dict[str, Any]) -> None:
    study |= {"optimizers": ["LCSC"], "budget": {"evaluations": 5}}
    lcsc_opt.run(study)
    edit = "UPDATE trial_user_attributes SET value_json = '{\"guidance\": 2.5}' WHERE key = 'tuned'"
    with sqlite3.connect("studies.db") as database:
        database.execute(edit)
    with pytest.raises(StudyStoreError, match="asks other coefficients"):
        lcsc_opt.run(study, budget=6)


def test_a_study_without_tuned_numbers_stores_nothing_about_them(study: dict[str, Any]) -> None:
    del study["tune"]
    lcsc_opt.run({**study, "optimizers": ["LCSC"], "budget": {"evaluations": 3}})
    plain = stored("guided/LCSC/0")
    assert "tune" not in plain.attributes["specification"]
    assert all("tuned" not in trial.user_attrs for trial in plain.trials())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tune": {"guidence": {"low": 1, "high": 6}}},
            r"tune\.guidence: the sampler has no such number; it has guidance",
        ),
        ({"tune": {"guidance": {"low": 6, "high": 1}}}, r"tune\.guidance: expected low < high, got low 6 and high 1"),
        ({"tune": {"guidance": {"low": -1, "high": 6}}}, r"tune\.guidance: expected a range within 0 to inf"),
        ({"tune": {"guidance": {"low": 1, "high": 6, "start": 7}}}, r"start 7 is not between"),
        ({"tune": {"guidance": {"low": 0, "high": 6, "scale": "log"}}}, r"scale log: expected low above 0, got 0"),
        ({"tune": {"guidance": {"low": 1, "high": 6, "scale": "cubic"}}}, r"tune\.guidance\.scale"),
        ({"tune": {"guidance": [1, 6]}}, r"tune\.guidance: expected a mapping"),
        ({"optimizers": ["LCSCQuadratic"]}, r"tune: LCSCQuadratic searches coefficients only"),
    ],
)
def test_what_cannot_be_tuned_is_refused_and_nothing_is_stored(
    study: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudySpecError, match=message):
        lcsc_opt.run({**study, **changes})
    assert not Path("studies.db").exists()


def test_other_ranges_do_not_continue_a_study(study: dict[str, Any]) -> None:
    study["optimizers"] = ["LCSC"]
    lcsc_opt.run({**study, "budget": {"evaluations": 5}})
    for tune in ({"guidance": {"low": 1, "high": 7}}, {}):
        with pytest.raises(LcscError, match="tune"):
            lcsc_opt.run({**study, "tune": tune, "budget": {"evaluations": 6}})
    assert len(stored("guided/LCSC/0").trials()) == 5


def test_ranges_that_were_stored_without_a_scale_continue(study: dict[str, Any]) -> None:
    study["optimizers"] = ["LCSC"]
    lcsc_opt.run({**study, "budget": {"evaluations": 5}})
    before = stored("guided/LCSC/0")
    specification = before.attributes["specification"]
    del specification["tune"]["guidance"]["scale"]
    before.set_attribute("specification", specification)
    lcsc_opt.run({**study, "budget": {"evaluations": 6}})
    assert len(stored("guided/LCSC/0").trials()) == 6


def test_a_fork_begins_with_the_numbers_that_were_found(study: dict[str, Any], typed: Typed) -> None:
    lcsc_opt.run({**study, "optimizers": ["LCSC"], "budget": {"evaluations": 30}})
    answer = lcsc_opt.load_study("guided/LCSC/0", "sqlite:///studies.db").tuned["guidance"]
    typed("fork", "guided/LCSC/0", "forked", "--optimizer", "CMA", "--budget", "3")
    forked = stored("forked/CMA/0")
    assert forked.attributes["specification"]["tune"]["guidance"] == {
        **TUNE["guidance"],
        "start": answer,
        "scale": "linear",
    }
    assert len(forked.trials()) == 33
    assert len({tuned_of(trial)["guidance"] for trial in forked.trials()[30:]}) == 3


def test_a_fork_whose_optimizer_searches_coefficients_only_is_refused(study: dict[str, Any], typed: Typed) -> None:
    lcsc_opt.run({**study, "optimizers": ["LCSC"], "budget": {"evaluations": 5}})
    message = typed.refused("fork", "guided/LCSC/0", "forked", "--optimizer", "LCSCQuadratic")
    assert "tune: LCSCQuadratic searches coefficients only" in message
    assert set(our_studies(stored("guided/LCSC/0").storage)) == {"guided/LCSC/0"}
