"""The demo's study over three seeds: the table and the pictures that the README shows.

    python benchmarks/demo.py

Runs ``studies/digits.yaml`` with seeds 0, 1 and 2 in ``results/digits.db`` (interrupted, the same command
continues), prints the comparison, writes ``results/digits.csv`` and ``results/digits.md``, and draws the pictures of
``docs/images/``.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from common import RESULTS, machine, write_csv

from lcsc_opt.analysis.comparison import OptimizerSummary, over_seeds, summaries
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database import open_storage

SEEDS = (0, 1, 2)
IMAGES = Path(__file__).parents[1] / "docs" / "images"
HEADER = "| optimizer | seeds | searched FID | held-out FID | against EMA* | evaluations | images | seconds |"


def main() -> None:
    """Run what is missing, print, write, draw."""
    RESULTS.mkdir(exist_ok=True)
    url = f"sqlite:///{RESULTS / 'digits.db'}"
    seeds = [argument for seed in SEEDS for argument in ("--seed", str(seed))]
    if lcsc(["run", "digits", *seeds, "--storage", url]) != 0:
        raise SystemExit("the search failed")
    studies = summaries(open_storage(url, write=False), "digits")
    rows = [[*study.as_row().values()] for study in studies]
    write_csv("digits", list(studies[0].as_row()), rows)
    lines = [machine(), "", HEADER, "|---" * 8 + "|", *(line(summary) for summary in over_seeds(studies))]
    (RESULTS / "digits.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(url)


def line(summary: OptimizerSummary) -> str:
    """One line of the table: mean ± sample standard deviation over seeds."""
    losses = [f"{mean:.2f} ± {spread or 0:.2f}" for mean, spread in (summary.searched, summary.held_out)]  # type: ignore[misc]
    below = "" if summary.below_ema is None else f"{100 * summary.below_ema:+.0f} %"
    cells = [summary.label, summary.seeds, *losses, below, f"{summary.evaluations:.0f}", f"{summary.images:,.0f}"]
    return "| " + " | ".join(str(cell) for cell in [*cells, f"{summary.seconds:.0f}"]) + " |"


def draw(url: str) -> None:
    """The README's pictures."""
    names = {
        "best_so_far.png": "digits_best_so_far.png",
        "coefficients-LCSC-0.png": "digits_coefficients.png",
        "images-LCSC-0.png": "digits_images.png",
    }
    with tempfile.TemporaryDirectory() as folder:
        lcsc(["compare", "digits", "--storage", url, "--figures", folder])
        IMAGES.mkdir(parents=True, exist_ok=True)
        for drawn, name in names.items():
            shutil.copy(Path(folder) / drawn, IMAGES / name)


if __name__ == "__main__":
    main()
