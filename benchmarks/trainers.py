"""Trainers that nobody here wrote: from their folders to a model that they load again.

    python benchmarks/trainers.py --work FOLDER [--only NAME]

Each trainer gets an environment of its own below ``--work`` and trains for about a minute on tiny data (the files of
``trainers/``; nothing is downloaded but packages). Then ``lcsc init``, ``run`` and ``export`` are typed, as a user
would; the lines that ``init`` asks for are filled in with the answers below. The trainer evaluates its last checkpoint
and the export, which is the experiment's answer. Environments and trained models are kept; a second call does the rest
again.
Writes results/trainers.md; with ``--only``, that trainer's rows in it.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from common import RESULTS, ROOT, machine, markdown, parse

from lcsc_opt.base.jackknife import half_width
from lcsc_opt.base.study_file import FILL_IN
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.connection import reading
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.database.reader import HistoryReader

FILES = Path(__file__).parent / "trainers"
CONSTRAINTS = ROOT / "constraints.txt"
TOLERANCE = 0.01
START = ("-c", "import runpy, sys, tiny; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')")
"""``tiny`` comes first: it allows a torchvision that does not fit this torch."""
EXPLANATION = """Each in an environment of its own, on tiny data. The last checkpoint's number is
the trainer's own evaluation, ours the row `last checkpoint`: they agree within 1 %, or, where images are sampled anew,
if ours lies where 95 % of its evaluations would. Where the first try failed, the row is of the second, after what the
column names was mended. What the search found, and the answer that `lcsc export EXPERIMENT`
writes, are against the last checkpoint and EMA\\*, held out, by ours; the trainer evaluated the answer. Below zero is
better, above zero for a positive score that is maximized. A warning is what `lcsc` said of what was found."""
HEADER = (
    "trainer",
    "version, day",
    "first try",
    "`init` asks for",
    "its number of the last checkpoint",
    "ours",
    "they agree",
    "found against last",
    "the answer",
    "answer against last",
    "answer against EMA\\*",
    "answer against last, by its evaluation",
    "warned",
)


class StoppedError(Exception):
    """A command did not do what it should; the text says what it said."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One of them.

    Attributes:
        name: of its package.
        file: in ``trainers/``, without its suffix.
        kind: what ``lcsc init`` calls its checkpoints.
        last: the last checkpoint, as the trainer's loader takes it.
        export: where the found model is written.
        answers: key → value, of the lines that ``lcsc init`` asks for.
        checkpoints: what ``lcsc init`` is given, relative to the folder of the run.
        run: the overrides of ``lcsc run``.
        needs: further requirements.
        unpinned: packages that it needs in other versions than those of ``constraints.txt``.
        mended: what went wrong when it was first tried, if something did.
    """

    name: str
    file: str
    kind: str
    last: str
    export: str
    answers: Mapping[str, str]
    checkpoints: str = "runs"
    run: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    unpinned: tuple[str, ...] = ()
    mended: str = ""


def score(file: str, *, loss: str = "loss", **further: str) -> dict[str, str]:
    """The answers for a score."""
    answers = {"model": f"{file}:build", "score": f"{file}:{loss}", "maximize": "false", "size": "null"}
    return {**answers, **further}


def images(file: str) -> dict[str, str]:
    """The answers for a network with a sampler that runs without gradients."""
    return {
        "model": f"{file}:build",
        "sampler": f"{file}:sample",
        "image_shape": "[1, 8, 8]",
        "reference": "images",
    }


def key(average: str) -> str:
    """The override that searches the averages, with which the trainer's loader samples, and not the raw weights."""
    return f"objective.settings.key={average}"


