"""Logs a study to experiment trackers (TensorBoard, W&B, …), and calls the user's function when the search ends.

Threads read the database, as the dashboard does, and log what is new. So resuming, workers and Ray need nothing of
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
from lcsc_opt.coefficients.layer_groups import mean_of_rows
from lcsc_opt.database.history import Floats, StudyHistory, is_finished
from lcsc_opt.database.names import LOGGED
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.artifacts import StoredImage, artifact_directory

_POLL_SECONDS = 10.0  # between two reads of the database
_FINISH_SECONDS = 60.0  # at the end of a search, for trackers that send over a network
# a search has stalled when nothing was new for both of these
_STALL_SECONDS = 1800.0
_STALL_TIMES = 10  # times the longest evaluation
_WIDTH = 900  # pixels, of the bar chart
_HEIGHT = 360
_MARGIN = 60

_Notify = Callable[[str, str, float | None, str], object]
_Values = Mapping[str, float | Image.Image]
_Task = Callable[[StudyHistory, bool], None]
"""Called with the study as it is now, and whether it is the last time."""
_Logged = Mapping[str, Any]
"""The stored state of a tracker: its ``run``, its last ``step``, and the trial and held-out loss of its ``answer``."""


class _TrackerRun(NamedTuple):
    """One study's run in a tracker.

    Attributes:
        key: by which a later process finds it.
        log: writes the values of a step.
        close: called with whether the search has ended.
    """

    key: str
    log: Callable[[int, _Values], object]
    close: Callable[[bool], object]


def _tensorboard(study: StudyHistory, _: Mapping[str, Any], logged: _Logged) -> _TrackerRun:
    """TensorBoard's event files.

    ``purge_step`` hides what a killed process, or a deleted study of the same name, wrote after the stored step.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = logged["run"] or str(Path("runs", study.study).absolute())
    writer = SummaryWriter(folder, purge_step=logged["step"] + 1)

    def log(step: int, values: _Values) -> None:
        for name, value in values.items():
            if isinstance(value, Image.Image):
                writer.add_image(name, np.asarray(value), step, dataformats="HWC")
            else:
                writer.add_scalar(name, value, step)
        writer.flush()

    return _TrackerRun(folder, log, lambda _: writer.close())


def _wandb(study: StudyHistory, settings: Mapping[str, Any], logged: _Logged) -> _TrackerRun:
    """Weights & Biases. The trial is a metric, since wandb's own steps must increase, and a crash may repeat trials."""
    wandb = import_extra("wandb")
    key = logged["run"] or uuid.uuid4().hex
    run = wandb.init(
        **_names(study, "WANDB_PROJECT"),
        config=dict(settings),
        id=key,
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(console="off"),
    )
    run.define_metric("*", step_metric="trial")

    def log(step: int, values: _Values) -> None:
        run.log({"trial": step, **_with_images(wandb.Image, values)})

    def close(ended: bool) -> None:
        run.finish(exit_code=int(not ended))

    return _TrackerRun(key, log, close)


def _trackio(study: StudyHistory, settings: Mapping[str, Any], logged: _Logged) -> _TrackerRun:
    """Trackio, which finds a run by its name."""
    trackio = import_extra("trackio")
    run = trackio.init(
        **_names(study, "TRACKIO_PROJECT"),
        config=dict(settings),
        resume="never" if logged["run"] is None else "allow",
        embed=False,
    )

    def log(step: int, values: _Values) -> None:
        run.log(_with_images(trackio.Image, values), step=step)

    return _TrackerRun(study.study, log, lambda _: run.finish())


def _names(study: StudyHistory, variable: str) -> dict[str, str]:
    project = os.environ.get(variable, "lcsc_opt")
    return {"project": project, "group": study.experiment, "name": study.study}


def _with_images(kind: Callable[[Image.Image], Any], values: _Values) -> dict[str, Any]:
    """The values, with images as the tracker's own kind of image."""
    converted: dict[str, Any] = dict(values)
    for name, value in values.items():
        if isinstance(value, Image.Image):
            converted[name] = kind(value)
    return converted


