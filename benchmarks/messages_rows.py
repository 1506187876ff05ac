"""The rows of ``messages.py``: common accidents, with their numbers in the original list."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = '''
import numpy as np

from lcsc_opt.base.paths import cache_directory, given_path
from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import open_or_pack


class Model(Objective):
    """How far the merged weights are from a target, with the noise of a few images."""

    def __init__(self, trajectory):
        self.trajectory = trajectory

    @property
    def steps(self):
        return self.trajectory.steps

    @property
    def images_per_evaluation(self):
        return 100

    def evaluate(self, candidate, *, gradient=False):
        images = candidate.images or 100
        merged = self.trajectory.merge(candidate.coefficients)
        noise = np.random.default_rng(len(repr(candidate.noise))).normal() / images
        loss = float(sum((weights - 0.3).square().sum() for weights in merged.values())) + noise
        return Evaluation(loss, {"fid": loss}, Cost(images=images))

    def describe(self):
        return {"trajectory": self.trajectory.sha256}


def build(settings):
    return Model(open_or_pack([given_path(settings["checkpoints"])], cache=cache_directory()))
'''
STUDY = """name: mine
objective: {file: model.py, settings: {checkpoints: runs}}
optimizers: [LCSC]
budget: {evaluations: 10}
"""
FUNCTION = """import numpy as np

def loss(coefficients):
    return float(np.square(coefficients - 0.2).sum())
"""
PLAIN = """name: plain
objective: {file: function.py, settings: {callable: "losses:loss", steps: [1, 2, 3]}}
optimizers: [OnePlusOne]
budget: {evaluations: 6}
"""
SLOW = FUNCTION.replace("    return", "    import time\n    time.sleep(0.3)\n    return")
WRITER = """
import torch
from lcsc_opt import TrajectoryWriter
with TrajectoryWriter("run.trajectory"{resume}) as writer:
    for step in range({first}, {last}, 50):
        writer.append(step, {{"w": torch.full((3,), step + {seed}.0)}})
