"""``benchmarks/paper.py``: what it runs, and what it says of what was found."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from optuna.storages import RDBStorage

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import paper
from reproduction.claims import HOLDS, NOT, UNKNOWN, Ratio, ratio_of, verdict
from reproduction.published import TABLES
from reproduction.table import Table

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.connection import open_storage
from tests.processes import lcsc_process
from tests.study_examples import write_study

NAMES = [table.study for table in TABLES]
EMA = 10.0


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_every_row_and_claim_is_about_a_point_of_its_study_file(table: Table, quick: bool) -> None:
    _, job = paper.jobs([table.study], 1, quick=quick)
    values: dict[str, list[str]] = {}
    for spec in job.specs():
        for key, value in split_point(spec.name)[1].items():
            values.setdefault(key, []).append(value)
    places = [setting.where for setting in table.settings]
    places += [place for claim in table.claims for place in (claim.better, claim.worse) if place is not None]
    for place in places:
        assert place.keys() == values.keys()
        beyond = [key for key, index in place.items() if index >= len(set(values[key]))]
        assert not beyond or (quick and beyond == ["file"])  # photographs and DDPM, which take too long


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_the_papers_ratios_are_those_of_its_numbers_and_below_one(table: Table) -> None:
    known = {tuple(setting.where.items()): setting for setting in table.settings}
    for claim in table.claims:
        better = known[tuple(claim.better.items())]
        worse = better if claim.worse is None else known[tuple(claim.worse.items())]
        reference = worse.ema if claim.worse is None or claim.of_ema else worse.fid
        ratio = better.fid / reference
        if claim.judge is not None:
            lcsc, ema = better.judges[claim.judge]
            ratio = ema / lcsc
        assert claim.paper == pytest.approx(ratio)
        assert claim.paper < 1


def test_a_quick_run_is_the_same_files_with_less_of_everything() -> None:
    for study in NAMES:
        whole, quick = (paper.Job(study, 0, paper._overrides(study, quick=quick)).specs() for quick in (False, True))
        assert all(short.budget.total < long.budget.total for short, long in zip(quick, whole, strict=False))
        assert quick[0].objective.settings["training_steps"] < whole[0].objective.settings.get("training_steps", 4000)
        assert {spec.held_out.images for spec in quick} == {2000}


def test_grids_come_first_and_all_files_with_one_seed_before_any_with_the_next() -> None:
    listed = paper.jobs(NAMES, 2, quick=False)
    own = [table.study for table in TABLES if table.beside is None]  # the others' searches are those of another file
    assert own != NAMES
    expected = [*((name, 0, True) for name in NAMES), *((name, seed, False) for seed in (0, 1) for name in own)]
    assert [(job.study, job.seed, job.grids) for job in listed] == expected


def test_every_study_of_a_file_is_in_one_job_and_ema_grids_have_one_seed() -> None:
    listed = [job for job in paper.jobs(["ema", "seeds"], 2, quick=False) if job.study == "ema"]
    [first, *_] = [job.specs()[0].name for job in listed]
    names = [f"{first}/{rest}" for rest in ("EMAGrid/0", "PowerEMAGrid/0", "LCSC/0", "LCSC/1")]
    assert [study for job in listed for study in job.studies() if study.startswith(f"{first}/")] == names


def test_ema_grids_are_done_before_any_search(monkeypatch: pytest.MonkeyPatch, storage: RDBStorage) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(paper, "train", lambda missing, processes: None)
    monkeypatch.setattr(paper.Job, "run", lambda job, url: ran.append(job))
    assert paper.run(paper.jobs(["seeds", "window"], 2, quick=False), str(storage.url), 2) == 0
    assert [job.grids for job in ran] == [True] * 2 + [False] * 4


def test_each_table_has_the_seeds_of_its_study_file() -> None:
    for table in TABLES:
        listed = paper.jobs([table.study], None, quick=False)
        seeds = [job.seed for job in listed if not job.grids]
        assert seeds == list(range(table.seeds))
        assert all(list(spec.seeds) == seeds for spec in paper.Job(table.study, 0, ()).specs())


def test_a_ratio_is_a_geometric_mean_with_students_interval_of_the_logarithms() -> None:
    values = [0.5, 0.4, 0.8]
    logs = [math.log(value) for value in values]
    low, high = scipy.stats.t.interval(0.95, 2, loc=sum(logs) / 3, scale=scipy.stats.sem(logs))
    found = ratio_of(values)
    assert (found.mean, found.low, found.high) == pytest.approx((0.16 ** (1 / 3), math.exp(low), math.exp(high)))
    assert ratio_of([0.5]) == Ratio(0.5)
    assert ratio_of([]) is None
    assert ratio_of([-1.0, math.inf]) is None
    assert ratio_of([0.5, 0.6, 0.0]) is None, "the others alone would flatter"


@pytest.mark.parametrize(
    ("ratio", "word"),
    [
        (Ratio(0.5, 0.4, 0.99), HOLDS),
        (Ratio(1.5, 1.01, 2.0), NOT),
        (Ratio(0.9, 0.7, 1.2), UNKNOWN),
        (Ratio(1.0, 1.0, 1.0), UNKNOWN),
        (Ratio(0.5), UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_the_word_for_a_claim_follows_from_the_interval_alone(ratio: Ratio | None, word: str) -> None:
    assert verdict(ratio) == word


def report(
    loss: float, *, images: int = 10_000, cross_check: float = 0.5, judges: dict[str, tuple[float, float]] | None = None
) -> dict[str, Any]:
    judged = (judges or {}).items()
    return {
        "trial": 1,
        "loss": loss,
        "images": images,
        "groups": [{"loss": loss, "seed": 0}],
        "baselines": {"EMA*": {"loss": EMA}},
        "judges": [
            {"metric": name, "sign": -1, "value": value, "against": "EMA*", "baseline": baseline}
            for name, (value, baseline) in judged
        ],
        "cross_check": {
            "metric": "fid@cross_check",
            "value": 3.0,
            "against": "EMA*",
            "gain": 0.1,
            "cross_check_gain": cross_check,
        },
    }


@pytest.fixture
def storage(tmp_path: Path) -> RDBStorage:
    return open_storage(f"sqlite:///{tmp_path / 'paper.db'}", write=True)


def answer(storage: RDBStorage, experiment: str, optimizer: str, losses: list[float], **of_report: Any) -> None:
    """Finished studies, a seed for each held-out loss."""
    for seed, loss in enumerate(losses):
        write_study(storage, f"{experiment}/{optimizer}/{seed}", [9.0, 8.0], held_out=report(loss, **of_report))


def lines_of(storage: RDBStorage, seeds: int = 3) -> list[str]:
    return paper.written(paper.jobs(NAMES, seeds, quick=False), str(storage.url), quick=False).splitlines()


def row(lines: list[str], start: str) -> list[str]:
    [line] = [line for line in lines if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_claims_are_answered_from_what_the_studies_found(storage: RDBStorage) -> None:
    for space, losses in (("affine", [2.0, 2.2, 2.1]), ("convex", [4.0, 4.5, 4.1])):
        answer(storage, f"paper_convex,file=digits.py,space={space}", "LCSC", losses)
        answer(storage, f"paper_convex,file=digits.py,space={space}", "LCSCGradient", losses[::-1])
        answer(storage, f"paper_convex,file=digits_ddpm.py,space={space}", "LCSC", losses[::-1])
    for space, losses in (("affine", [5.0, 5.2, 5.1]), ("convex", [4.0, 4.5, 4.1])):
        answer(storage, f"paper_convex,file=digits.py,space={space}", "LCSCQuadratic", losses)
    lines = lines_of(storage)
    claim = row(lines, "CM: any sign is better than convex")
    expected = ratio_of([2.0 / 4.0, 2.2 / 4.5, 2.1 / 4.1])
    assert claim[1:] == ["0.817", str(expected), f"*{HOLDS}*", f"*{NOT}*", f"*{HOLDS}*"]
    setting = row(lines, "CM, w/o")
    assert setting[1:4] == ["2.76", "0.676", str(ratio_of([0.2, 0.22, 0.21]))]
    turned = [line for line in lines if line.startswith("* CM: any sign")]
    assert turned == ["* CM: any sign is better than convex (Table 14): holds with LCSC, holds not with LCSCQuadratic"]
    assert row(lines, "LCSC")[1:3] == ["2", "0"]


def test_searches_that_a_file_lacks_are_those_of_the_file_beside_it(storage: RDBStorage) -> None:
    answer(storage, "paper_ema,file=digits.py", "LCSC", [4.0, 4.0])
    answer(storage, "paper_features,file=digits.py", "LCSC", [7.0, 7.0])
    answer(storage, "paper_features,file=digits.py", "LCSCGradient", [2.0, 2.0])
    setting = row(lines_of(storage), "CD (ours: CM of digits)")
    assert setting[3:] == ["0.4 [0.4, 0.4]", "–", "0.2 [0.2, 0.2]"]
    [first, second] = (paper.Job(name, 0, ()).specs() for name in ("ema", "features"))
    assert [spec.objective for spec in first] == [spec.objective for spec in second]


def test_other_features_are_compared_in_other_features(storage: RDBStorage) -> None:
    answer(storage, "paper_features,file=digits.py", "LCSC", [1.0, 1.1], cross_check=-0.25)
    claim = row(lines_of(storage), "CD: LCSC is better in other features, too")
    assert claim[2] == "1.25 [1.25, 1.25]"
    assert claim[3] == f"*{NOT}*"


def test_losses_of_other_numbers_of_images_are_not_compared(storage: RDBStorage) -> None:
    answer(storage, "paper_window,window=3200", "LCSC", [1.0, 1.1])
    answer(storage, "paper_window,window=800", "LCSC", [2.0, 2.1], images=500)
    assert row(lines_of(storage), "40K is better than 10K")[2:4] == ["–", f"*{UNKNOWN}*"]


def test_a_part_of_the_training_is_compared_with_ema_after_all_of_it(storage: RDBStorage) -> None:
    answer(storage, "paper_cd,batch_size=128,last_step=250,nfe=1", "LCSC", [8.0, 8.2, 8.1])
    answer(storage, "paper_cd,batch_size=128,last_step=1000,nfe=1", "EMAGrid", [4.0])
    claim = row(lines_of(storage), "CD: LCSC after a part of the training is better than EMA* after all of it")
    assert claim[2:4] == [str(ratio_of([2.0, 2.05, 2.025])), f"*{NOT}*"]


def test_what_is_better_where_it_is_higher_holds_where_it_is_higher(storage: RDBStorage) -> None:
    point = "paper_cd,batch_size=128,last_step=1000,nfe=1"
    answer(storage, point, "LCSC", [4.0, 4.0], judges={"is": (9.0, 6.0), "recall": (0.3, 0.6)})
    lines = lines_of(storage)
    assert row(lines, "CD: IS is higher than that of EMA*")[2:4] == ["0.667 [0.667, 0.667]", f"*{HOLDS}*"]
    assert row(lines, "CD: recall is higher than that of EMA*")[2:4] == ["2 [2, 2]", f"*{NOT}*"]
    assert row(lines, "800K | IS")[2:4] == ["1.04", "1.5 [1.5, 1.5]"]


def test_judges_of_single_images_stand_beside_those_of_ema(storage: RDBStorage) -> None:
    assert not any("Single images" in line for line in lines_of(storage))
    for seed, precision in enumerate((0.6, 0.7)):
        held_out = report(2.0 + seed, judges={"precision": (precision, 0.5), "is": (9.0, 8.0)})
        write_study(storage, f"paper_interval,interval=80/LCSC/{seed}", [9.0, 8.0], held_out=held_out)
    lines = lines_of(storage)
    assert row(lines, "CM of digits, K = 50 | EMA*")[2:6] == ["", f"{EMA:.3g}", "0.5", "–"]
    assert row(lines, "CM of digits, K = 50 | LCSC")[2:6] == ["2", "2.5 ± 0.71", "0.65 ± 0.071", "–"]


def test_the_fewest_steps_are_the_fewest_that_are_not_worse_than_ema_in_the_most(storage: RDBStorage) -> None:
    answer(storage, "paper_dm,nfe=10", "EMAGrid", [4.0])
    for nfe, losses in ((10, [2.0, 2.1, 2.2]), (8, [3.9, 4.0, 4.1]), (6, [8.0, 8.1, 8.2])):
        answer(storage, f"paper_dm,nfe={nfe}", "LCSC", losses)
    answer(storage, "paper_dm,nfe=6", "LCSCGradient", [7.0, 7.1, 7.2])
    lines = lines_of(storage)
    title = lines.index("Lowest NFE that is not told to be worse than EMA* at 10, and its ratio:")
    lowest = str(ratio_of([3.9 / 4, 1.0, 4.1 / 4]))
    assert lines[title + 2 : title + 5] == [f"* LCSC: 8 ({lowest})", "* LCSCGradient: none", ""]


def test_speed_ups_count_the_search_in(storage: RDBStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        paper, "_training_seconds", lambda settings: settings.get("select", {}).get("last_step", 0) / 10
    )
    for step in (1000, 2000):
        answer(storage, f"paper_ct,batch_size=128,last_step={step}", "LCSC", [4.0])
    lines = lines_of(storage)
    reader = paper.HistoryReader(storage)
    [study] = reader.read("paper_ct,batch_size=128,last_step=1000")
    assert study.seconds > 0
    [speed_up] = [line for line in lines if line.startswith("| 400K | 1.96 |")]
    assert speed_up.split(" | ")[2] == f"{200 / (100 + study.seconds):.3g}"
    [whole] = [line for line in lines if line.startswith("| CT | 6.45 (1.0%) | 640 | 200 |")]
    assert whole.split(" | ")[4] == f"{study.seconds:,.0f} ({study.seconds / 200:.0%})"


def test_every_training_is_done_once_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(paper, "_train", lambda content: begun.append(content["objective"]["settings"]))
    paper.train(paper.jobs(["ct", "window", "interval"], 2, quick=False), 1)
    assert [settings.get("recipe_settings") for settings in begun] == [{"batch_size": 128}, {"batch_size": 32}, None]


def test_a_training_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(paper, "_train", lambda content: "lcsc: no room")
    paper.train(paper.jobs(["dm"], 1, quick=False), 2)
    assert capsys.readouterr().out == "training of trained.py: lcsc: no room\n"


def test_what_is_missing_is_said_and_counts_for_nothing(storage: RDBStorage) -> None:
    answer(storage, "paper_seeds", "LCSC", [4.0])
    write_study(storage, "paper_seeds/LCSC/1", [9.0], ended=False)
    lines = lines_of(storage)
    [missing] = [line for line in lines if "Not finished" in line]
    total = sum(len(job.studies()) for job in paper.jobs(NAMES, 3, quick=False))
    assert f"{total - 1} of {total} studies" in missing
    assert row(lines, "whatever the seed, LCSC is better than EMA")[2:4] == ["0.4", f"*{UNKNOWN}*"]


def test_what_fails_is_said_and_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: RDBStorage
) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paper, "train", lambda missing, processes: None)
    ran, failing = [], False

    def fake(job: Any, url: str) -> str | None:
        ran.append(str(job))
        return None if job.study == "seeds" or job.grids is not failing else "lcsc: no room"

    monkeypatch.setattr(paper.Job, "run", fake)
    chosen = paper.jobs(["seeds", "window"], 1, quick=False)
    assert paper.run(chosen, str(storage.url), 1) == 1
    assert "window, seed 0: lcsc: no room" in capsys.readouterr().out
    for optimizer in ("EMAGrid", "LCSC", "LCSCQuadratic", "LCSCGradient"):
        answer(storage, "paper_seeds", optimizer, [4.0])
    ran.clear()
    failing = True  # the EMA grids, without which no search can be compared with EMA*
    assert paper.run(chosen, str(storage.url), 1) == 1
    assert ran == ["window, EMA grids"]


def test_a_job_that_is_refused_gives_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "cache"))
    job = paper.Job("seeds", 0, ("objective.settings.imagez=3",))
    commands: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(paper, "_failure", lambda command: commands.append(command) or "said")
        assert job.run(f"sqlite:///{tmp_path / 'x.db'}") == "said"
    [command] = commands
    assert command[:3] == [sys.executable, "-c", "from lcsc_opt.cli import main; main()"]
    refused = lcsc_process(*command[3:])
    assert refused.status == 2
    assert "imagez: unknown key" in refused.err.splitlines()[-1]
    said = "import sys; print('first', file=sys.stderr); sys.exit({})"
    assert paper._failure([sys.executable, "-c", said.format("'the last line'")]) == "the last line"
    assert paper._failure([sys.executable, "-c", said.format(0)]) is None
    with pytest.raises(StudySpecError):
        paper.Job("seeds", 0, ("sedes=[1]",)).specs()
