"""The contenders, the objectives and the numbers of images: the tables to edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from common import RESULTS

from lcsc_opt.base.study_file import StudyFile, parse_study_file

PER_EVALUATION = 1000
"""Images of one plain evaluation."""

LIMITS = (
    *(1_000, 2_000, 3_000, 5_000, 7_000, 10_000, 15_000, 20_000, 30_000, 50_000, 70_000),
    *(100_000, 150_000, 200_000, 300_000, 450_000, 600_000),
)
"""Numbers of images after which the answer of a search is looked at."""

SHARES = (100, 20, 10, 5, 2, 1)
"""Answers are also looked at after these parts of the budget: one hundredth, one twentieth, …"""

TRAINING_STEPS = {"digits": 4000, "digits_ddpm": 1000, "photographs": 3000}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One objective with K checkpoints, on which everything competes with the same number of images.

    Attributes:
        objective: the name of a model of ``objectives/trained.py``.
        checkpoints: K.
        images: the budget of a search.
        held_out: images on which an answer is measured.
        top: among how many trials ``lcsc run`` chooses on other noise after a search; 0 leaves that out.
        baselines: whether Nevergrad's general-purpose optimizers compete, too.
    """

    objective: str
    checkpoints: int
    images: int
    held_out: int = 10_000
    top: int = 0
    baselines: bool = False

    @property
    def name(self) -> str:
        """The name in the names of studies."""
        return f"{self.objective}-{self.checkpoints}"

    @property
    def checkpoint_every(self) -> int:
        """Training steps between two checkpoints."""
        return TRAINING_STEPS[self.objective] // self.checkpoints

    @property
    def title(self) -> str:
        """The title in tables and figures."""
        return f"{self.objective}, K = {self.checkpoints}"

    @property
    def limits(self) -> tuple[int, ...]:
        """The numbers of images after which answers are looked at, up to the whole budget."""
        shares = {self.images // share for share in SHARES}
        return tuple(sorted({limit for limit in LIMITS if limit <= self.images} | shares))


@dataclasses.dataclass(frozen=True)
class Contender:
    """One optimizer with its settings.

    Attributes:
        label: its name in tables; unique.
        optimizer: its name in the registry.
        options: of the optimizer.
        space: which coefficients it searches.
        share: of the budget; less than one for a search that ends by itself much earlier.
        random: whether another seed gives another search.
        baseline: competes only where a cell wants baselines.
    """

    label: str
    optimizer: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    space: Any = "affine"
    share: float = 1.0
    random: bool = True
    baseline: bool = False

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        """The seeds that give different searches."""
        return list(seeds) if self.random else list(seeds)[:1]


EMA = "EMAGrid"
PAPER = "LCSC"
GRADIENT = "LCSCGradient"

CELLS = (
    Cell("digits", 200, 600_000, top=5, baselines=True),
    Cell("digits", 50, 300_000),
    Cell("digits", 500, 300_000),
    Cell("photographs", 200, 100_000, held_out=2_000),
    Cell("digits_ddpm", 200, 60_000, held_out=2_000),
    Cell("photographs", 50, 100_000, held_out=2_000),
    Cell("photographs", 500, 100_000, held_out=2_000),
    Cell("digits_ddpm", 50, 60_000, held_out=2_000),
    Cell("digits_ddpm", 500, 60_000, held_out=2_000),
)
"""The most important cells come first. Compared with an image of a digit, a photograph costs three times as much, and
an image in ten steps of a solver six times as much.
"""

QUICK_CELLS = (Cell("digits", 50, 60_000, held_out=5_000, top=5, baselines=True),)

CONTENDERS = (
    Contender(EMA, "EMAGrid", random=False),
    Contender("Grid, power", "Grid", {"profile": "power"}, random=False),
    Contender(PAPER, "LCSC"),
    Contender(GRADIENT, GRADIENT, share=0.1),
    Contender(f"{GRADIENT}, layers", GRADIENT, space={"rows": "layers"}, share=0.1),
    Contender("LCSCQuadratic", "LCSCQuadratic"),
    Contender("CMA", "CMA"),
    Contender("LCSC, mutation 0.014", "LCSC", {"mutation": 0.014}, baseline=True),
    Contender("DE", "DE", baseline=True),
    Contender("OnePlusOne", "OnePlusOne", baseline=True),
)


def study_file(cell: Cell, contender: Contender, seed: int) -> StudyFile:
    """The study file of one search of a contender in a cell: an experiment whose report is of this search alone."""
    checkpoints = str(RESULTS / "models" / f"{cell.name}.trajectory")
    settings = {"checkpoints": checkpoints, "images": PER_EVALUATION, "loss": "fid"}
    content: dict[str, Any] = {
        "name": f"{cell.name}.{slug(contender.label)}.{seed}",
        "objective": {"file": "trained.py", "settings": settings},
        "space": contender.space,
        "optimizers": [{contender.optimizer: contender.options}],
        "seeds": [seed],
        "budget": {"images": max(round(cell.images * contender.share), PER_EVALUATION)},
    }
    if cell.top:
        content["held_out"] = {"images": cell.held_out, "top": cell.top}
    return parse_study_file(content, source="benchmark")


def slug(label: str) -> str:
    """A label as part of a study's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in label).strip("-")
