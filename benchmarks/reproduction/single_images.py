"""The quality of single images while FID falls: one table of judges for the objectives of the study files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common import cell, markdown

from lcsc_opt.database.history import Standing
from lcsc_opt.database.measurement import Measurement
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
    reports = [study.report for studies in found.values() for study in studies if study.report is not None]
    emas = [report.ema for report in reports[:1] if report.ema is not None]  # which no chance changes
    rows = [] if how else [[label, "EMA*", "", *_cells(emas)]]
    judged = 0
    for name, studies in found.items():
        measured = [study.found for study in studies if study.found is not None and _is_judged(study.found)]
        judged += len(measured)
        if measured:
            rows.append([label, f"{name}{how}", str(len(measured)), *_cells(measured)])
    return rows if judged else []


def _is_judged(measured: Measurement) -> bool:
    return any(name in measured.metrics for name in JUDGES)


def _cells(models: Sequence[Measurement]) -> list[str]:
    """FID, without the penalty that a loss may have, and the judges."""
    fids = [measured.metrics.get("fid", measured.loss) for measured in models]
    judges = [[measured.metrics[name] for measured in models if name in measured.metrics] for name in JUDGES]
    columns = [fids, *judges]
    return [cell(values) if values else "–" for values in columns]
