from __future__ import annotations

import importlib
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.records import HELD_OUT, SEARCH, Noise
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.sampling import ClassLabels, DiffusersSampler, ImageNoise, NetworkSettings
from lcsc_opt.sampling.diffusers_sampler import SCHEDULERS, SchedulerSettings, build_scheduler
from tests.unet_examples import unet

IMAGES = 5
NOISE = ImageNoise(7, (1, 8, 8))
CPU = NetworkSettings(device="cpu")


def make(
    network: nn.Module, scheduler: Any, *, channels: int = 1, labels: Any = None, **options: Any
) -> DiffusersSampler:
    if "timesteps" not in options:
        options.setdefault("steps", 10)
    schedule = SchedulerSettings(**{key: options.pop(key) for key in ("steps", "timesteps", "step") if key in options})
    noise = ImageNoise(7, (channels, 8, 8), labels)
    settings = {"settings": CPU, **options}
    return DiffusersSampler(network, scheduler, schedule, noise=noise, **settings)


@torch.inference_mode()
def images(sampler: DiffusersSampler, noise: Noise = SEARCH, start: int = 0, stop: int = IMAGES) -> Tensor:
    return sampler.sample(noise, start, stop)


def from_pipeline(monkeypatch: pytest.MonkeyPatch, pipeline: Any, *, channels: int = 1, **options: Any) -> Tensor:
    """The pipeline's own images ``[N, C, H, W]`` in [-1, 1], from our noise."""
    module = importlib.import_module(type(pipeline).__module__)
    start = ImageNoise(7, (channels, 8, 8)).batch(SEARCH, 0, IMAGES)
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: start.clone())
    pipeline.set_progress_bar_config(disable=True)
    generators = NOISE.generators(SEARCH, 0, IMAGES)
    made = pipeline(batch_size=IMAGES, generator=generators, output_type="np", **options).images
    return torch.from_numpy(np.asarray(made)).permute(0, 3, 1, 2) * 2 - 1