def _mlflow(study: StudyHistory, settings: Mapping[str, Any], logged: _Logged) -> _TrackerRun:
    """MLflow, through its client: the functions have one active run, which the objective may use."""
    client = import_extra("mlflow").MlflowClient()
    key = logged["run"]
    if key is None:
        key = client.create_run(_experiment_id(client, study.experiment), run_name=study.study).info.run_id
        client.log_dict(key, settings, "study.json")
    client.update_run(key, status="RUNNING")

    def log(step: int, values: _Values) -> None:
        for name, value in values.items():
            if isinstance(value, Image.Image):
                client.log_image(key, value, key=name, step=step)
            else:
                client.log_metric(key, name, value, step=step)

    def close(ended: bool) -> None:
        client.set_terminated(key, "FINISHED" if ended else "KILLED")

    return _TrackerRun(key, log, close)


def _experiment_id(client: Any, name: str) -> Any:
    """MLflow's id of the experiment of this name, which is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name)
    return experiment.experiment_id


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def check_reporting(log: Sequence[str], notify: str | None) -> _Notify | None:
    """Import what the keys ``log`` and ``notify`` of a study file name; gives the function.

    Raises:
        MissingPackageError: a tracker is not installed.
        StudySpecError: the function cannot be imported.
    """
    for name in log:
        import_extra(name)
    if notify is None:
        return None
    return import_dotted(notify, setting="notify", error=StudySpecError)


class Reporting:
    """Logs a study, and calls the user's function about it, while this is open.

    Each tracker, and the function, has a thread, which ends at its first error and prints that as a notice.

    Args:
        study: locked by the caller, or finished.
        log: the names of the trackers.
        notify: ``module:function``. It gets the study's name, ``ended``, ``failed`` or ``stalled``, the lowest loss of
            the search, and a line of text.

    Raises:
        LcscError: as :func:`check_reporting`.
    """

    def __init__(self, study: StoredStudy, log: Sequence[str], notify: str | None) -> None:
        # not the caller's object, which caches what it has read
        self._study = StoredStudy(study.storage, study.name, study.key)
        self._reader = HistoryReader(study.storage)
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._outcome = ("", "")  # how the search ended, and the error's text; empty after an interruption
        self._last_revision = -1
        self._last_change = 0.0
        self._runs: dict[str, _TrackerRun] = {}
        tasks: dict[str, _Task] = {name: functools.partial(self._log, name) for name in log}
        function = check_reporting(log, notify)
        if function is not None:
            tasks["notify"] = functools.partial(self._notify, function)
        self._threads = []
        for name, task in tasks.items():
            self._threads.append(threading.Thread(target=self._run, args=(name, task), name=name, daemon=True))

    def __enter__(self) -> Reporting:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Log the rest, within a minute. After an interruption the outcome stays empty: the study can be resumed."""
        if error is None:
            self._outcome = ("ended", "")
        elif isinstance(error, Exception):
            self._outcome = ("failed", str(error))
        self._stop.set()
        deadline = time.monotonic() + _FINISH_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
            if thread.is_alive():
                notice(f"{self._study.name}: {thread.name} is too slow; lcsc resume logs what is missing")

    def _run(self, name: str, task: _Task) -> None:
        """Call the task again and again, and a last time when the search is over."""
        is_last = False
        try:
            while not is_last:
                is_last = self._stop.wait(_POLL_SECONDS)
                task(self._reader.read_study(self._study.name), is_last)
        except Exception as error:  # of other people's code and networks
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            notice(f"{self._study.name}: {name} failed and is switched off, the search continues: {reason}")

    def _log(self, name: str, study: StudyHistory, is_last: bool) -> None:
        """Log what a tracker does not have yet, and store the last step that it has."""
        attributes = self._study.attributes
        all_logged = attributes.get(LOGGED) or {}
        logged = all_logged.get(name) or {"run": None, "step": -1, "answer": [None, None]}
        new_values = {step: values for step, values in _curves(study).items() if step > logged["step"]}
        # the images of the answer are stored after its report, so they are complete only at the end
        held_out_loss = study.held_out_loss if is_last else logged["answer"][1]
        answer = [study.chosen, held_out_loss]
        if new_values or answer != logged["answer"]:
            if name not in self._runs:
                self._runs[name] = _TRACKERS[name](study, attributes.get("specification") or {}, logged)
            run = self._runs[name]
            for step, values in new_values.items():
                run.log(step, values)
            last_step = max([logged["step"], *new_values])
            if answer != logged["answer"]:
                run.log(last_step, self._answer(study, with_report=is_last))
            self._store(name, {"run": run.key, "step": last_step, "answer": answer})
        if is_last and name in self._runs:
            self._runs[name].close(study.ended)

    def _store(self, name: str, logged: _Logged) -> None:
        with self._writing:  # other trackers' entries stay as they are
            all_logged = dict(self._study.attributes.get(LOGGED) or {})
            all_logged[name] = logged
            self._study.set_attribute(LOGGED, all_logged)

    def _answer(self, study: StudyHistory, *, with_report: bool) -> _Values:
        """The answer's coefficients; with the report also its held-out metrics and images, and those of EMA*."""
        values: dict[str, float | Image.Image] = {}
        coefficients = self._reader.answer(study)
        if coefficients is not None:
            values["coefficients"] = _bar_chart(study.steps, mean_of_rows(coefficients))
        if not with_report or study.held_out is None:
            return values
        for row in study.held_out.rows:
            name = "held_out/" + re.sub(r"[^\w.-]+", "_", row.metric)  # MLflow allows no other characters
            if row.value is not None:
                values[name] = row.value
            if row.baseline is not None:
                values[f"{name}_of_EMA"] = row.baseline
        for stored in StoredImage.of_answer(self._reader, study, artifact_directory(self._study.storage.url)):
            model = "answer" if stored.is_answer else "EMA"
            values[f"images/{model}"] = Image.open(io.BytesIO(stored.content)).convert("RGB")
        return values

    def _notify(self, function: _Notify, study: StudyHistory, is_last: bool) -> None:
        """Tell the user's function how the search ended, or that it has stalled: once, until a new result."""
        status, text = self._outcome
        if is_last and status:
            function(study.study, status, study.searched, text or _summary(study))
            return
        now = time.monotonic()
        if study.revision != self._last_revision:
            self._last_revision = study.revision
            self._last_change = now
            return
        longest = float(study.trials["seconds"].max(initial=0.0))
        waited = now - self._last_change
        if waited > max(_STALL_SECONDS, _STALL_TIMES * longest):
            function(study.study, "stalled", study.searched, f"no result for {waited / 60:.0f} minutes")
            self._last_change = math.inf


