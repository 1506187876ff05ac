"""Where the candidates of a plan are evaluated."""

from __future__ import annotations

from collections.abc import Mapping

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.evaluation import environments
from lcsc_opt.search.plan import StudyPlan


def environments_of(plan: StudyPlan) -> list[Mapping[str, str]]:
    """The environment variables of each of the plan's workers; empty if none must be set.

    Raises:
        StudySpecError: there is no such GPU, or both the settings and the workers (or Ray) choose the device.
    """
    device = plan.spec.objective.settings.get("device", "auto")
    if plan.ray is not None:
        if device not in ("auto", "cuda", "cuda:0", "cpu"):
            raise StudySpecError(f"objective.settings.device {device}: Ray gives each worker its own; leave it out")
        return []
    if device in ("auto", "cuda"):
        return environments(plan.workers, plan.devices) if plan.workers > 1 or plan.devices else []
    if plan.devices:
        raise StudySpecError(
            f"workers: {', '.join(plan.devices)} and objective.settings.device {device}: give one of them only"
        )
    return []
