"""What a trial takes with folded extractors and the chosen layout, relative to neither, measured in turns.

    pip install '.[benchmarks]'
    python benchmarks/arithmetic.py [--turns 5] [--images 1000] [--threads 1 2] [--quick]
                                    [--cases flow check inception demo photographs search] [--evaluations 20]

``flow``: the U-Net of real.py in three Euler steps, layers, ``fdr`` in EfficientNet-Lite0's features, a gradient of 100
images, which are most trials of its search. ``check``: 256 images without a gradient, as averages and checks are.
``inception``: 32×32 images of the same network, ``--images`` of them, without a gradient, in the features of an
Inception with random weights. ``demo``: the model and the settings of studies/demo.yaml, a gradient of 100 images.
``photographs``: those of studies/photographs.yaml after a few steps of its training, ``--images`` images. Weights are
random but for the demo's: they change no time. ``search``: a whole short search of the flow, with its rehearsal, its
checks and its report, in this process (real.py searches with 70 evaluations or more).

Each turn evaluates the same candidate, or searches, once without folds in the contiguous layout, and once as a study
does. Written to ``results/arithmetic.md``, where the rows of what is not measured stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import yaml
from cifar import inception_weights
from common import RESULTS, ROOT, machine, markdown, parse
from real import FLOW_STEPS, SIDE, ImageNetFeatures, UNet, digits

import lcsc_opt
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.trajectory import TrajectoryWriter

CHECKPOINTS = 12
INCEPTION_SIDE = 32
REAL_IMAGES = 256
FEW_REAL_IMAGES = 16  # of Inception's reference
GRADIENT_IMAGES = 100
FOLDING = "lcsc_opt.metrics.extractors"
TRIAL_HEADER = (
    "",
    "threads",
    "layout",
    "processor time",
    "a trial",
    "in each turn",
    "seconds before",
    "sampling",
    "features",
)
SEARCH_HEADER = (
    "",
    "evaluations",
    "processor time",
    "time",
    "in each turn, of the processor",
    "processor seconds before",
)


class Unfolded(ImageNetFeatures):
    """Features that stay as they are, in other processes, too: folding begins with a copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse."""
        raise TypeError


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
        return load_objective(ObjectiveSpec(file="torch_module.py", settings=flow_settings(work, side, **settings)))

    def demo() -> Objective:
        settings = yaml.safe_load((ROOT / "studies" / "demo.yaml").read_text())["objective"]["settings"]
        return load_objective(ObjectiveSpec(file="mnist.py", settings={**settings, "images": GRADIENT_IMAGES}))

    def photographs() -> Objective:
        study = ROOT / "studies" / "photographs.yaml"
        command = study.read_text().partition("\n")[0].removeprefix("# lcsc ")
        for given, here in (
            ("studies/photographs.json", str(ROOT / "studies" / "photographs.json")),
            ("models/photographs.trajectory", str(work / "photographs.trajectory")),
            ("--steps 3000 --checkpoint-every 15", f"--steps {CHECKPOINTS} --checkpoint-every 1"),
        ):
            assert given in command
            command = command.replace(given, here)
        if not (work / "photographs.trajectory").exists():
            assert lcsc(shlex.split(command)) == 0
        settings = {**yaml.safe_load(study.read_text())["objective"]["settings"], "images": images}
        settings["checkpoints"] = str(work / "photographs.trajectory")
        return load_objective(ObjectiveSpec(file="trained.py", settings=settings))

    real = str(work / "digits.npz")
    few = str(work / "few.npz")
    inception = str(work / "inception.pth")
    torch.save(inception_weights(), inception)
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
            lambda: flow(INCEPTION_SIDE, reference=few, images=images, loss="fid", weights={"inception": inception}),
            images,
            gradient=False,
        ),
        "demo": Case(demo, GRADIENT_IMAGES, gradient=True),
        "photographs": Case(photographs, images, gradient=False),
    }


def flow_settings(work: Path, side: int, **settings: Any) -> dict[str, Any]:
    """Those of an objective of the flow."""
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
    return {**common, **settings}


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
    layout = after.fastest_layout(gradient=case.gradient)
    after.layout = layout
    pairs = []
    processor = []
    for _ in range(turns):
        start = time.process_time()
        cost_before = before.evaluate(candidate).cost
        middle = time.process_time()
        pairs.append((cost_before, after.evaluate(candidate).cost))
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


def searched(work: Path, evaluations: int, *, plainly: bool) -> tuple[float, float]:
    """Processor time of all processes, and time, of a whole search of the flow.

    Args:
        work: where the flow's checkpoints and real images are.
        evaluations: the budget.
        plainly: without folds, in the contiguous layout.
    """
    features = "arithmetic:Unfolded" if plainly else "real:ImageNetFeatures"
    reference = str(work / "digits.npz")
    settings = flow_settings(work, SIDE, reference=reference, images=REAL_IMAGES, loss=f"fdr@{features}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if plainly:
            stack.enter_context(mock.patch("lcsc_opt.sampling.layout.SECONDS_TO_SHORTEN", math.inf))
        start = time.perf_counter()
        processor_start = processor_seconds()
        lcsc_opt.run(
            {
                "name": "search",
                "objective": {"file": "torch_module.py", "settings": settings},
                "space": {"rows": "layers"},
                "optimizers": ["LCSCGradient"],
                "budget": {"evaluations": evaluations},
                "storage": f"sqlite:///{folder}/studies.db",
                "held_out": {"images": REAL_IMAGES, "top": 1},
            }
        )
        return processor_seconds() - processor_start, time.perf_counter() - start


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured_search(work: Path, evaluations: int, turns: int) -> list[str]:
    """Ratios of processor and wall-clock time, and the processor seconds before."""
    pairs = []
    for _ in range(turns):
        before = searched(work, evaluations, plainly=True)
        pairs.append((before, searched(work, evaluations, plainly=False)))
    processor = [after[0] / before[0] for before, after in pairs]
    return [
        f"{statistics.median(processor):.2f}",
        f"{statistics.median(after[1] / before[1] for before, after in pairs):.2f}",
        ", ".join(f"{ratio:.2f}" for ratio in processor),
        f"{statistics.median(before[0] for before, _ in pairs):.0f}",
    ]


def table(header: Sequence[str], rows: list[list[str]], written: str) -> list[str]:
    """The rows, and before them those of a table with as many columns in ``written`` that were not measured again."""
    measured_now = {tuple(row[:2]) for row in rows}
    kept = []
    for line in written.splitlines():
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        is_row = line.startswith("| ") and len(cells) == len(header) and cells[1].isdigit()
        if is_row and tuple(cells[:2]) not in measured_now:
            kept.append(cells)
    return markdown([header, *kept, *rows])


def main() -> None:
    """Measure, print the tables and write them."""
    of_trials = ("flow", "check", "inception", "demo", "photographs")
    names = (*of_trials, "search")
    arguments = parse(
        __doc__,
        small={"turns": 1, "images": 100, "threads": [1], "evaluations": 2},
        turns=5,
        images=1_000,
        evaluations=20,
        threads={"nargs": "+", "type": int, "default": [1, 2]},
        cases={"nargs": "+", "choices": names, "default": list(names)},
    )
    trials = []
    searches = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = cases(work, arguments.images)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for name in filter(of_trials.__contains__, arguments.cases):
                trials.append([name, str(threads), *measured(found[name], arguments.turns)])
                print(trials[-1], flush=True)
        torch.set_num_threads(1)
        if "search" in arguments.cases:
            ratios = measured_search(work, arguments.evaluations, arguments.turns)
            searches.append(["search", str(arguments.evaluations), *ratios])
            print(searches[-1], flush=True)
    path = RESULTS / "arithmetic.md"
    written = path.read_text() if path.exists() else ""
    text = "\n".join(
        [
            "# A trial with folded extractors and the chosen layout, relative to one without",
            "",
            f"{machine()}. Ratios are medians of the turns; several runs may have measured them. Those of "
            "processor time are the steadier ones where other work shared the machine.",
            "",
            *table(TRIAL_HEADER, trials, written),
            "",
            "A whole search of the flow, on one thread:",
            "",
            *table(SEARCH_HEADER, searches, written),
            "",
        ]
    )
    print(text)
    if not arguments.quick:
        path.write_text(text)


if __name__ == "__main__":
    main()
