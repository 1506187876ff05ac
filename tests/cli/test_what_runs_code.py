"""Which commands run the code that a study in a database names, as SECURITY.md lists them."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from lcsc_opt.cli import run as lcsc
from tests.processes import lcsc_process

ROOT = Path(__file__).parents[2]
OBJECTIVE = """
from pathlib import Path
from lcsc_opt.objective.settings import CheckpointSettings
from lcsc_opt.objective.weight_score import WeightScore
from lcsc_opt.objective.network_scorer import NetworkScorer
import torch

Path("was_run").touch()

def score(model, draw):
    return float(model.weight.detach().sum())

def build(settings, context):
    checked = CheckpointSettings(**settings)
    scorer = NetworkScorer(torch.nn.Linear(4, 1, bias=False), score, name="score")
    return WeightScore(checked.trajectory(context), scorer)
"""
STUDY = {
    "name": "own",
    "objective": {"file": "own_program.py", "settings": {"checkpoints": "model*.pt"}},
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 3},
}
RUN_IT = [
    ["run", "own.yaml", "--dry-run"],
    ["run", "own.yaml", "--budget", "4"],
    ["run", "own/LCSC/0", "--budget", "5"],
    ["evaluate", "own", "--top", "1"],
    ["run", "own/LCSC/0", "name=more", "start=own/LCSC/0", "--budget", "4"],
]
READ_ONLY = [
    ["list"],
    ["show", "own/LCSC/0"],
    ["compare", "own"],
    ["report", "own", "-o", "report.html"],
    ["export", "own/LCSC/0", "-o", "best.safetensors"],
    ["export", "own", "-o", "answer.safetensors"],
    ["apply", "best.safetensors", "model10.pt", "model20.pt", "model30.pt", "-o", "same.safetensors"],
    ["init", "score", "model*.pt", "model=own_program:score", "score=own_program:score"],
    ["trajectory", "pack", "model10.pt", "model20.pt", "-o", "packed.trajectory"],
    ["delete", "own/LCSC/0", "--yes"],
]


def test_commands_run_code_or_not_as_the_page_says(workplace: Path) -> None:
    (workplace / "own_program.py").write_text(OBJECTIVE)
    (workplace / "own.yaml").write_text(yaml.safe_dump(STUDY))
    for step in (10, 20, 30):
        torch.save({"weight": torch.full((1, 4), float(step))}, workplace / f"model{step}.pt")
    marker = workplace / "was_run"
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table, read_only = page.partition("**What runs the code of a study:**")[2].split("run none of it", 1)
    for command in RUN_IT:
        marker.unlink(missing_ok=True)
        ended = lcsc_process(*command)
        assert ended.status == 0, f"{command}: {ended.err}"
        assert marker.exists(), command
    marker.unlink()
    for command in READ_ONLY:  # in this process, which has not run the objective yet
        assert lcsc(command) == 0, command
        assert not marker.exists(), command
    for command in [*RUN_IT, *READ_ONLY]:
        assert f"`{command[0]}`" in table or f"`lcsc {command[0]}`" in table + read_only
