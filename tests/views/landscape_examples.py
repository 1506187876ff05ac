"""Small landscapes, written as the runner writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.coefficients.plane import Plane, check_corners, grid_positions
from lcsc_opt.database.store import StoredStudy

STEPS = (100, 200, 300)
CORNERS = (100, 200, 300)


def bowl(x: float, y: float) -> float:
    """Lowest at (0.5, 1)."""
    return 1 + (x - 0.5) ** 2 + (y - 1) ** 2


def write_landscape(
    storage: RDBStorage,
    name: str = "digits/Landscape/0",
    *,
    loss: Callable[[float, float], float | None] = bowl,
    size: int = 3,
    margin: float = 0.5,
    corners: Any = CORNERS,
    points: int | None = None,
    products: Any = None,
    images: int = 10,
) -> StoredStudy:
    """A landscape of which ``points`` are evaluated; where the loss is ``None`` it failed."""
    options = {"corners": list(corners), "size": size, "margin": margin}
    planned = grid_positions(size, margin)
    attributes = {
        "steps": STEPS,
        "budget": {"evaluations": len(planned), "images": None},
        "specification": {"optimizer": {"name": "Landscape", "options": options}},
        "plane": {"space": "coefficients" if products is None else "weights", "products": products},
    }
    study = StoredStudy.open_or_create(storage, name, attributes)
    plane = Plane.through(check_corners(corners), STEPS)
    for number, (x, y) in enumerate(planned[:points].tolist()):
        key = study.add_candidate(Candidate(plane.at(x, y)))
        value = loss(x, y)
        if value is None:
            study.fail(key, [{"reason": "does not sample", "seconds": 0.1}], tell_index=number)
        else:
            study.finish(key, Evaluation(value, {"fid": value}, Cost(images=images)), tell_index=number)
    return study