"""


def _plain(place: Any, *, function: str = FUNCTION, study: str = PLAIN) -> None:
    place.write("losses.py", function)
    place.write("plain.yaml", study)


def _model(place: Any, *, study: str = STUDY) -> None:
    place.write("model.py", MODEL)
    place.write("mine.yaml", study)
    place.checkpoints(range(10, 70, 10))


def _rewound(place: Any) -> None:
    for code in (
        WRITER.format(resume="", first=1400, last=2001, seed=0),
        WRITER.format(resume="", first=1550, last=2001, seed=1),
        WRITER.format(resume=", resume=1500", first=1550, last=1601, seed=1),
    ):
        place.python(code)
    place.lcsc("trajectory truncate run.trajectory --after 1450")
    place.lcsc("trajectory truncate run.trajectory --after 1")


def _grown(place: Any) -> None:
    _model(place)
    place.lcsc("run mine.yaml")
    place.note("the folder grows, and a file is touched")
    place.checkpoints(range(70, 90, 10))
    os.utime(place.folder / "runs" / "model20.safetensors")
    for command in ("export mine/LCSC/0 -o a.safetensors", "resume mine/LCSC/0 --budget 12", "recipe mine/LCSC/0"):
        place.lcsc(command)
    place.lcsc("fork mine/LCSC/0 longer --checkpoints runs")
    place.lcsc("resume longer/LCSC/0")
    place.note("the folder moves; a file is gone, and the cache is cleared")
    (place.folder / "runs").rename(place.folder / "moved")
    place.lcsc("evaluate mine/LCSC/0")
    (place.folder / "moved" / "model30.safetensors").unlink()
    shutil.rmtree(place.folder / "cache")
    place.lcsc("resume mine/LCSC/0 --budget 14")


def _edited(place: Any) -> None:
    _plain(place)
    place.lcsc("run plain.yaml")
    place.write("losses.py", FUNCTION.replace("0.2", "0.9"))
    for command in ("resume plain/OnePlusOne/0 --budget 8", "run plain.yaml --budget 8 --accept-code"):
        place.lcsc(command)


def _lowered(place: Any) -> None:
    _plain(place)
    place.lcsc("run plain.yaml")
    place.lcsc("resume plain/OnePlusOne/0 --budget 9")
    place.lcsc("run plain.yaml")
    place.lcsc("resume plain/OnePlusOne/0 --budget 3")


def _raises(place: Any) -> None:
    _plain(place, function="def loss(coefficients):\n    return {'a': 1.0}['b']\n")
    for command in ("run plain.yaml", "run plain.yaml --debug", "show plain/OnePlusOne/0", "list"):
        place.lcsc(command)


def _several(place: Any) -> None:
    study = PLAIN.replace("[OnePlusOne]", "[{name: EMAGrid, options: {rates: [0.1]}}, OnePlusOne]")
    wrong = FUNCTION.replace("    return", "    if coefficients[0] == 0:\n        raise KeyError('b')\n    return")
    _plain(place, function=FUNCTION + wrong.replace("coefficients[0] == 0", "coefficients[2] > 0.85"), study=study)
    place.lcsc("run plain.yaml")
    place.lcsc("run plain.yaml --budget 8")


def _mended(place: Any) -> None:
    _plain(place, function="def loss(coefficients):\n    return {'a': 1.0}['b']\n")
    place.lcsc("run plain.yaml")
    place.note("the cause is mended")
    place.write("losses.py", FUNCTION)
    for command in ("resume plain/OnePlusOne/0", "resume plain/OnePlusOne/0 --retry-failed --accept-code"):
        place.lcsc(command)


def _looks(place: Any) -> None:
    _model(place)
    for command in ("run mine.yaml", "evaluate mine/LCSC/0 --images 20", "evaluate mine/LCSC/0 --images 20 --keep"):
        place.lcsc(command)
    place.lcsc("export mine/LCSC/0 -o a.safetensors")
    place.lcsc("export mine/LCSC/0 -o a.safetensors")


def _rehearsed(place: Any) -> None:
    _model(place)
    shutil.rmtree(place.folder / "runs")
    place.lcsc("run mine.yaml --dry-run")
    place.checkpoints(range(10, 70, 10))
    place.lcsc("run mine.yaml --dry-run")
    place.lcsc("run mine.yaml")
    place.write("mine.yaml", STUDY.replace("[LCSC]", "[{name: LCSC, options: {population_size: 7}}]"))
    place.lcsc("run mine.yaml --dry-run")


def _best(place: Any) -> None:
    _plain(place)
    place.lcsc("run plain.yaml")
    place.lcsc("show plain/OnePlusOne/0")
    place.python(
        'import optuna; print(optuna.load_study(study_name="plain/OnePlusOne/0", '
        'storage="sqlite:///studies.db").best_trial.number)'
    )
    for command in ("evaluate plain/OnePlusOne/0", "compare plain", "export plain/OnePlusOne/0 -o a.safetensors"):
        place.lcsc(command)


def _cleaned(place: Any) -> None:
    _model(place)
    place.lcsc("run mine.yaml")
    place.lcsc("cache")
    place.lcsc("delete mine/LCSC/0")
    place.lcsc("delete mine/LCSC/1")
    place.lcsc("delete mine/LCSC/0 --yes")
    place.lcsc("cache --clear --unused --yes")
    place.lcsc("cache")


def _locked(place: Any) -> None:
    _plain(place)
    place.lcsc("run plain.yaml")
    with place.locked():
        place.lcsc("doctor")
        with place.meanwhile("list"):
            place.until(place.said("is locked"))


def _copied(place: Any) -> None:
    _plain(place, function=SLOW, study=PLAIN.replace("6}", "600}"))
    with place.meanwhile("run plain.yaml"):
        place.until(place.trials(atleast=3))
        shutil.copy(place.folder / "studies.db", place.folder / "copy.db")
        place.lcsc("run plain.yaml --budget 4")
        place.lcsc("run plain.yaml --budget 8 --storage sqlite:///copy.db")
        place.lcsc("delete plain/OnePlusOne/0 --yes")


def _early_dashboard(place: Any) -> None:
    with place.meanwhile("dashboard --port 18731"):
        place.until(place.said("http"))


def _others_studies(place: Any) -> None:
    _plain(place)
    place.python(
        "import optuna; optuna.logging.set_verbosity(40); "
        'optuna.create_study(study_name="theirs", storage="sqlite:///studies.db").optimize(lambda t: 1.0, n_trials=2)'
    )
    for command in ("run plain.yaml", "list", "doctor", "show theirs", "delete theirs --yes"):
        place.lcsc(command)


def _ended(place: Any) -> None:
    _plain(place, function=SLOW, study=PLAIN.replace("6}", "600}"))
    for trials, number in ((3, signal.SIGINT), (9, signal.SIGTERM)):
        with place.meanwhile("run plain.yaml", number) as process:
            place.until(place.trials(atleast=trials))
            os.kill(process, number)
            os.kill(process, number)


def _outputs(place: Any) -> None:
    _plain(place)
    place.lcsc("run plain.yaml", out="/dev/full")
    place.lcsc("list", out="/dev/full")
    place.lcsc("list --format json", out="/dev/full")


def _exits(place: Any) -> None:
    _plain(place, function="import sys\n\ndef loss(coefficients):\n    sys.exit('no data')\n")
    place.lcsc("run plain.yaml")


def _refused(place: Any) -> None:
    _plain(place)
    place.lcsc("--version")
    place.lcsc("run plain.yaml")
    for command in (
        "fork plain/OnePlusOne/0 plain",
        "fork plain/OnePlusOne/0 other --optimizer NoSuch",
        "fork plain/OnePlusOne/0 other --checkpoints runs",
        "list",
        "compare nothing",
        "show plain/OnePlusOne/7",
        "run nothing.yaml",
    ):
        place.lcsc(command)
    place.write("plain.yaml", PLAIN + "space: {kind: principal, directions: 9}\n")
    place.lcsc("run plain.yaml")
    place.write("plain.yaml", PLAIN.replace("evaluations: 6", "evaluations: six"))
    place.lcsc("run plain.yaml")
    place.write("plain.yaml", PLAIN + "budgett: 3\n")
    place.lcsc("run plain.yaml")
    place.write("plain.yaml", PLAIN[:70])
    place.lcsc("run plain.yaml")


def _applied(place: Any) -> None:
    _model(place)
    place.lcsc("run mine.yaml")
    place.lcsc("export mine/LCSC/0 -o a.safetensors")
    place.lcsc("apply a.safetensors runs -o b.safetensors")
    first, second = (Path(place.folder / name).read_bytes() for name in ("a.safetensors", "b.safetensors"))
    place.note(f"the same bytes: {first == second}")
    place.checkpoints(range(10, 60, 10), "fewer")
    place.lcsc("apply a.safetensors fewer -o c.safetensors")
    place.lcsc("apply model.py runs -o c.safetensors")


def _overridden(place: Any) -> None:
    _plain(place)
    place.lcsc("run plain.yaml objective.settings.steps=[1,2,3,4] seeds=[0,1] budget.evaluations=4")
    place.lcsc("run plain.yaml objective.settings.stepz=[1]")
    place.lcsc("run plain.yaml seeds=one")
    place.lcsc("run plain.yaml seeds")


def _begun(place: Any) -> None:
    place.checkpoints(range(10, 70, 10))
    place.lcsc("init runs")
    place.lcsc("init runs")
    place.lcsc("init nothing -o other.yaml")
    place.lcsc("run study.yaml --dry-run")


def _averaged(place: Any) -> None:
    place.checkpoints(range(10, 70, 10))
    place.write("c.json", "[0.5, 0.5, 0, 0, 0]")
    for rest in ("--ema 0.99", "--power 0.1", "--coefficients c.json", "", "--ema 0.9 --power 0.1", "--ema 1.5"):
        place.lcsc(f"average runs {rest} -o out{len(place.lines)}.safetensors")
    place.lcsc("average nothing --ema 0.9 -o out.safetensors")


ROWS: dict[str, Callable[[Any], None]] = {
    "1 Training restarts from step 1500 of a trajectory of 2000": _rewound,
    "2 A folder of checkpoints grows, is touched, moves, loses a file": _grown,
    "3 The function is edited": _edited,
    "4 A larger total, then the file's": _lowered,
    "5 An objective raises KeyError": _raises,
    "6 One study of a file fails": _several,
    "7 The cause of failures is mended": _mended,
    "8 A look at few images": _looks,
    "9 A rehearsal with a missing folder, and with changed settings": _rehearsed,
    "10 The best trial, of Optuna and of lcsc; 11 a plain function": _best,
    "15 Cleaning up": _cleaned,
    "16 Somebody is in the middle of a transaction": _locked,
    "17 The database is copied while a study runs": _copied,
    "18 A dashboard before the first run": _early_dashboard,
    "19 Other people's studies in the same database": _others_studies,
    "ended Three quick Ctrl-C, and SIGTERM": _ended,
    "outputs An output that is full": _outputs,
    "exits sys.exit in an objective": _exits,
    "refused Refused commands and files": _refused,
    "applied Export, apply": _applied,
    "overridden Dotted overrides": _overridden,
    "begun lcsc init": _begun,
    "averaged lcsc average": _averaged,
}