def differ(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    assert first.std() > 0.05  # there is something to compare
    return float((first - second).abs().max())


DPM = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
DDIM: list[dict[str, Any]] = [{}, {"eta": 0.7}, {"eta": 1.0, "use_clipped_model_output": True}]


@pytest.mark.parametrize(
    ("name", "kind", "config", "steps", "options"),
    [
        *(("ddpm", "DDPM", {"prediction_type": name}, 12, {}) for name in ("epsilon", "v_prediction", "sample")),
        *(("dpm-solver++", "DPMSolverMultistep", DPM, steps, {}) for steps in (7, 15)),
        ("sde-dpm-solver++", "DPMSolverMultistep", DPM, 10, {}),
        *(("ddim", "DDIM", {"prediction_type": "v_prediction"}, 10, options) for options in DDIM),
    ],
)
def test_schedulers_give_the_pipelines_images(
    monkeypatch: pytest.MonkeyPatch, name: Any, kind: str, config: dict[str, Any], steps: int, options: dict[str, Any]
) -> None:
    import diffusers

    algorithm = {"algorithm_type": name.replace("dpm-", "dpm")} if "solver" in name else {}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**config, **algorithm)
    network, pipeline = unet(), diffusers.DDIMPipeline if name == "ddim" else diffusers.DDPMPipeline
    expected = from_pipeline(monkeypatch, pipeline(network, scheduler), num_inference_steps=steps, **options)
    sampler = make(network, build_scheduler(name, config), steps=steps, step=options)
    assert sampler.nfe == steps
    assert differ(images(sampler).clamp(-1, 1), expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"num_inference_steps": 1}, {"steps": 1}),
        ({"timesteps": [22, 0], "num_inference_steps": None}, {"timesteps": [22, 0]}),
    ],
)
def test_consistency_models_give_the_pipelines_images(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], schedule: dict[str, Any]
) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    network = unet(channels=3, num_class_embeds=4)
    config = {"num_train_timesteps": 40, "sigma_max": 80.0}
    pipeline = ConsistencyModelPipeline(network, CMStochasticIterativeScheduler(**config))
    labels = ClassLabels(4, "balanced")
    sampler = make(network, build_scheduler("consistency", config), channels=3, labels=labels, **schedule)
    classes = sampler.noise.classes(SEARCH, 0, IMAGES)
    assert classes is not None
    expected = from_pipeline(monkeypatch, pipeline, channels=3, class_labels=classes.tolist(), **options)
    assert sampler.nfe == len(schedule.get("timesteps", range(schedule.get("steps", 0))))
    assert differ(images(sampler).clamp(-1, 1), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "steps", "clips"),
    [("ddpm", 5, "clip_sample"), ("ddim", 5, "clip_sample"), ("consistency", 1, "clip_denoised")],
)
def test_the_image_is_not_clipped_by_a_scheduler_that_clips_its_estimates(
    monkeypatch: pytest.MonkeyPatch, name: Any, steps: int, clips: str
) -> None:
    network = unet()
    with torch.no_grad():
        network.conv_out.weight *= 10  # large outputs
    config = {} if name == "consistency" else {"prediction_type": "sample"}
    scheduler = build_scheduler(name, config)
    made = images(make(network, scheduler, steps=steps))
    assert float((made.abs() > 1.01).float().mean()) > 0.05
    with monkeypatch.context() as patched:
        patched.setattr(type(scheduler), "step", _out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            images(make(network, scheduler, steps=1))
    assert scheduler.config[clips], "the next images are sampled as these were"
    latents = make(network, build_scheduler(name, config), steps=steps, decoder=_Identity())
    assert torch.equal(images(latents), made.clamp(-1, 1))


def _out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError


class _Identity(nn.Module):
    """In the place of a decoder, whose latents a scheduler does clip."""

    def forward(self, latents: Tensor) -> Tensor:
        return latents


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_and_learned_variance_give_the_pipelines_images(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            norm_num_groups=4,
        ).eval()  # fmt: skip
        nn.init.normal_(network.proj_out_2.weight, std=0.5)
    config = {"clip_sample": False}
    start = ImageNoise(7, (4, 8, 8)).batch(SEARCH, 0, IMAGES)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda shape, **_: start.clone())
    pipeline = DiTPipeline(network, _NoDecoder(), DDIMScheduler(**config))
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline([3, 3, 3, 3, 3], guidance_scale=scale, num_inference_steps=6, output_type="np").images
    expected = torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1
    labels = ClassLabels(1000, 3, guidance=(scale, 1000) if scale > 1 else None)
    sampler = make(network, build_scheduler("ddim", config), channels=4, labels=labels, steps=6)
    assert sampler.nfe == (12 if scale > 1 else 6)
    assert differ(images(sampler).clamp(-1, 1), expected) < 1e-5


class _NoDecoder(nn.Module):
    """In the place of a VAE: latents are images."""

    config = SimpleNamespace(scaling_factor=1.0)
    device = torch.device("cpu")

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents)