def _summary(study: StudyHistory) -> str:
    """One line about a search that has ended."""
    line = f"{study.evaluations} evaluations"
    if study.held_out_loss is not None:
        line += f", held-out {study.held_out_loss:.4g}"
    return line


def _curves(study: StudyHistory) -> dict[int, dict[str, float]]:
    """Step, a trial's number → ``loss`` and ``best_loss``, of each trial of the study's own.

    A loss that does not compare with others is left out, and so are results that wait for their turn.
    """
    trials = study.compared
    best_losses = np.fmin.accumulate(trials["loss"])
    unfinished = study.trials["number"][~is_finished(study.trials)]
    first_waiting = unfinished.min(initial=np.iinfo(np.int64).max)
    is_shown = ~trials["inherited"] & (trials["number"] < first_waiting)
    curves = {}
    for step, loss, best_loss in zip(
        trials["number"][is_shown].tolist(),
        trials["loss"][is_shown].tolist(),
        best_losses[is_shown].tolist(),
        strict=True,
    ):
        values = {"loss": loss, "best_loss": best_loss}
        curves[step] = {name: value for name, value in values.items() if math.isfinite(value)}
    return curves


def _bar_chart(steps: Sequence[int], coefficients: Floats) -> Image.Image:
    """A bar for each checkpoint, drawn without a browser.

    Args:
        steps: ``[K]``.
        coefficients: ``[K]``.
    """
    from lcsc_opt.views.figures.theme import BLUE, VERMILLION  # and with it plotly

    lowest = min(coefficients.min(), 0.0)
    highest = max(coefficients.max(), 0.0)

    def height(value: Any) -> Any:  # in pixels from the top
        return 20 + (highest - value) * (_HEIGHT - _MARGIN) / (highest - lowest)

    chart = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(chart)
    edges = np.linspace(_MARGIN, _WIDTH - 10, len(steps) + 1)
    zero = height(0.0)
    for y, left_edge, right_edge in zip(height(coefficients), edges[:-1], edges[1:], strict=True):
        color = BLUE if y < zero else VERMILLION
        draw.rectangle([left_edge, min(zero, y), max(left_edge, right_edge - 1), max(zero, y)], fill=color)
    for value in (lowest, highest):
        draw.text((5, height(value) - 6), f"{value:.3g}", fill="black")
    caption = f"coefficients of the checkpoints of steps {steps[0]:,} to {steps[-1]:,}"
    draw.text((_MARGIN, _HEIGHT - 25), caption, fill="black")
    return chart
