"""What is stored of held-out reports and of measurements."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from optuna.storages import RDBStorage

from lcsc_opt.base.records import HELD_OUT, Evaluation, ReportedMetrics
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.measurement import Measurement, Model, Sample
from tests.history_examples import measured, report_of
from tests.study_examples import write_experiment, write_report


def model(**fields: Any) -> Model:
    return Model("trial 1", np.array([0.25, 0.75]), **fields)


def evaluated(loss: float, seed: int = 0, **metrics: float) -> Measurement:
    evaluation = Evaluation(loss, metrics, without_groups={"loss": [loss, 2 * loss]})
    return Measurement.of(model(), evaluation, images=50, seed=seed)


def test_several_groups_of_noise_are_one_measurement_of_what_all_have() -> None:
    joined = Measurement.joined([evaluated(2.5, near=3.05), evaluated(2.75, seed=1, near=3.15, kid=1.0)])
    assert (joined.loss, joined.metrics) == (2.625, {"near": pytest.approx(3.1)}), "a group has no kid"
    assert (joined.seeds, joined.images, joined.value("kid")) == ((0, 1), 50, None)
    assert joined.without_groups == {"loss": ((2.5, 5.0), (2.75, 5.5))}


def test_the_standard_error_of_a_loss_is_that_of_the_metric_which_it_is_up_to_the_sign() -> None:
    measured = evaluated(-0.75, hits=0.75, hits_stderr=0.03, other_stderr=0.5)
    assert measured.values["loss_stderr"] == (0.03,)
    assert set(measured.metrics) == {"hits", "hits_stderr", "other_stderr"}


def test_a_report_is_what_its_trials_say_and_which_model_was_chosen(storage: RDBStorage) -> None:
    found = Measurement.joined([evaluated(2.5, near=3.05), evaluated(2.625, seed=1, near=3.1)])
    own = Measurement(model(study="digits/EMAGrid/0", trial=3, label="EMA 0.9"), 50, (0, 1), {"loss": (2.5, 2.625)})
    made = report_of(
        {"digits/LCSC/0": found, "digits/EMAGrid/0": own},
        selection={"EMA*": 2.4, "LCSC, trial 0": 2.3},
        sampler="DDIM",
        metrics=ReportedMetrics(
            signs={"near": 1}, cross_check="near", cross_check_text="near, elsewhere", real_halves={"near": 2.0}
        ),
        sign=-1,
        warnings=("it lost",),
    )
    assert write_experiment(storage, "digits", maximize=True).report is None
    write_report(storage, made)
    experiment = StoredExperiment.open(storage, "digits")
    read = experiment.report
    assert read is not None
    assert dataclasses.replace(read, entrants={}, rounds=()) == made
    np.testing.assert_array_equal(read.of_answer.model.coefficients, found.model.coefficients)
    experiment.set_attribute("keys", {"another": {}})
    assert experiment.report is None, "what was measured under another key is shown nowhere"


def test_the_best_that_the_user_had_is_that_of_the_metric_which_a_sentence_names() -> None:
    had = [measured(3.0, name="EMA*", fid=30.0, hits=0.5), measured(2.0, name="last checkpoint", fid=40.0, hits=0.75)]
    report = report_of(
        {"digits/LCSC/0": measured(1.0, fid=20.0, hits=0.25)},
        *had,
        metrics=ReportedMetrics(signs={"fid": 1, "hits": -1}),
    )
    assert (report.answer, report.is_found, report.headline_metric) == ("LCSC, trial 0", True, "fid")
    best = {metric: report.best_had(metric) for metric in ("fid", "loss", "hits", "kid")}
    names = {metric: model and model.model.name for metric, model in best.items()}
    assert names == {"fid": "EMA*", "loss": "last checkpoint", "hits": "last checkpoint", "kid": None}
    assert [row.metric for row in report.costs(report.answer, "EMA*")] == ["hits"]


def test_models_of_other_weights_and_samples_of_other_images_have_other_keys() -> None:
    others = [Model("", -model().coefficients), model(weights_sha256="a" * 64)]
    assert len({model().key, *(other.key for other in others)}) == 3
    assert Model("another name", model().coefficients).key == model().key
    assert Sample(HELD_OUT, 20) != Sample(HELD_OUT, 30)
