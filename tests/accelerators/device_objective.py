"""An objective that a worker imports quickly, and that says where it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lcsc_opt.base import accelerator
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.objective.contract import Objective


class WithDevice(Objective):
    """The first coefficient, and the number of the device that it was computed on."""

    steps = (10, 20, 30)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        device = accelerator.find("auto")
        loss = float(torch.from_numpy(np.array(candidate.coefficients)).to(device)[0])
        name = torch.get_device_module(device).get_device_name(device)
        return Evaluation(loss, metrics={"device": float(name.split()[-1])}, cost=Cost())

    def describe(self) -> dict[str, Any]:
        return {}
