"""Stores images, figures, and a note for optuna-dashboard with a finished search."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from pathlib import Path

import numpy as np
import optuna
from optuna.storages import RDBStorage

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.errors import MissingPackageError, StudyStoreError
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.database.history import StudyHistory, best_ema
from lcsc_opt.database.names import EMA_GRID, is_search, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.views.artifacts import EMA_IMAGES, OWN_IMAGES, artifact_directory

PAIRS = 1000  # images drawn from either model
SHOWN = 40  # of them, those that differ most


def attach_figures(storage: RDBStorage, study: StoredStudy, objective: Objective) -> list[str]:
    """Store the figures and images of a finished search with it, for optuna-dashboard and for our own pages.

    They are the curve, the coefficients and a note. Where the objective samples images and EMA* is known, images of
    both models from the same noise are added, as artifacts of the chosen trial. A landscape, which is no search, is
    left as it is.

    Returns:
        The names of the artifacts.

    Raises:
        StudyStoreError: no trial is complete.
    """
    if not is_search(study.name):
        return []
    reader, grid = HistoryReader(storage), (split_name(study.name)[0], EMA_GRID)
    known = reader.read_studies(
        [name for name in reader.searches() if name == study.name or split_name(name)[:2] == grid]
    )
    own = next(other for other in known if other.study == study.name)
    if own.chosen is None or (found := reader.answer(own)) is None:
        raise StudyStoreError(f"{study.name}: no complete trial to draw")
    ema = best_ema(known)
    with contextlib.suppress(MissingPackageError):  # then nobody looks at them
        _save_into_optuna_dashboard(reader, own, ema)
    before = None if ema is None or ema.study == own.study else reader.answer(ema)
    if before is None or objective.sampler is None:
        return []
    from lcsc_opt.objective.merge_sample_score import MergeSampleScore

    if not isinstance(objective, MergeSampleScore):
        return []
    # of both models from the same held-out noise, those farthest apart in the features first (App. E)
    first, second = (objective.images(coefficients, HELD_OUT, PAIRS) for coefficients in (before, found))
    distance = np.linalg.norm(objective.features(first) - objective.features(second), axis=1)
    shown = np.argsort(-distance, kind="stable")[:SHOWN]
    images = {EMA_IMAGES: first, OWN_IMAGES.format(optimizer=own.optimizer): second}
    sheets = {name: contact_sheet(each[shown].numpy()) for name, each in images.items()}
    folder = artifact_directory(storage.url)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in sheets.items():
            path = Path(temporary) / name
            path.write_bytes(content)
            study.attach(own.chosen, folder, path)
    return list(sheets)


def _save_into_optuna_dashboard(reader: HistoryReader, own: StudyHistory, ema: StudyHistory | None) -> None:
    dashboard = import_extra("optuna_dashboard")
    from lcsc_opt.views.figures.study import own_figures

    lines = [f"Chosen: trial {own.chosen}. Searched {own.metric}: {own.searched:.4g}."]
    if own.held_out_loss is not None:
        lines.append(f"Held-out {own.metric}, on noise that decided nothing: {own.held_out_loss:.4g}.")
    if ema is not None and ema.held_out_loss is not None and ema.study != own.study:
        lines.append(f"{ema.label}, the best plain average: {ema.held_out_loss:.4g}.")
    lines.append(
        "Comparison of all optimizers: [/lcsc/compare](/lcsc/compare) where `lcsc dashboard` serves this page."
    )
    study = optuna.load_study(study_name=own.study, storage=reader.storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        studies = [own] if ema is None else [own, ema]
        drawn = own_figures(reader, own, studies, ("best_so_far", "coefficients"))
        for name, figure in drawn.items():
            dashboard.save_plotly_graph_object(study, figure, graph_object_id=name)
        dashboard.save_note(study, "\n\n".join(lines))