def test_ddpm_uses_the_learned_variance_and_others_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    config = {"variance_type": "learned_range", "prediction_type": "sample"}
    network = unet(out_channels=2)
    expected = from_pipeline(monkeypatch, DDPMPipeline(network, DDPMScheduler(**config)), num_inference_steps=8)
    learned = images(make(network, build_scheduler("ddpm", config), steps=8))
    assert differ(learned.clamp(-1, 1), expected) < 1e-5
    fixed = images(make(network, build_scheduler("ddpm", {**config, "variance_type": "fixed_small"}), steps=8))
    assert differ(learned, fixed) > 1e-3
    for name in ("ddim", "dpm-solver++"):
        assert images(make(network, build_scheduler(name, config))).shape == (IMAGES, 1, 8, 8)
    parallel = build_scheduler(None, {**config, "_class_name": "DDPMParallelScheduler"})
    assert differ(images(make(network, parallel, steps=8)), learned) < 1e-5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_depends_on_its_index_alone(name: Any) -> None:
    network = unet(num_class_embeds=3)
    options: Any = {"labels": ClassLabels(3, "random", guidance=(2.0, 0)), "steps": 4}
    config = {"prediction_type": "v_prediction", "num_train_timesteps": 200}
    together = images(make(network, build_scheduler(name, config), **options), stop=6)
    sampler = make(network, build_scheduler(name, config), **options)
    apart = torch.cat([images(sampler, start=4, stop=6), images(sampler, stop=1), images(sampler, start=1, stop=4)])
    assert differ(apart, together[[4, 5, 0, 1, 2, 3]]) < 1e-5
    assert differ(images(sampler, stop=6), together) < 1e-5
    assert differ(images(sampler, HELD_OUT, stop=6), together) > 1e-2


def test_steps_that_the_scheduler_does_not_take_are_refused_before_it_samples() -> None:
    with pytest.raises(ObjectiveError, match="refuses"):
        make(unet(), build_scheduler("ddim", {}), steps=5000)


def test_everything_that_changes_images_is_described() -> None:
    def described(name: Any = "ddim", **options: Any) -> dict[str, object]:
        return make(unet(num_class_embeds=3), build_scheduler(name, None), **options).describe()

    labels = ClassLabels(3, "balanced")
    variants = [
        described(),
        described("ddpm"),
        described(steps=11),
        described(step={"eta": 1.0}),
        described(labels=labels),
        described(labels=ClassLabels(3, 1)),
        described(labels=ClassLabels(3, "balanced", guidance=(2.0, 0))),
        described(settings=NetworkSettings(device="cpu", dtype="bf16")),
        make(unet(norm_eps=1e-3), build_scheduler("ddim", None)).describe(),
    ]
    texts = [json.dumps(variant, sort_keys=True) for variant in variants]
    assert len(set(texts)) == len(texts)
    assert described() == described()


def test_a_network_may_keep_a_configuration_of_any_kind() -> None:
    class OwnNetwork(nn.Identity):
        config = NetworkSettings(device="cpu")

    described = make(OwnNetwork(), build_scheduler("ddim", None)).describe()
    assert json.loads(json.dumps(described)) == described


def test_what_the_model_was_trained_with_is_kept() -> None:
    trained = {"_class_name": "DDPMScheduler", "num_train_timesteps": 500, "prediction_type": "v_prediction"}
    for name in SCHEDULERS.keys() - {"consistency"}:
        made = build_scheduler(name, trained).config
        assert made.num_train_timesteps == 500
        assert made.get("prediction_type", "v_prediction") == "v_prediction"
    own = build_scheduler(None, trained, {"clip_sample": False})
    assert (type(own).__name__, own.config.clip_sample) == ("DDPMScheduler", False)


class _Exact(nn.Module):
    """What a perfect network predicts for data from N(0, 0.5²), noise level by noise level."""

    def __init__(self, *, family: str) -> None:
        super().__init__()
        self.family = family
        self.config: dict[str, Any] = {}
        self.alphas = torch.linspace(1e-4, 0.02, 1000).neg().log1p().cumsum(0).exp()

    def forward(self, x: Tensor, t: Tensor) -> Any:
        if self.family == "EDM":  # whose preconditioning is all that this data needs
            return SimpleNamespace(sample=torch.zeros_like(x))
        if self.family == "FlowMatch":
            t = (t / 1000).view(-1, 1, 1, 1).to(x.dtype)
            return SimpleNamespace(sample=x * (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2))
        alpha = self.alphas[t.round().long().clamp(0, 999)].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=x * (1 - alpha).sqrt() / (alpha * 0.25 + 1 - alpha))