SHORT = ("budget.evaluations=60",)
SMALL_IMAGES = (
    "budget.evaluations=40",
    "objective.settings.images=500",
    "held_out.images=2000",
    "objective.settings.loss={fid@tiny:Pixels: 1}",
)
TRAINERS = (
    Trainer(
        "diffusers",
        "diffusers_unconditional_digits",
        kind="diffusers",
        last="runs/checkpoint-800/unet_ema",
        export="best",
        answers={"reference": "images"},
        run=(*SMALL_IMAGES, "objective.settings.sampler.steps=20", key("unet_ema")),
        needs=("accelerate",),
    ),
    Trainer(
        "transformers",
        "transformers_text",
        kind="score",
        last="runs/checkpoint-500",
        export="best",
        answers={
            "score": "language_model:loss",
            "maximize": "false",
            "size": "200",
        },
        run=SHORT,
        needs=("accelerate",),
        copies=("studies/any_weights/language_model.py",),
    ),
    Trainer(
        "trl",
        "trl_text",
        kind="score",
        last="runs/checkpoint-240",
        export="best",
        answers=score("trl_text"),
        run=SHORT,
        needs=("peft",),
    ),
    Trainer(
        "denoising-diffusion-pytorch",
        "denoising_diffusion",
        kind="module",
        last="runs/model-20.pt",
        export="model-21.pt",
        answers=images("denoising_diffusion"),
        run=(*SMALL_IMAGES, key("ema.ema_model")),
    ),
    Trainer(
        "rectified-flow-pytorch",
        "rectified_flow",
        kind="module",
        last="runs/checkpoint.500.pt",
        export="best.pt",
        answers=images("rectified_flow"),
        run=(*SMALL_IMAGES, key("ema_model.ema_model")),
    ),
    Trainer(
        "pytorch-lightning",
        "pytorch_lightning_digits",
        kind="score",
        last="runs/epoch=9-step=300.ckpt",
        export="best.ckpt",
        answers=score("pytorch_lightning_digits"),
        run=SHORT,
    ),
    Trainer(
        "timm",
        "timm_digits",
        kind="score",
        last="runs/checkpoint-19.pth.tar",
        export="best.pth.tar",
        answers=score("timm_digits"),
        run=(*SHORT, key("state_dict_ema")),
    ),
    Trainer(
        "ultralytics",
        "ultralytics_digits",
        kind="score",
        checkpoints="runs/weights",
        last="runs/weights/epoch11.pt",
        export="best.pt",
        answers=score("ultralytics_digits", loss="accuracy", maximize="true"),
        run=("budget.evaluations=30",),
    ),
    Trainer(
        "k-diffusion",
        "k_diffusion_digits",
        kind="module",
        last="runs/model_00000600.pth",
        export="best.pth",
        answers=images("k_diffusion_digits"),
        run=(*SMALL_IMAGES, key("model_ema")),
    ),
    Trainer(
        "flow-matching",
        "flow_matching_digits",
        kind="module",
        last="runs/checkpoint-23.pth",
        export="best.pth",
        answers=images("flow_matching_digits"),
        run=SMALL_IMAGES,
    ),
    Trainer(
        "torchcfm",
        "torchcfm_digits",
        kind="module",
        last="runs/otcfm_cifar10_weights_step_960.pt",
        export="best.pt",
        answers=images("torchcfm_digits"),
        run=(*SMALL_IMAGES, key("ema_model")),
    ),
    Trainer(
        "imagen-pytorch",
        "imagen_digits",
        kind="module",
        last="runs/checkpoint.600.pt",
        export="best.pt",
        answers=images("imagen_digits"),
        run=(*SMALL_IMAGES, key("ema.0.ema_model")),
    ),
    Trainer(
        "torch",
        "torch_distributed_digits",
        kind="score",
        last="runs/step_300",
        export="best.pt",
        answers=score("torch_distributed_digits"),
        run=SHORT,
    ),
    Trainer(
        "rectified-flow",
        "rectified_flow_digits",
        kind="module",
        last="runs/checkpoint-640",
        export="best/unet_model.pt",
        answers=images("rectified_flow_digits"),
        run=(*SMALL_IMAGES, "budget.evaluations=20"),
    ),
    Trainer(
        "azula",
        "azula_digits",
        kind="module",
        last="runs/denoiser_00640.pt",
        export="best.pt",
        answers=images("azula_digits"),
        run=(*SMALL_IMAGES, key("averaged.module")),
    ),
    Trainer(
        "scvi-tools",
        "scvi_digits",
        kind="score",
        last="runs",
        export="best/model.pt",
        answers=score("scvi_digits", loss="elbo", maximize="true"),
        run=("budget.evaluations=20",),
        mended="the export lacked its arrays, and `load` failed",
    ),
    Trainer(
        "stable-baselines3",
        "stable_baselines3_cartpole",
        kind="score",
        last="runs/rl_model_16000_steps.zip",
        export="best.zip",
        answers=score("stable_baselines3_cartpole", loss="reward", maximize="true"),
        run=("budget.evaluations=30",),
        mended="`init` found no checkpoint in zip files",
    ),
    Trainer(
        "tianshou",
        "tianshou_cartpole",
        kind="score",
        last="runs/checkpoint_16.pth",
        export="best.pth",
        answers=score("tianshou_cartpole", loss="reward", maximize="true"),
        run=("budget.evaluations=15",),
        unpinned=("pandas", "filelock", "virtualenv"),
        mended="pip refused it beside lcsc_opt (filelock); `init` and `run` refused states among the weights",
    ),
    Trainer(
        "sentence-transformers",
        "sentence_transformers_text",
        kind="score",
        last="runs/checkpoint-160",
        export="best",
        answers=score("sentence_transformers_text", loss="accuracy", maximize="true"),
        run=("budget.evaluations=20",),
        needs=("accelerate", "datasets"),
        mended="the export lacked its modules, and was loaded with another pooling",
    ),
)


