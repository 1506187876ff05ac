"""Figures of a finished search, kept as artifacts of its best trial."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import RDBStorage

from lcsc_opt.analysis.comparison import Floats, StudySummary, best_ema, summaries
from lcsc_opt.analysis.figures import draw_coefficients, draw_comparison, draw_image_pairs, save
from lcsc_opt.analysis.names import is_search
from lcsc_opt.errors import StudyStoreError
from lcsc_opt.objective import Objective
from lcsc_opt.records import HELD_OUT
from lcsc_opt.study_store import StoredStudy, TrialKey

if TYPE_CHECKING:  # imports torch, which listing studies does not need
    from lcsc_opt.merge_sample_score import MergeSampleScore

IMAGE_PAIRS = "images.png"
PAIRS = 1000  # images drawn from either model
SHOWN = 40  # of them, those that differ most


def artifact_directory(url: str) -> Path:
    """Where the artifacts of a study database lie: beside an SQLite file, else in the working directory."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return Path(str(parsed.database)).with_suffix(".artifacts")
    return Path("lcsc.artifacts")


def attach_figures(storage: RDBStorage, study: StoredStudy, objective: Objective) -> list[str]:
    """Draw a study's figures and store them as artifacts of its chosen trial.

    Best-so-far curve and coefficients; where the objective samples images and EMA* is known, also image pairs.

    Returns:
        The names of the artifacts; a landscape, which is no search, has none.
    """
    if not is_search(study.name):
        return []
    experiment = study.name.rsplit("/", 2)[0]
    known = summaries(storage, experiment)
    own = next(summary for summary in known if summary.study == study.name)
    ema = best_ema(known)
    if own.best_trial is None:
        raise StudyStoreError(f"{study.name}: no complete trial to draw")
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            save(draw_comparison([s for s in (own, ema) if s is not None]), Path(folder) / "best_so_far.png"),
            save(draw_coefficients(own, ema), Path(folder) / "coefficients.png"),
        ]
        if ema is not None and ema.study != own.study and samples_images(objective):
            paths.append(_draw_pairs(_images_of(objective), ema, own, Path(folder) / IMAGE_PAIRS))
        _attach(storage, study, own.best_trial, paths)
        return [path.name for path in paths]


def _attach(storage: RDBStorage, study: StoredStudy, number: int, paths: list[Path]) -> None:
    folder = artifact_directory(storage.url)
    folder.mkdir(parents=True, exist_ok=True)
    trial = next(TrialKey.of(trial) for trial in study.trials() if trial.number == number)
    for path in paths:
        study.attach(trial, FileSystemArtifactStore(folder), path)


def copy_image_pairs(storage: RDBStorage, studies: Sequence[StudySummary], folder: Path) -> list[Path]:
    """Write the image pairs of each study's chosen trial, where there are any, as ``images-OPTIMIZER-SEED.png``."""
    store = FileSystemArtifactStore(artifact_directory(storage.url))
    written = []
    for study in studies:
        content = StoredStudy.open(storage, study.study).artifact(study.best_trial, store, IMAGE_PAIRS)
        if content is not None:
            path = folder / f"images-{study.optimizer}-{study.seed}.png"
            path.write_bytes(content)
            written.append(path)
    return written


def samples_images(objective: Objective) -> bool:
    """Whether the objective can show the images that a merged model samples."""
    return hasattr(objective, "images") and hasattr(objective, "features")


def _images_of(objective: Objective) -> MergeSampleScore:
    return objective  # type: ignore[return-value]  # samples_images was asked


def _draw_pairs(objective: MergeSampleScore, ema: StudySummary, found: StudySummary, path: Path) -> Path:
    """Image pairs from the same held-out noise, those farthest apart in the features first (App. E)."""
    assert ema.best_coefficients is not None
    assert found.best_coefficients is not None
    first = objective.images(ema.best_coefficients, HELD_OUT, PAIRS)
    second = objective.images(found.best_coefficients, HELD_OUT, PAIRS)
    distance = np.linalg.norm(objective.features(first) - objective.features(second), axis=1)
    shown = np.argsort(-distance, kind="stable")[:SHOWN]
    titles = (_title(ema), _title(found))
    return save(draw_image_pairs(_pixels(first, shown), _pixels(second, shown), titles), path)


def _title(study: StudySummary) -> str:
    value = study.searched if study.held_out is None else study.held_out
    kind = "searched" if study.held_out is None else "held out"
    return f"{study.label}: {value:.2f} {kind}"


def _pixels(images: Any, shown: Any) -> Floats:
    """``[N, C, H, W]`` in [-1, 1] → ``[n, H, W]`` or ``[n, H, W, 3]`` in [0, 1]."""
    chosen = (images[shown].permute(0, 2, 3, 1).double().numpy() + 1) / 2
    return np.asarray(chosen[..., 0] if chosen.shape[-1] == 1 else chosen)
