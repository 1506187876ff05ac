from __future__ import annotations

from typing import Any

import pytest

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.sampling import SchedulerSettings, build_scheduler


def test_what_the_model_was_trained_with_is_kept() -> None:
    config = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 500,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "variance_type": "fixed_large",
        "clip_sample": False,
    }
    for name in ("ddpm", "ddim", "dpm-solver++", "unipc", "heun", "euler"):
        made = build_scheduler(name, config).config  # type: ignore[arg-type]
        assert (made.num_train_timesteps, made.prediction_type) == (500, "v_prediction")
        assert made.beta_schedule == "squaredcos_cap_v2"
    assert build_scheduler("ddim", config).config.clip_sample is False
    assert build_scheduler("ddpm", config).config.variance_type == "fixed_large"
    own = build_scheduler(None, config, {"clip_sample": True})
    assert type(own).__name__ == "DDPMScheduler"
    assert own.config.clip_sample is True


@pytest.mark.parametrize(
    ("name", "config", "options", "message"),
    [
        ("ddim", None, {"solver_ordr": 3}, r"DDIMScheduler has no option 'solver_ordr'.*it has num_train_timesteps"),
        ("dpm-solver++", None, {"solver_ordr": 3}, "did you mean 'solver_order'"),
        ("ddim", None, {"beta_schedule": "wrong"}, "DDIMScheduler: wrong is not implemented"),
        (None, None, {}, "there is no pipeline's to take; name one of ddpm, "),
        (None, {"_class_name": "UNet2DModel"}, {}, "the pipeline's 'UNet2DModel' is none of diffusers'"),
        (None, {"_class_name": "os.system"}, {}, "the pipeline's 'os.system' is none"),
    ],
)
def test_what_makes_no_scheduler_is_refused(name: Any, config: Any, options: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message) as caught:
        build_scheduler(name, config, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dpm-solver"}, r"name: .*did you mean 'dpm-solver\+\+'"),
        ({"name": "ddim"}, "either steps or timesteps"),
        ({"steps": 3, "timesteps": [1]}, "either steps or timesteps"),
        ({"steps": 0}, "steps: "),
        ({"timesteps": []}, "timesteps: "),
    ],
)
def test_settings_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(StudySpecError, match=message):
        parse_settings(SchedulerSettings, settings, source="sampler")
