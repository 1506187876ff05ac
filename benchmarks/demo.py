"""The demo's study over three seeds: the table and the pictures that docs/start.md shows.

    python benchmarks/demo.py

Runs ``studies/digits.yaml`` with seeds 0, 1 and 2 in ``results/digits.db`` (after an interruption, the same command
continues), prints the comparison, writes ``results/digits.csv`` and ``results/digits.md``, and draws the pictures of
``docs/images/``.
"""

from __future__ import annotations

from pathlib import Path

from common import RESULTS, machine, parse, write_csv
from optuna.storages import RDBStorage

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import best_ema
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from lcsc_opt.views.figures.study import coefficients_figure
from lcsc_opt.views.figures.writing import write_figures
from lcsc_opt.views.ranking import Ranked, ranking
from lcsc_opt.views.report import write_report

SEEDS = (0, 1, 2)
IMAGES = Path(__file__).parents[1] / "docs" / "images"
METRICS = ("precision", "recall")
LOSSES = ("searched FID", "held-out FID")
COLUMNS = ("optimizer", "seeds", *LOSSES, *METRICS, "against EMA*", "evaluations", "images", "seconds")


def main() -> None:
    """Run what is missing, print, write, draw."""
    parse(__doc__)
    RESULTS.mkdir(exist_ok=True)
    url = f"sqlite:///{RESULTS / 'digits.db'}"
    seeds = [argument for seed in SEEDS for argument in ("--seed", str(seed))]
    if lcsc(["run", "digits", *seeds, "--storage", url]) != 0:
        raise SystemExit("the search failed")
    studies = HistoryReader(open_storage(url, write=False)).read("digits")
    rows = [[*study.as_row().values()] for study in studies]
    write_csv("digits", list(studies[0].as_row()), rows)
    header = [machine(), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines = [*header, *(line(summary) for summary in ranking(studies))]
    (RESULTS / "digits.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(open_storage(url, write=False))


def line(summary: Ranked) -> str:
    """One line of the table: mean ± sample standard deviation over seeds."""
    losses = [f"{mean:.2f} ± {spread or 0:.2f}" for mean, spread in (summary.searched, summary.held_out)]  # type: ignore[misc]
    below = "" if summary.below_ema is None else f"{100 * summary.below_ema:+.0f} %"
    metrics = [f"{mean:.3f} ± {spread or 0:.3f}" for mean, spread in map(summary.metrics.__getitem__, METRICS)]
    costs = [f"{summary.evaluations:.0f}", f"{summary.images:,.0f}", f"{summary.seconds:.0f}"]
    cells = [summary.label, str(summary.seeds), *losses, *metrics, below, *costs]
    return f"| {' | '.join(cells)} |"


def draw(storage: RDBStorage) -> None:
    """Draw the page's pictures, which needs Chrome or Chromium, and write a page with everything."""
    reader = HistoryReader(storage)
    studies = reader.read("digits")
    ema = best_ema(studies)
    found = next(study for study in studies if study.study == "digits/LCSCGradient/0")
    write_figures({IMAGES / "digits_coefficients.png": coefficients_figure(reader, [found], ema)})
    for image, name in zip(
        StoredImage.of_answer(reader, found, artifact_directory(storage.url)), ("ema", "found"), strict=True
    ):
        (IMAGES / f"digits_images_{name}.png").write_bytes(image.content)
    write_report(storage, "digits", RESULTS / "digits.html")


if __name__ == "__main__":
    main()
