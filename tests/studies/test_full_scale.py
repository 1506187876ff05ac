"""``studies/paper/full``: the paper's own settings, on files of the formats that its code bases write."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.paths import SHIPPED
from lcsc_opt.base.records import SEARCH
from lcsc_opt.base.study_file import StudyFile, read_study_file
from lcsc_opt.cli import run as lcsc
from lcsc_opt.sampling import ImageNoise
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.sampling.function import FunctionSampler
from lcsc_opt.trajectory import Trajectory
from tests.objectives.image_objectives import PIXELS, settings
from tests.sampling.consistency_sampler import ConsistencySampler
from tests.studies import code_bases

FOLDER = (SHIPPED / "studies") / "paper" / "full"
FILES = sorted(FOLDER.glob("*.yaml"))
PAPER = {  # window, interval, images, last steps, NFE: Sec. 5.1 and App. B.1 of the paper, its Tables 1 to 3
    "cifar10_cd": (40_000, 100, 10_000, [50_000, 250_000, 800_000], [1]),
    "cifar10_ct": (40_000, 100, 10_000, [400_000, 800_000], [1]),
    "cifar10_dm": (50_000, 200, 10_000, [800_000], [15, 12, 9]),
    "imagenet64_cd": (20_000, 100, 10_000, [150_000, 300_000, 600_000], [1]),
    "imagenet64_ct": (20_000, 100, 10_000, [600_000, 1_000_000], [1]),
    "imagenet64_dm": (50_000, 200, 5_000, [500_000], [15, 12, 9]),
    "cheaper_training": (40_000, 100, 10_000, [100_000], [1]),
    "enhance": (20_000, 100, 10_000, [620_000], [1]),
}


def networks() -> Any:
    import published_networks  # type: ignore[import-not-found]

    return published_networks


@pytest.fixture(autouse=True)
def code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the study files is where Python looks, as it is for ``lcsc``; all is forgotten afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    code_bases.install(monkeypatch)
    yield
    sys.modules.pop("published_networks", None)


def network(given: dict[str, Any]) -> Callable[[], nn.Module]:
    """What the settings of a study name as its model."""
    made: Callable[[], nn.Module] = getattr(networks(), given["model"].partition(":")[2])
    return made


def of(spec: StudyFile) -> dict[str, Any]:
    return dict(spec.objective.settings)


def looped(path: Path, key: str) -> list[int]:
    """The values in the loop of a study file's comment; the file has one of them."""
    loop = re.search(rf"^# for {key} in ([\d ]+);", path.read_text(), re.MULTILINE)
    return [int(value) for value in loop[1].split()] if loop is not None else []


def last_steps(path: Path) -> list[int]:
    return looped(path, "step") or [of(read_study_file(path))["select"].get("last_step", 620_000)]


def write_files(path: Path) -> None:
    """Checkpoints at both ends of each window, and one before."""
    given = of(read_study_file(path))
    window, folder = given["select"]["window"], Path(given["checkpoints"]).parent
    steps = {step for last in last_steps(path) for step in (last - window - 100, last - window, last - 1000, last)}
    write = code_bases.write_ddim if folder.name == "cifar10-dm" else code_bases.write_openai
    write(folder, tuple(sorted(steps)), network(given))
    if given["reference"].endswith(".npz"):
        settings(Path(), reference=given["reference"])
        Path("reference.npz").rename(given["reference"])


def test_every_file_has_the_papers_settings() -> None:
    assert {path.stem for path in FILES} == set(PAPER)
    for path in FILES:
        spec = read_study_file(path)
        given = of(spec)
        window, interval, images, steps, nfe = PAPER[path.stem]
        assert last_steps(path) == steps
        assert given["select"].get("last_step", 620_000) == steps[-1]
        assert (looped(path, "nfe") or [given.get("nfe", 1)]) == nfe
        assert given.get("nfe", 1) == nfe[0]
        assert spec.name == f"paper_full_{path.stem}"
        assert (given["select"]["window"], given["select"]["interval"]) == (window, interval)
        assert (given["images"], spec.budget.total) == (images, 2000)
        assert spec.held_out is not None
        assert spec.held_out.images == 50_000
        assert [optimizer.name for optimizer in spec.optimizers][:2] == ["EMAGrid", "LCSC"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_rehearsal_finds_the_published_files_and_needs_the_weights(
    path: Path, workplace: Path, capsys: Any, monkeypatch: Any
) -> None:
    write_files(path)
    monkeypatch.setenv("TORCH_HOME", str(workplace.parent / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: None)
    assert lcsc(["run", f"paper/full/{path.stem}", "--dry-run"]) == 2
    said = capsys.readouterr().err
    last = last_steps(path)[-1]
    assert f"selected 3: steps {last - PAPER[path.stem][0]} to {last}," in said
    assert "give the weights of torch-fidelity's Inception" in said
    assert not (workplace / "studies.db").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_few_trials_run_on_the_published_files(path: Path, workplace: Path, capsys: Any) -> None:
    write_files(path)
    settings(Path())
    last = last_steps(path)[0]
    select = [] if path.stem == "enhance" else [f"objective.settings.select.last_step={last}"]
    fewer = {"loss": PIXELS, "reference": "reference.npz", "held_out_metrics": [], "images": 6, "batch_size": 3}
    fewer |= {"device": "cpu", "dtype": "fp32"}
    nfe = ["objective.settings.nfe=9"] if "dm" in path.stem else []
    changes = [f"objective.settings.{key}={json.dumps(value)}" for key, value in fewer.items()]
    command = ["run", str(path), *changes, *select, *nfe, "optimizers=[LCSC]", "held_out.images=6", "held_out.top=1"]
    assert lcsc([*command, "--budget", "3"]) == 0, capsys.readouterr().err
    assert lcsc(["compare", f"paper_full_{path.stem}", "--format", "json"]) == 0
    [row, answer] = json.loads(capsys.readouterr().out)
    assert row["evaluations"] == 3
    assert math.isfinite(row["held_out"] + answer["held_out"])
    [packed] = [Trajectory.open(folder) for folder in Path("studies.files").iterdir() if folder.suffix == ".trajectory"]
    window = PAPER[path.stem][0]
    assert packed.steps == (last - window, last - 1000, last)
    raw = code_bases.weights(network(of(read_study_file(path)))(), last)
    assert all(torch.equal(tensor, raw[name]) for name, tensor in packed.checkpoint(2).items())  # no average's


def test_consistency_sampling_is_the_librarys() -> None:
    network = networks().cifar10_consistency()

    class Unlabelled(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return network(x, c_noise, None)

    function = ConsistencyFunction(Unlabelled(), noise_scale=0.25)
    sigmas = [80.0, 1.088]
    how: Any = {"noise": ImageNoise(0, (3, 32, 32))}
    expected = ConsistencySampler(function, sigmas=sigmas, **how)
    ours = FunctionSampler(network, networks().edm_consistency, nfe=2, options={"sigmas": sigmas}, **how)
    torch.testing.assert_close(
        ours.sample(SEARCH, 0, 3).clamp(-1, 1), expected.sample(SEARCH, 0, 3).clamp(-1, 1), rtol=1e-4, atol=1e-5
    )
