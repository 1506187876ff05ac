"""What the length of the first step decides, on the demo's model: given lengths, and the one that a search finds.

    python benchmarks/first_step.py [--budget 40] [--quick]

Searches the digits' DDPM of README.md in eight steps of DPM-Solver++, along the gradient, with ``step_size`` from
.00625 to .2, and with the length that the search finds. Writes results/first_step.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import optuna
from common import RESULTS, ROOT, machine, markdown, parse
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.base.catalog import load_file

LENGTHS: tuple[float | None, ...] = (0.00625, 0.0125, 0.05, 0.2, None)
HEADER = ("step_size", "held-out loss", "FID", "FID of real images that no search saw", "checks during the search")


def sample(network: nn.Module, noise: Tensor) -> Tensor:
    """Eight steps of DPM-Solver++."""
    scheduler: Any = DPMSolverMultistepScheduler()  # type: ignore[no-untyped-call]  # theirs has no types
    scheduler.set_timesteps(8)
    for time in scheduler.timesteps:
        noise = scheduler.step(network(noise, time), time, noise).prev_sample
    return noise


def searched(length: float | None, budget: int, folder: Path) -> list[str]:
    """A line of the table."""
    network = load_file(ROOT / "objectives" / "mnist.py").network
    options: dict[str, Any] = {} if length is None else {"step_size": length}
    storage = f"sqlite:///{folder / 'studies.db'}"
    result = lcsc_opt.search(
        str(ROOT / "objectives" / "weights" / "mnist.trajectory"),
        build=network,
        sample=sample,
        image_shape=(1, 16, 16),
        reference="mnist",
        loss="fdr@mnist",
        images=500,
        held_out=2000,
        budget=budget,
        optimizers=[{"EMAGrid": {}}, {"LCSCGradient": options}],
        storage=storage,
        name=f"first-step-{length}",
    )
    answer = answer_of(optuna.load_study(study_name=result.name, storage=storage))
    study = optuna.load_study(study_name=result.studies[-1].name, storage=storage)
    checks = [f"{trial.value:.2f}" for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])]
    metrics = answer.user_attrs["metrics"]
    name = "found" if length is None else f"{length:g}"
    numbers = [answer.value or 0.0, metrics["fid@mnist"], metrics["fid_held_out@mnist"]]
    return [name, *(f"{number:.3g}" for number in numbers), " ".join(checks)]


def answer_of(experiment: optuna.Study) -> optuna.trial.FrozenTrial:
    """The trial that measured the answer on the noise of reports."""
    chosen = experiment.user_attrs["chosen"]
    key = chosen["models"][chosen["answer"]]["key"]
    images = chosen["parts"][0]["images"]
    complete = experiment.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    [found] = [
        trial
        for trial in complete
        if trial.user_attrs["model"]["key"] == key and trial.user_attrs.get("images", 0) == images
    ]
    return found


def main() -> None:
    """Search and write."""
    arguments = parse(__doc__, budget=40, small={"budget": 12})
    with tempfile.TemporaryDirectory() as folder:
        lines = [searched(length, arguments.budget, Path(folder)) for length in LENGTHS]
    text = "\n".join(["# The length of the first step", "", machine(), "", *markdown([list(HEADER), *lines]), ""])
    print(text)
    if not arguments.quick:
        (RESULTS / "first_step.md").write_text(text)


if __name__ == "__main__":
    main()
