"""What ``make demo`` finds and how long it takes: the numbers and the picture of README.md and docs.

    python benchmarks/demo.py

Runs the demo's commands in ``results/demo.db``, and writes ``results/demo.md`` and ``docs/images/demo.png``. After an
interruption the same command continues; stages that are done cost seconds then.

``recognized`` is how many of the first 1,000 samples on the noise of reports a third classifier of digits names with a
probability above .9. It was trained on the digits that the model was trained on. Searches do not see it, nor do the
report and the choice of the answer.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from common import RESULTS, machine, markdown, parse
from optuna.storages import RDBStorage
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import lcsc_opt
from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.records import HELD_OUT, TRAINER_EMA
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import Standing, ema_grid
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.metrics.bundled_images import bundled_images
from lcsc_opt.metrics.extractors.bundled import SETTINGS
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.views.ranking import Row, ranking

PICTURE = RESULTS.parents[1] / "docs" / "images" / "demo.png"
METRICS = ("fid_held_out", "fid@cross_check", "precision", "recall")
COLUMNS = ("", "recognized", *METRICS, "held-out fdr", "against EMA*", "evaluations", "images", "seconds")
ONE_ROW = ("optimizers=[LCSC]", "space=affine", "budget.evaluations=60")
SAMPLES = 1_000
SHOWN = 64
SURE = 0.9  # the probability above which a sample counts as recognized
THIRD_SEED = 2  # of the classifier that recognizes; the first two are those of the loss and of the cross-check
GAP = 16  # pixels between the sheets of the picture
TITLE = 36  # pixels above each


def main() -> None:
    """Run what is missing, print, draw."""
    parse(__doc__)
    RESULTS.mkdir(exist_ok=True)
    url = f"sqlite:///{RESULTS / 'demo.db'}"
    run = ["run", "demo", "--storage", url]
    seconds = [
        measured("EMAGrid", lambda: lcsc([*run, "--optimizer", "EMAGrid"])),
        measured("LCSCGradient", lambda: lcsc([*run, "--optimizer", "LCSCGradient"])),
        measured("LCSC", lambda: lcsc([*run, *ONE_ROW])),
        measured("report", lambda: lcsc(["report", "demo", "--storage", url, "-o", str(RESULTS / "demo.html")])),
    ]
    storage = open_storage(url, write=False)
    samples = samples_of(storage, url)
    found = recognized(samples)
    studies = HistoryReader(storage).read("demo")
    ranked = ranking(studies)
    rows = [line(row, studies, found) for row in ranked]
    rows.append(["real digits, held out", f"{found['real']:,}", *[""] * (len(COLUMNS) - 2)])
    page = [
        "# The demo",
        "",
        f"`benchmarks/demo.py`, one seed. {machine()}.",
        "",
        *markdown([COLUMNS, *rows]),
        "",
        f"Recognized: of {SAMPLES:,} samples, those that a classifier that nothing else uses names with a probability "
        f"above {SURE}. `fid_held_out` is to real digits that no search saw, `fid@cross_check` in other features.",
        "",
        *markdown([["stage", "seconds", "CPU seconds"], *seconds]),
        "",
        "The first 64 samples on the noise of the report, not selected, with `fid_held_out`; held-out digits.",
        "",
        "![Last checkpoint, trainer's EMA, found, real](../../docs/images/demo.png)",
    ]
    print(*page, sep="\n")
    (RESULTS / "demo.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    # EMA* of this model is its last checkpoint
    shown = {EMA_GRID: LAST_CHECKPOINT, TRAINER_EMA: TRAINER_EMA, "LCSCGradient": "merged"}
    fid = {row.optimizer: cells[COLUMNS.index("fid_held_out")] for row, cells in zip(ranked, rows, strict=False)}
    sheets = {f"{title}: FID {fid[name]}": samples[name] for name, title in shown.items()}
    draw({**sheets, "real digits": samples["real"]})


def measured(stage: str, run: Callable[[], int]) -> list[str]:
    """The wall and CPU seconds of a stage, after which it prints nothing but its status is 0."""
    wall, cpu = time.perf_counter(), time.process_time()
    if run() != 0:
        raise SystemExit(f"{stage} failed")
    return [stage, f"{time.perf_counter() - wall:.0f}", f"{time.process_time() - cpu:.0f}"]


def samples_of(storage: RDBStorage, url: str) -> dict[str, Tensor]:
    """Model → its images ``[1000, 1, 16, 16]`` from the same noise; and ``real`` ones that are held out."""
    reader = HistoryReader(storage)
    studies = {study.optimizer: study for study in reader.read("demo")}
    objective = lcsc_opt.load_study("demo/LCSCGradient/0", url).objective
    one_row = lcsc_opt.load_study("demo/LCSC/0", url).objective
    ema = ema_grid(list(studies.values()))
    if ema is None or not isinstance(objective, MergeSampleScore) or not isinstance(one_row, MergeSampleScore):
        raise SystemExit("the demo has no EMA*")
    count = len(objective.steps)
    samples = {
        TRAINER_EMA: one_row.images(np.eye(count + 1)[-1], HELD_OUT, SAMPLES),
        EMA_GRID: one_row.images(answer_of(reader, ema), HELD_OUT, SAMPLES),
        "LCSC": one_row.images(answer_of(reader, studies["LCSC"]), HELD_OUT, SAMPLES),
        "LCSCGradient": objective.images(answer_of(reader, studies["LCSCGradient"]), HELD_OUT, SAMPLES),
    }
    held_out: slice = load_file(RESULTS.parents[1] / "objectives" / "mnist.py").HELD_OUT
    return samples | {"real": bundled_images("mnist")[0][held_out][:SAMPLES]}


def answer_of(reader: HistoryReader, study: object) -> npt.NDArray[np.float64]:
    """The coefficients of a study's answer."""
    answer = reader.answer(study)  # type: ignore[arg-type]
    if answer is None:
        raise SystemExit("a search of the demo has no answer")
    return answer