_FAMILIES = {
    "": (
        *("DDPM", "DDIM", "DDIMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "PNDM"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "SASolver"),
        "UniPCMultistep",
    ),
    "FlowMatch": ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"),
    "EDM": ("EDMEuler", "EDMDPMSolverMultistep"),
}
_NOT_EXACT = ("lcm", "consistency")  # which sample what is not a denoiser


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of a scheduler's own arithmetic
@pytest.mark.parametrize(
    ("family", "own", "name"),
    [(family, own, None) for family, classes in _FAMILIES.items() for own in classes]
    + [(family, classes[0], name) for family, classes in _FAMILIES.items() for name in SCHEDULERS],
)
def test_a_scheduler_samples_what_the_network_was_trained_on_or_is_refused(family: str, own: str, name: Any) -> None:
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    config = {**({} if family else betas), "_class_name": f"{own}Scheduler"}
    try:
        scheduler = build_scheduler(name, config)
    except ObjectiveError as error:
        assert "whose predictions mean something else" in str(error)  # noqa: PT017 - either of both
        return
    if name not in _NOT_EXACT:
        made = images(make(_Exact(family=family), scheduler, steps=50), stop=60)
        assert float(made.std()) == pytest.approx(0.5, abs=0.08)


def test_no_other_scheduler_is_asked_to_sample_for_a_class_that_is_not_known_or_of_another_family() -> None:
    """Such as FlowMapEulerDiscreteScheduler, whose network predicts a mean velocity."""
    import diffusers

    schedulers = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    begin = tuple(own for classes in _FAMILIES.values() for own in classes)
    known = (*begin, "FlowMatch", "CMStochastic", "DDIM", "DPMSolver", "KDPM2", "LCM", "TCD")
    others = [name for name in schedulers if not name.startswith(known) or "Wuerstchen" in name]
    assert len(others) > 5
    pairs = [(own, name) for own in others for name in SCHEDULERS]
    for own, name in [
        *pairs,
        ("FlowMatchEulerDiscreteScheduler", "ddim"),
        ("CMStochasticIterativeScheduler", "heun"),
        ("DDPMScheduler", "consistency"),
    ]:
        message = f"{re.escape(name)} is not for a network of {own}, whose predictions mean something else"
        with pytest.raises(ObjectiveError, match=message):
            build_scheduler(name, {"_class_name": own})


def test_the_shift_of_a_flow_is_kept() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert build_scheduler("unipc", config).config.flow_shift == 3.0
    assert build_scheduler("euler", config).config.shift == 3.0


@pytest.mark.parametrize(
    ("name", "config", "options", "message"),
    [
        ("ddim", None, {"solver_ordr": 3}, r"DDIMScheduler has no option 'solver_ordr'.*it has num_train_timesteps"),
        ("dpm-solver++", None, {"solver_ordr": 3}, "did you mean 'solver_order'"),
        (None, None, {}, "the model comes without a scheduler; name one of ddpm, "),
        (None, {"_class_name": "os.system"}, {}, "the pipeline's 'os.system' is not a scheduler"),
        (None, {"_class_name": "SchedulerMixin"}, {}, "the pipeline's 'SchedulerMixin' is not a scheduler"),
        (None, {"_class_name": "EDMEulerScheduler", "rho": 0}, {}, "EDMEulerScheduler: .*zero"),
        (None, {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 0}, {}, "Scheduler: index"),
    ],
)
def test_what_makes_no_scheduler_is_refused(name: Any, config: Any, options: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=f"^.*{message}.*$"):
        build_scheduler(name, config, options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dpm-solver"}, "name: expected one of ddpm, .*, got 'dpm-solver'"),
        ({"name": "ddim"}, "either steps or timesteps"),
        ({"steps": 0}, "steps: "),
    ],
)
def test_settings_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(StudySpecError, match=message):
        parse_settings(SchedulerSettings, settings, source="sampler")
