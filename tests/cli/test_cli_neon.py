"""``lcsc neon`` as a user types it: after ``lcsc train``, and a search on what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lcsc_opt.cli import run as lcsc
from lcsc_opt.search.studies import load_study
from lcsc_opt.trajectory import Trajectory
from tests.commands import Typed
from tests.unet_examples import unet


@pytest.mark.usefixtures("networks_train_briefly", "new_accelerator")
def test_a_trained_model_gets_one_more_row_that_a_search_runs_on(workplace: Path, typed: Typed) -> None:
    unet(0).save_config(workplace / "network")
    short = ["--data", "digits", "--steps", "6", "--checkpoint-every", "2", "--network", "network", "batch_size=4"]
    assert lcsc(["train", "ict", *short, "-o", "ict.trajectory"]) == 0
    study = yaml.safe_load(Path("ict.yaml").read_text())
    study["objective"]["settings"]["images"] = 80
    study.update(optimizers=["LCSC"], budget={"evaluations": 8}, held_out={"images": 80, "top": 1})
    Path("ict.yaml").write_text(yaml.safe_dump(study))
    command = ["neon", "ict.yaml", "--recipe", "ict", "-o", "neon.trajectory", "--samples", "20", "--steps", "2"]
    printed = typed(*command, "batch_size=4", "--format", "json")
    found = json.loads(printed.out)
    assert found["step"] == 3
    assert [row["w"] for row in found["losses"]] == [-0.5, 0, 0.5, 1, 2, 4]
    assert "neon.trajectory: the checkpoints and, as step 3, the self-trained one" in printed.err
    assert Trajectory.open("neon.trajectory").steps == (2, 3, 4, 6)
    assert "exists already; give another name" in typed(*command, status=2).err
    assert "ikt: no such recipe" in typed("neon", "ict.yaml", "--recipe", "ikt", "-o", "other.trajectory", status=2).err
    study["objective"]["settings"]["checkpoints"] = "neon.trajectory"
    Path("neon.yaml").write_text(yaml.safe_dump({**study, "name": "neon"}))
    assert lcsc(["run", "neon.yaml"]) == 0
    assert load_study("neon/LCSC/0").steps == (2, 3, 4, 6)
