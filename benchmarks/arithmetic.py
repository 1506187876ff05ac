"""What a trial takes with folded extractors and the chosen layout, relative to neither, measured in turns.

    pip install '.[benchmarks]'
    python benchmarks/arithmetic.py [--turns 5] [--images 1000] [--threads 1 2] [--cases flow check inception demo]
                                    [--quick]

``flow``: the U-Net of real.py in three Euler steps, layers, ``fdr`` in EfficientNet-Lite0's features, a gradient of 100
images, which are most trials of its search. ``check``: 256 images without a gradient, as averages and checks are.
``inception``: 32×32 images of the same network, ``--images`` of them, without a gradient, in the features of an
Inception with random weights. ``demo``: the model and the settings of studies/demo.yaml, a gradient of 100 images.
Weights are random but for the demo's: they change no time.

Each turn evaluates the same candidate once without folds in the contiguous layout, and once as a study does. Written
to ``results/arithmetic.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from common import RESULTS, ROOT, machine, markdown, parse
from real import FLOW_STEPS, SIDE, UNet, digits

from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.evaluation.base import evaluate_safely
from lcsc_opt.evaluation.layouts import fastest_layout
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.trajectory import TrajectoryWriter

CHECKPOINTS = 12
INCEPTION_SIDE = 32
REAL_IMAGES = 256
FEW_REAL_IMAGES = 16  # of Inception's reference
GRADIENT_IMAGES = 100
FOLDING = "lcsc_opt.metrics.extractors"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is evaluated, and of how many images."""

    build: Callable[[], Objective]
    images: int
    gradient: bool


@contextlib.contextmanager
def without_folds() -> Iterator[None]:
    """Extractors that are made or first called while this is open stay as they are."""
    with (
        mock.patch(f"{FOLDING}.published.fold"),
        mock.patch(f"{FOLDING}.by_name.folded", side_effect=lambda extractor, *_: extractor),
    ):
        yield


def cases(work: Path, images: int) -> Mapping[str, Case]:
    """All of them, by name."""
    pixels = ((digits()[0] + 1) * 127.5).round().to(torch.uint8)[:, 0, :, :, None].expand(-1, -1, -1, 3).numpy()
    np.savez(work / "digits.npz", arr_0=pixels[:REAL_IMAGES])
    few_pixels = np.pad(pixels[:FEW_REAL_IMAGES], ((0, 0), (2, 2), (2, 2), (0, 0)))  # of 28×28, to 32×32
    np.savez(work / "few.npz", arr_0=few_pixels)
    generator = torch.Generator().manual_seed(0)
    first = {name: tensor.clone() for name, tensor in UNet().state_dict().items()}
    with TrajectoryWriter(work / "flow.trajectory") as writer:
        for number in range(CHECKPOINTS):
            noise = {name: 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in first.items()}
            writer.append(number, {name: first[name] + noise[name] for name in first})

    def flow(side: int, **settings: Any) -> Objective:
        common: dict[str, Any] = {
            "checkpoints": str(work / "flow.trajectory"),
            "model": "real:UNet",
            "sampler": "real:sample_flow",
            "sampler_settings": {"steps": FLOW_STEPS},
            "nfe": FLOW_STEPS,
            "image_shape": [1, side, side],
            "held_out_metrics": [],
            "batch_size": 100,
        }
        return load_objective(ObjectiveSpec(file="torch_module.py", settings={**common, **settings}))

    def demo() -> Objective:
        settings = yaml.safe_load((ROOT / "studies" / "demo.yaml").read_text())["objective"]["settings"]
        return load_objective(ObjectiveSpec(file="mnist.py", settings={**settings, "images": GRADIENT_IMAGES}))

    real = str(work / "digits.npz")
    few = str(work / "few.npz")
    return {
        "flow": Case(
            lambda: flow(SIDE, reference=real, images=GRADIENT_IMAGES, loss="fdr@real:ImageNetFeatures"),
            GRADIENT_IMAGES,
            gradient=True,
        ),
        "check": Case(
            lambda: flow(SIDE, reference=real, images=REAL_IMAGES, loss="fdr@real:ImageNetFeatures"),
            REAL_IMAGES,
            gradient=False,
        ),
        "inception": Case(
            lambda: flow(INCEPTION_SIDE, reference=few, images=images, loss="fid@random"), images, gradient=False
        ),
        "demo": Case(demo, GRADIENT_IMAGES, gradient=True),
    }


