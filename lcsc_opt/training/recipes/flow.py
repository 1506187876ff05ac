"""Flow matching with minibatch optimal transport (Lipman et al. 2023; Tong et al. 2023)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.sampling.consistency import network_output
from lcsc_opt.training.recipes.base import Batch, Kind, Recipe, column

TIMESTEPS = 1000  # a network of diffusers is told 1000 times the share of noise


class Flow(Recipe):
    """The velocity of straight paths between noise and images.

    The share of noise is s = 1 - t of the papers, and the network's output is noise - image, minus their velocity: as
    diffusers' schedulers take both.

    Attributes:
        coupling: ``optimal-transport`` (Tong et al. 2023) or ``independent`` (Lipman et al. 2023).
    """

    name: ClassVar[str] = "flow"
    kind: ClassVar[Kind] = "flow"
    begins_from: ClassVar[tuple[Kind, ...]] = ("flow",)

    coupling: Literal["optimal-transport", "independent"] = "optimal-transport"

    def loss(self, batch: Batch) -> Tensor:
        """E |v(x_t, t) - (x_1 - x_0)|^2, x_t = (1 - t) x_0 + t x_1 (Tong et al. 2023, OT-CFM with sigma 0)."""
        noise = batch.normal()
        if self.coupling == "optimal-transport":
            noise = optimal_coupling(noise, batch.images)
        share = torch.rand(len(noise), generator=batch.generator, device=noise.device)
        mixed = column(share) * noise + column(1 - share) * batch.images
        velocity = network_output(batch.network, mixed, TIMESTEPS * share)
        return (velocity - (noise - batch.images)).square().mean()

    def scheduler(self) -> dict[str, Any]:
        """DPM-Solver++ on the flow's levels."""
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 1.0,
            "num_train_timesteps": TIMESTEPS,
        }


def optimal_coupling(noise: Tensor, images: Tensor) -> Tensor:
    """The noise ``[N, ...]`` in another order, so that the squared distances to its images have the smallest sum.

    Minibatch optimal transport (Pooladian et al. 2023; Tong et al. 2023, Alg. 2). With as many of one as of the other,
    all of equal mass, the optimal plan is a permutation.

    Raises:
        TrainingError: POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise TrainingError(f"POT cannot be imported ({error}): pip install POT") from error
    cost = torch.cdist(images.flatten(1).double().cpu(), noise.flatten(1).double().cpu()) ** 2
    plan = ot.emd([], [], cost.numpy())  # empty weights: uniform ones
    return noise[torch.from_numpy(plan).argmax(1).to(noise.device)]
