"""The quality of single images while FID falls: one table of judges for the objectives of the study files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common import cell, markdown

from lcsc_opt.database.history import Standing
from reproduction.claims import OPTIMIZERS, Points
from reproduction.table import Where

KEPT = ", keep: precision"
OBJECTIVES: tuple[tuple[str, str, Where, str], ...] = (  # label, study file, point of the file, end of searches' names
    ("CM of digits, K = 200", "seeds", {}, ""),
    ("CM of digits, K = 50", "interval", {"interval": 2}, ""),
    ("DM of digits", "samples", {"checkpoints": 1, "images": 2}, ""),
    ("CM of photographs", "features", {"checkpoints": 2}, ""),
    ("CM of photographs", "keep", {"keep": 0}, KEPT),
)
JUDGES = ("precision", "recall")
TITLE = """## Single images

Not in the paper in this form: what no search looked at, on held-out noise, mean ± standard deviation over seeds of the
search. Precision and recall are better where they are higher. Searches with `keep: precision` were asked for EMA*'s
precision ([why](evaluation_metrics.md#without-a-weight-to-tune-keep)): `lcsc run paper/keep`."""


def judged_lines(found: Mapping[str, Points]) -> list[str]:
    """The lines of the section; empty if nothing was judged."""
    rows = [["objective", "search", "seeds", "FID", *JUDGES]]
    for label, study, where, how in OBJECTIVES:
        if study in found:
            rows += _rows(label, how, {name: [*found[study].at(where, name).values()] for name in OPTIMIZERS})
    return [*TITLE.splitlines(), "", *markdown(rows), ""] if len(rows) > 1 else []


def _rows(label: str, how: str, found: Mapping[str, Sequence[Standing]]) -> list[list[str]]:
    judged = {name: [study for study in studies if _judges(study)] for name, studies in found.items()}
    everyone = [study for studies in judged.values() for study in studies]
    if not everyone:
        return []
    known = [
        (None if study.held_out is None else study.held_out.ema(None), _judges(study, baseline=True))
        for study in everyone[:1]
    ]  # no chance
    rows = [] if how else [[label, "EMA*", "", *_cells(known)]]
    for name, studies in judged.items():
        if studies:
            cells = _cells([(_fid(study), _judges(study)) for study in studies])
            rows.append([label, f"{name}{how}", str(len(studies)), *cells])
    return rows


def _fid(study: Standing) -> float | None:
    """FID of the answer, without the penalty that a loss may have."""
    return None if study.held_out is None else study.held_out.found.metrics.get("fid", study.held_out.loss)


def _judges(study: Standing, *, baseline: bool = False) -> dict[str, float | None]:
    """Metric → value of the answer, or of EMA* on the same noise."""
    rows = () if study.held_out is None else study.held_out.rows
    return {row.metric: row.baseline if baseline else row.value for row in rows if row.metric in JUDGES}


def _cells(known: Sequence[tuple[float | None, Mapping[str, float | None]]]) -> list[str]:
    columns = [[loss for loss, _ in known], *([judges.get(name) for _, judges in known] for name in JUDGES)]
    known_values = ([value for value in column if value is not None] for column in columns)
    return [cell(values) if values else "–" for values in known_values]
