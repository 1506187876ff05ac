"""A study's curves where people's other curves are, and a call of their function when its search ends.

Threads read the database, as the dashboard does, and hand on what is new. So resuming, workers and Ray need nothing of
their own, and a tracker that fails or waits stops no search. The study's attribute ``logged`` says which run of a
tracker is the study's, and how far it has come: the next process continues there, also after a failure.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.imports import import_dotted, import_extra
from lcsc_opt.base.progress import notice
from lcsc_opt.database.history import Floats, StudyHistory, is_finished
from lcsc_opt.database.names import LOGGED
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.artifacts import StoredImage, artifact_directory

_LOOK_SECONDS = 10.0  # between two looks at the database
_PATIENCE_SECONDS = 60.0  # at the end of a run, for trackers that send over a network
_STALL_SECONDS, _STALL_TIMES = 1800.0, 10  # nothing new for this long, and for so many of the longest evaluation
_WIDTH, _HEIGHT, _MARGIN = 900, 360, 60  # pixels

_Notify = Callable[[str, str, float | None, str], object]
# what is stored of a tracker: its ``run``, the last ``step``, trial and loss of the ``answer``
_Known = Mapping[str, Any]
_Values = Mapping[str, float | Image.Image]
_Part = Callable[[StudyHistory, bool], None]  # with the study as it is now, and whether it is the last time


class _TrackerRun(NamedTuple):
    """One study's run in a tracker: what a later process finds it by, and what it does; was the search ended?"""

    key: str
    log: Callable[[int, _Values], object]
    close: Callable[[bool], object]