def ready(case: Case) -> tuple[Objective, Candidate]:
    """The objective, and the candidate of its trials; the extractors have seen images."""
    objective = case.build()
    if case.gradient:
        objective.merge_in_rows("layers")
    coefficients = default_origin(objective.steps)
    groups = objective.layer_groups
    if groups is not None:
        coefficients = groups.in_rows(coefficients)
    yardstick = None
    if objective.fixed_average is not None:
        yardstick = objective.yardstick(objective.evaluate(Candidate(objective.fixed_average)))
    candidate = Candidate(
        coefficients, images=case.images, gradient=case.gradient, unbiased=case.gradient, yardstick=yardstick
    )
    warm = dataclasses.replace(candidate, rehearsal=True)
    objective.evaluate(warm)
    return objective, candidate


def measured(case: Case, turns: int) -> list[str]:
    """The layout that was chosen, ratios of processor and wall-clock time, and the seconds before."""
    with without_folds():
        before, candidate = ready(case)
    after, _ = ready(case)
    rehearsed = dataclasses.replace(candidate, rehearsal=True)
    layout = fastest_layout(after, lambda one: evaluate_safely(after, one), rehearsed).layout
    chosen = dataclasses.replace(candidate, layout=layout)
    pairs = []
    processor = []
    for _ in range(turns):
        start = time.process_time()
        cost_before = before.evaluate(candidate).cost
        middle = time.process_time()
        pairs.append((cost_before, after.evaluate(chosen).cost))
        processor.append((time.process_time() - middle) / (middle - start))
    cells = [layout, f"{statistics.median(processor):.2f}"]
    for stage in ("seconds", "sample_seconds", "features_seconds"):
        seconds = [(getattr(one, stage), getattr(other, stage)) for one, other in pairs]
        ratio = statistics.median(other / one for one, other in seconds)
        cells.append(f"{ratio:.2f}")
        if stage == "seconds":
            cells.append(", ".join(f"{other / one:.2f}" for one, other in seconds))
            cells.append(f"{statistics.median(one for one, _ in seconds):.2f}")
    return cells


def main() -> None:
    """Measure, print the table and write it."""
    names = ("flow", "check", "inception", "demo")
    arguments = parse(
        __doc__,
        small={"turns": 1, "images": 16, "threads": [1]},
        turns=5,
        images=1_000,
        threads={"nargs": "+", "type": int, "default": [1, 2]},
        cases={"nargs": "+", "choices": names, "default": list(names)},
    )
    header = [
        "",
        "threads",
        "layout",
        "processor time",
        "a trial",
        "in each turn",
        "seconds before",
        "sampling",
        "features",
    ]
    rows = [header]
    with tempfile.TemporaryDirectory() as folder:
        found = cases(Path(folder), arguments.images)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for name in arguments.cases:
                rows.append([name, str(threads), *measured(found[name], arguments.turns)])
                print(rows[-1], flush=True)
    title = "# A trial with folded extractors and the chosen layout, relative to one without"
    images = f"Inception: {arguments.images} images. Ratios are medians of {arguments.turns} turns."
    text = "\n".join([title, "", f"{machine()}. {images}", "", *markdown(rows), ""])
    print(text)
    if not arguments.quick:
        (RESULTS / "arithmetic.md").write_text(text)


if __name__ == "__main__":
    main()