class Place:
    """The folder of a trainer's run, and the environment that its commands run in."""

    def __init__(self, trainer: Trainer, work: Path) -> None:
        self.trainer = trainer
        self.folder = work / "runs" / trainer.name
        self.environment = work / "environments" / trainer.name
        self.log = self.folder / "log.txt"

    def install(self) -> None:
        """Make the environment, unless it is there; torch comes first and by pip, as in ``make setup``."""
        done = self.environment / "installed.txt"  # written when all is installed
        if done.exists():
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.environment], check=True)
        python = self.environment / "bin/python"
        torch = re.search(r"^torch==\S+", CONSTRAINTS.read_text(), re.M)
        assert torch is not None
        names = tuple(f"{name}==" for name in self.trainer.unpinned)
        pins = self.environment / CONSTRAINTS.name
        pins.write_text("\n".join(line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith(names)))
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(pins)]
        subprocess.run([*pip, torch[0]], check=True)
        subprocess.run([*pip, "-e", ROOT, self.trainer.name, *self.trainer.needs], check=True)
        done.touch()

    def version(self) -> str:
        """The trainer's."""
        packages = [str(path) for path in self.environment.glob("lib/python*/site-packages")]
        [found] = importlib.metadata.distributions(name=self.trainer.name, path=packages)
        return found.version

    def train(self) -> None:
        """Train, unless that is done."""
        done = self.folder / "trained.txt"
        if done.exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        # none of the others: one is called as the package of another trainer
        copies = [FILES / "tiny.py", FILES / f"{self.trainer.file}.py", *(ROOT / path for path in self.trainer.copies)]
        for path in copies:
            shutil.copy(path, self.folder)
        self.run("python", *START, f"{self.trainer.file}.py", "train")
        done.touch()

    def evaluated(self, *paths: str) -> list[list[float]]:
        """The trainer's own evaluation of each model, once or several times."""
        printed = self.run("python", *START, f"{self.trainer.file}.py", "evaluate", *paths)
        numbers: list[list[float]] = json.loads(printed.splitlines()[-1])
        return numbers

    def run(self, program: str, *arguments: str) -> str:
        """Run a program of the environment in the folder; what it prints is in ``log.txt``, too.

        Raises:
            StoppedError: it failed.
        """
        done = subprocess.run(
            [self.environment / "bin" / program, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        with self.log.open("a") as log:
            log.write(f"$ {program} {' '.join(arguments)}\n{done.stdout}{done.stderr}\n")
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise StoppedError(f"{program} {arguments[0]}: {said[-1] if said else done.returncode}")
        return done.stdout


def fill_in(study_file: Path, answers: Mapping[str, str]) -> list[str]:
    """Answer what ``lcsc init`` asks for; returns the keys that it left open, and raises where there is no answer."""
    asked = []
    filled = []
    for line in study_file.read_text().splitlines():
        found = re.fullmatch(rf"( *)(\w+): {FILL_IN}.*", line)
        if found is not None:
            key = found[2]
            if key not in answers:
                raise StoppedError(f"init asks for {key}, which has no answer here")
            asked.append(key)
            line = f"{found[1]}{key}: {answers[key]}"
        filled.append(line)
    study_file.write_text("\n".join([*filled, ""]))
    return asked


@dataclasses.dataclass(frozen=True)
class Losses:
    """What the reports of an experiment have, on held-out data.

    Attributes:
        last, ema, found, answer: the losses of the last checkpoint, EMA*, the search's own best and the answer.
        name: of the answer.
        warnings: of the report.
        sign: −1 for a score that is maximized, else 1.
    """

    last: float
    ema: float
    found: float
    answer: float
    name: str
    warnings: tuple[str, ...]
    sign: int

    @classmethod
    def read(cls, place: Place, experiment: str) -> Losses:
        """From the database of the run."""
        with reading(f"sqlite:///{place.folder}/studies.db") as storage:
            studies = HistoryReader(storage).read(experiment)
        [study] = [study for study in studies if study.optimizer != EMA_GRID]
        report = study.report
        if report is None or study.found is None:
            raise StoppedError(f"{study.study}: no report")
        last = report.measured(LAST_CHECKPOINT)
        assert last is not None
        assert report.ema is not None
        return cls(
            last=last.loss,
            ema=report.ema.loss,
            found=study.found.loss,
            answer=report.of_answer.loss,
            name=report.answer,
            warnings=report.warnings,
            sign=study.sign,
        )


def row_of(trainer: Trainer, work: Path) -> list[str]:
    """The row of a trainer: its numbers are of the last checkpoint and of the export."""
    place = Place(trainer, work)
    place.install()
    place.train()
    for left in ("study.yaml", "studies.db", "studies.files", trainer.export):
        path = place.folder / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    row = [trainer.name, f"{place.version()}, {day}"]
    asked: list[str] = []
    try:
        place.run("lcsc", "init", trainer.kind, trainer.checkpoints)
        asked = fill_in(place.folder / "study.yaml", trainer.answers)
        place.run("lcsc", "run", "study.yaml", *trainer.run)
        experiment = yaml.safe_load((place.folder / "study.yaml").read_text())["name"]
        losses = Losses.read(place, experiment)
        place.run("lcsc", "export", experiment, "-o", trainer.export)
        last, answer = place.evaluated(trainer.last, trainer.export)
    except StoppedError as error:
        return [*row, f"**no**: {error}", ", ".join(asked), *["–"] * (len(HEADER) - 4)]
    ours, theirs = losses.sign * losses.last, statistics.fmean(last)
    tolerance = max(TOLERANCE, _half_width_of_one(last) / abs(theirs))
    difference = ours / theirs - 1
    agrees = "yes" if abs(difference) <= tolerance else "**no**"
    return [
        *row,
        f"no: {trainer.mended} (mended)" if trainer.mended else "yes",
        ", ".join(asked) or "nothing",
        _cell(last),
        f"{ours:.4g}",
        f"{agrees}, {difference:+.2%}",
        f"{losses.found / losses.last - 1:+.1%}",
        losses.name,
        f"{losses.answer / losses.last - 1:+.1%}",
        f"{losses.answer / losses.ema - 1:+.1%}",
        f"{statistics.fmean(answer) / theirs - 1:+.1%}",
        "; ".join(losses.warnings) or "–",
    ]


def _error(numbers: Sequence[float]) -> float:
    """The standard error of a mean; 0 of a single number."""
    return statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0


def _half_width_of_one(numbers: Sequence[float]) -> float:
    """Half the width of the interval in which one more number lies with a probability of 95 %; 0 of a single number."""
    if len(numbers) < 2:
        return 0.0
    return half_width(statistics.stdev(numbers) * (1 + 1 / len(numbers)) ** 0.5, degrees=len(numbers) - 1)


def _cell(numbers: Sequence[float]) -> str:
    error = _error(numbers)
    return f"{statistics.fmean(numbers):.4g}" + (f" ± {error:.2g}" if error else "")


def write(rows: Sequence[Sequence[str]]) -> None:
    """Put rows into the table, in place of those of the same trainers."""
    path = RESULTS / "trainers.md"
    lines = path.read_text().splitlines() if path.exists() else []
    known = {cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in lines if line.startswith("| "))}
    known |= {row[0]: list(row) for row in rows}
    table = markdown([HEADER, *(known[one.name] for one in TRAINERS if one.name in known)])
    head = ["# Other people's trainers", "", f"`make trainers`. {EXPLANATION}", "", machine(), ""]
    path.write_text("\n".join([*head, *table, ""]))


def main() -> None:
    """Measure, print, write."""
    only = {"default": "", "help": "only the trainer of this name"}
    work = {"type": Path, "required": True, "help": "a folder for environments and trained models"}
    arguments = parse(__doc__, work=work, only=only)
    os.environ["OMP_NUM_THREADS"] = "1"  # of all commands
    for trainer in TRAINERS:
        if arguments.only in ("", trainer.name):
            row = row_of(trainer, arguments.work.resolve())
            print(
                *(f"{title}: {cell}" for title, cell in zip(HEADER, row, strict=True)), sep="\n", end="\n\n", flush=True
            )
            write([row])


if __name__ == "__main__":
    main()