def _tensorboard(study: StudyHistory, _: Mapping[str, Any], known: _Known) -> _TrackerRun:
    """Event files; what an earlier process wrote after the known step, or an earlier study of this name, is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    key = known["run"] or str(Path("runs", study.study).absolute())
    writer = SummaryWriter(key, purge_step=known["step"] + 1)

    def log(step: int, values: _Values) -> None:
        for name, value in values.items():
            if isinstance(value, Image.Image):
                writer.add_image(name, np.asarray(value), step, dataformats="HWC")
            else:
                writer.add_scalar(name, value, step)
        writer.flush()

    return _TrackerRun(key, log, lambda _: writer.close())


def _wandb(study: StudyHistory, settings: Mapping[str, Any], known: _Known) -> _TrackerRun:
    """Weights & Biases. The step is a metric: those of its own only grow, and a crash may repeat some of ours."""
    wandb, key = import_extra("wandb"), known["run"] or uuid.uuid4().hex
    how: Any = {"id": key, "resume": "allow", "reinit": "create_new", "settings": wandb.Settings(console="off")}
    run = wandb.init(**_named(study, "WANDB_PROJECT"), config=dict(settings), **how)
    run.define_metric("*", step_metric="trial")
    return _TrackerRun(
        key,
        lambda step, values: run.log({"trial": step, **_with_pictures(wandb.Image, values)}),
        lambda ended: run.finish(exit_code=0 if ended else 1),
    )


def _trackio(study: StudyHistory, settings: Mapping[str, Any], known: _Known) -> _TrackerRun:
    """Trackio, which finds a run by its name."""
    trackio, resume = import_extra("trackio"), "never" if known["run"] is None else "allow"
    run = trackio.init(**_named(study, "TRACKIO_PROJECT"), config=dict(settings), resume=resume, embed=False)
    return _TrackerRun(
        study.study,
        lambda step, values: run.log(_with_pictures(trackio.Image, values), step=step),
        lambda _: run.finish(),
    )


def _named(study: StudyHistory, variable: str) -> dict[str, str]:
    return {"project": os.environ.get(variable, "lcsc_opt"), "group": study.experiment, "name": study.study}


def _with_pictures(kind: Callable[[Image.Image], Any], values: _Values) -> dict[str, Any]:
    return {name: kind(value) if isinstance(value, Image.Image) else value for name, value in values.items()}


def _mlflow(study: StudyHistory, settings: Mapping[str, Any], known: _Known) -> _TrackerRun:
    """MLflow's client, since its functions have one run at a time, which may be the objective's."""
    client, key = import_extra("mlflow").MlflowClient(), known["run"]
    if key is None:
        found = client.get_experiment_by_name(study.experiment)
        experiment = client.create_experiment(study.experiment) if found is None else found.experiment_id
        key = client.create_run(experiment, run_name=study.study).info.run_id
        client.log_dict(key, settings, "study.json")
    client.update_run(key, status="RUNNING")

    def log(step: int, values: _Values) -> None:
        for name, value in values.items():
            if isinstance(value, Image.Image):
                client.log_image(key, value, key=name, step=step)
            else:
                client.log_metric(key, name, value, step=step)

    return _TrackerRun(key, log, lambda ended: client.set_terminated(key, "FINISHED" if ended else "KILLED"))


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def check_reporting(log: Sequence[str], notify: str | None) -> _Notify | None:
    """Import what the keys ``log`` and ``notify`` of a study file name; gives the function.

    Raises:
        MissingPackageError: a tracker is not installed.
        StudySpecError: the function cannot be imported.
    """
    for name in log:
        import_extra(name)
    return None if notify is None else import_dotted(notify, setting="notify", error=StudySpecError)


class Reporting:
    """Logs a study, and calls the user's function about it, while this is open.

    A thread for each tracker, and one for the function, end with their first error, which is a notice.

    Args:
        study: the caller holds it, or it is finished.
        log: the trackers.
        notify: ``module:function``. It gets the study's name, ``ended``, ``failed`` or ``stalled``, the lowest loss of
            the search, and a line of text.

    Raises:
        LcscError: as :func:`check_reporting`.
    """

    def __init__(self, study: StoredStudy, log: Sequence[str], notify: str | None) -> None:
        self._study = StoredStudy(study.storage, study.name, study.key)  # the caller's remembers what it has read
        self._reader, self._writing, self._stop = HistoryReader(study.storage), threading.Lock(), threading.Event()
        self._seen, self._since, self._outcome = -1, 0.0, ("", "")
        self._runs: dict[str, _TrackerRun] = {}
        parts: dict[str, _Part] = {name: functools.partial(self._log, name) for name in log}
        if (function := check_reporting(log, notify)) is not None:
            parts["notify"] = functools.partial(self._tell, function)
        self._threads = [
            threading.Thread(target=self._run, args=part, name=part[0], daemon=True) for part in parts.items()
        ]

    def __enter__(self) -> Reporting:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Log what is left, for a minute at most. An interruption is neither an end nor a failure."""
        if error is None or isinstance(error, Exception):
            self._outcome = ("ended", "") if error is None else ("failed", str(error))
        self._stop.set()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
            if thread.is_alive():
                notice(f"{self._study.name}: {thread.name} takes too long; what is missing is logged by lcsc resume")

    def _run(self, name: str, part: _Part) -> None:
        last = False
        try:
            while not last:
                last = self._stop.wait(_LOOK_SECONDS)
                part(self._reader.read_study(self._study.name), last)
        except Exception as error:  # of other people's code and networks
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            notice(f"{self._study.name}: {name} failed and is left alone, the search goes on: {reason}")

    def _log(self, name: str, study: StudyHistory, last: bool) -> None:
        attributes = self._study.attributes
        known = (attributes.get(LOGGED) or {}).get(name) or {"run": None, "step": -1, "answer": [None, None]}
        new = {step: values for step, values in _curves(study).items() if step > known["step"]}
        answer = [study.chosen, study.held_out_loss if last else known["answer"][1]]  # images come after the report
        if new or answer != known["answer"]:
            if name not in self._runs:
                self._runs[name] = _TRACKERS[name](study, attributes.get("specification") or {}, known)
            run, step = self._runs[name], max([known["step"], *new])
            for number, values in new.items():
                run.log(number, values)
            if answer != known["answer"]:
                run.log(step, self._answer(study, report=last))
            known = {"run": run.key, "step": step, "answer": answer}
            with self._writing:
                self._study.set_attribute(LOGGED, {**(self._study.attributes.get(LOGGED) or {}), name: known})
        if last and name in self._runs:
            self._runs[name].close(study.ended)

    def _answer(self, study: StudyHistory, *, report: bool) -> _Values:
        """The answer's coefficients; with the report its metrics on held-out noise, and its images, next to EMA*'s."""
        found = self._reader.answer(study)
        values: dict[str, float | Image.Image] = {} if found is None else {"coefficients": _bars(study.steps, found)}
        if report and study.held_out is not None:
            for row in study.held_out.rows:
                name = "held_out/" + re.sub(r"[^\w.-]+", "_", row.metric)  # MLflow takes no other characters
                known = {name: row.value, f"{name}_of_EMA": row.baseline}
                values |= {name: value for name, value in known.items() if value is not None}
            for image in StoredImage.of_answer(self._reader, study, artifact_directory(self._study.storage.url)):
                whose = "answer" if image.caption.startswith(study.study) else "EMA"
                values[f"images/{whose}"] = Image.open(io.BytesIO(image.content)).convert("RGB")
        return values

    def _tell(self, notify: _Notify, study: StudyHistory, last: bool) -> None:
        """Say how the search ended, or that it has stalled: once, until something comes."""
        now, (status, text) = time.monotonic(), self._outcome
        longest = float(study.trials["seconds"].max(initial=0.0))
        if last and status:
            held_out = "" if study.held_out_loss is None else f", held-out {study.held_out_loss:.4g}"
            notify(study.study, status, study.searched, text or f"{study.evaluations} evaluations{held_out}")
        elif study.revision != self._seen:
            self._seen, self._since = study.revision, now
        elif now - self._since > max(_STALL_SECONDS, _STALL_TIMES * longest):
            notify(study.study, "stalled", study.searched, f"nothing came for {(now - self._since) / 60:.0f} minutes")
            self._since = math.inf