@torch.no_grad()
def recognized(samples: Mapping[str, Tensor]) -> dict[str, int]:
    """Model → how many of its images the third classifier names with certainty."""
    sys.path.append(str(RESULTS.parents[1]))
    from objectives.weights.train import classifier

    network = classifier(dataclasses.replace(SETTINGS["mnist"], seed=THIRD_SEED))
    counts = {}
    for name, images in samples.items():
        probabilities = network.head(network(images)).softmax(1).amax(1)
        counts[name] = int((probabilities > SURE).sum())
    return counts


def line(summary: Row, studies: Sequence[Standing], found: Mapping[str, int]) -> list[str]:
    """One line of the table."""
    report = studies[0].report
    models = {study.optimizer: study.found for study in studies}
    measured = None if report is None else models.get(summary.optimizer, report.measured(summary.optimizer))
    if report is None or measured is None or report.metrics.cross_check is None:
        raise SystemExit("the demo has no whole report")
    values = {metric.partition("@")[0]: value for metric, value in measured.metrics.items()}
    values["fid@cross_check"] = measured.metrics[report.metrics.cross_check]
    metrics = [f"{values[metric]:.3g}" for metric in METRICS]
    below = "" if summary.below_ema is None else f"{100 * summary.below_ema:+.0f} %"
    loss = "–" if summary.held_out is None else f"{summary.held_out[0]:.2f}"
    costs = [f"{summary.evaluations:.0f}", f"{summary.images:,.0f}", f"{summary.seconds:.0f}"]
    return [summary.label, f"{found[summary.optimizer]:,}", *metrics, loss, below, *costs]


def draw(sheets: Mapping[str, Tensor]) -> None:
    """Sheets of the first samples, side by side, each below its title."""
    drawn = {
        title: Image.open(io.BytesIO(contact_sheet(images[:SHOWN].numpy()))).convert("L")
        for title, images in sheets.items()
    }
    width, height = next(iter(drawn.values())).size
    picture = Image.new("L", (len(drawn) * (width + GAP) - GAP, height + TITLE), 255)
    pen = ImageDraw.Draw(picture)
    for place, (title, sheet) in enumerate(drawn.items()):
        left = place * (width + GAP)
        pen.text((left, 0), title, fill=0, font=ImageFont.load_default(size=0.7 * TITLE))
        picture.paste(sheet, (left, TITLE))
    picture.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
