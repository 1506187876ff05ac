"""What ``make demo`` runs, with the seconds of each stage; and the table and the pictures that docs/start.md shows.

    python benchmarks/demo.py

Runs the demo's commands in ``results/demo.db``, prints how long each takes, in wall time and in
CPU seconds, and the comparison, and writes the pictures of ``docs/images/``. After an interruption the same command
continues; stages that are done cost seconds then.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from common import RESULTS, machine, markdown, parse
from optuna.storages import RDBStorage

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.study.api import load_objective
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from lcsc_opt.views.ranking import Ranked, ranking

IMAGES = RESULTS.parents[1] / "docs" / "images"
METRICS = ("fid", "fid_held_out", "fid@cross_check", "precision", "recall")
LOSSES = ("searched fdr", "held-out fdr")
COLUMNS = ("optimizer", *LOSSES, *METRICS, "against EMA*", "evaluations", "images", "seconds")
ONE_ROW = ("optimizers=[LCSC]", "space=affine", "budget.evaluations=120")


def main() -> None:
    """Run what is missing, print, draw."""
    parse(__doc__)
    RESULTS.mkdir(exist_ok=True)
    url = f"sqlite:///{RESULTS / 'demo.db'}"
    run = ["run", "demo", "--storage", url]
    print(machine())
    seconds = [
        measured("letters, both networks", load),
        measured("EMAGrid", lambda: lcsc([*run, "--optimizer", "EMAGrid"])),
        measured("LCSCGradient", lambda: lcsc([*run, "--optimizer", "LCSCGradient"])),
        measured("LCSC", lambda: lcsc([*run, *ONE_ROW])),
        measured("report", lambda: lcsc(["report", "demo", "--storage", url, "-o", str(RESULTS / "demo.html")])),
    ]
    print(*markdown([["stage", "seconds", "CPU seconds"], *seconds]), sep="\n")
    storage = open_storage(url, write=False)
    print(*markdown([COLUMNS, *(line(summary) for summary in ranking(HistoryReader(storage).read("demo")))]), sep="\n")
    draw(storage)


def load() -> int:
    """Draw the letters, load the model and the networks of features: all that searches need first."""
    load_objective("demo")
    return 0


def measured(stage: str, run: Callable[[], int]) -> list[str]:
    """The wall and CPU seconds of a stage, after which it prints nothing but its status is 0."""
    wall, cpu = time.perf_counter(), time.process_time()
    if run() != 0:
        raise SystemExit(f"{stage} failed")
    return [stage, f"{time.perf_counter() - wall:.0f}", f"{time.process_time() - cpu:.0f}"]


def line(summary: Ranked) -> list[str]:
    """One line of the table."""
    losses = [shown(loss) for loss in (summary.searched, summary.held_out)]
    below = "" if summary.below_ema is None else f"{100 * summary.below_ema:+.0f} %"
    metrics = [f"{summary.metrics[name][0]:.3f}" for name in METRICS]
    costs = [f"{summary.evaluations:.0f}", f"{summary.images:,.0f}", f"{summary.seconds:.0f}"]
    return [summary.label, *losses, *metrics, below, *costs]


def shown(loss: tuple[float, float | None] | None) -> str:
    """A loss of the table; the last checkpoint has none that was searched."""
    return "–" if loss is None else f"{loss[0]:.2f}"


def draw(storage: RDBStorage) -> None:
    """Write the images that the page shows."""
    reader = HistoryReader(storage)
    studies = reader.read("demo")
    found = next(study for study in studies if study.study == "demo/LCSCGradient/0")
    sheets = StoredImage.of_answer(reader, found, artifact_directory(storage.url))
    for image, name in zip(sheets, ("ema", "found"), strict=True):
        (IMAGES / f"demo_images_{name}.png").write_bytes(image.content)


if __name__ == "__main__":
    main()