def _curves(study: StudyHistory) -> dict[int, dict[str, float]]:
    """Step, a trial's place among those told → ``loss`` and ``best_loss``, of each trial of the study's own.

    A loss that does not compare with others is left out, and so are results that wait for their turn.
    """
    found = study.compared
    waiting = study.trials["tell_index"][~is_finished(study.trials)]
    end = waiting.min(initial=np.iinfo(np.int64).max) if study.ordered else np.inf
    best = np.fmin.accumulate(found["loss"])
    own = ~found["inherited"] & (found["tell_index"] < end)
    columns = zip(found["tell_index"][own].tolist(), found["loss"][own].tolist(), best[own].tolist(), strict=True)
    values = {step: {"loss": loss, "best_loss": lowest} for step, loss, lowest in columns}
    return {step: {name: x for name, x in each.items() if math.isfinite(x)} for step, each in values.items()}


def _bars(steps: Sequence[int], coefficients: Floats) -> Image.Image:
    """A bar for each checkpoint, drawn without a browser; the mean over rows, if there are several.

    Args:
        steps: ``[K]``.
        coefficients: ``[K]`` or ``[S, K]``.
    """
    from lcsc_opt.views.figures.look import BLUE, VERMILLION  # and with it plotly

    values = coefficients.reshape(-1, len(steps)).mean(axis=0)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    heights = 20 + (high - np.array([low, high, 0.0, *values])) * (_HEIGHT - _MARGIN) / (high - low)
    edges = np.linspace(_MARGIN, _WIDTH - 10, len(steps) + 1)
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, zero = ImageDraw.Draw(picture), heights[2]
    for y, left, right in zip(heights[3:], edges[:-1], edges[1:], strict=True):
        box = [left, min(zero, y), max(left, right - 1), max(zero, y)]
        draw.rectangle(box, fill=BLUE if y < zero else VERMILLION)
    for value, y in ((low, heights[0]), (high, heights[1])):
        draw.text((5, y - 6), f"{value:.3g}", fill="black")
    text = f"coefficients of the checkpoints of steps {steps[0]:,} to {steps[-1]:,}"
    draw.text((_MARGIN, _HEIGHT - 25), text, fill="black")
    return picture
