"""EDM and EDM2 networks (Karras et al. 2022 and 2024), sampled by Heun's method.

    objective:
      file: edm.py
      settings:
        checkpoints: training-runs/00012/network-snapshot-*.pkl
        network: training.networks:EDMPrecond      # your copy of the class; EDM2: training.networks_edm2:Precond
        sampler: {steps: 18}
        labels: balanced
        reference: fid-refs/cifar10-32x32.npz

No code in a snapshot is run. So the network's class comes from your copy of the code that trained it, in the working
directory or next to the study file. The class's arguments are read from the first snapshot. Packed checkpoints have no
arguments: name a snapshot in ``arguments_from``, or write them all into ``arguments``:

    arguments: {img_resolution: 32, img_channels: 3, label_dim: 10, model_type: SongUNet}

The sampler, with NVlabs' defaults for the noise levels:

    sampler: {steps: 18, sigma_min: 0.002, sigma_max: 80, rho: 7}

``also: {steps: 18}`` in it is a second sampler with other settings, in which reports measure the answer once more.

A network with classes needs ``labels``: ``balanced`` (classes take turns), ``random`` (drawn for each image)
or one class. ``guide: {checkpoint: network-snapshot-0134217-0.110.pkl, scale: 1.7}`` guides away from another network.
Models of latents need ``decoder: {autoencoder: sd-vae-ft-mse}``, a folder of diffusers. ``dtype: fp16`` is the
network's own ``use_fp16``, which acts on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, JsonValue
from torch import nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import import_dotted
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import AlsoSettings, Count, FrozenModel, parse_settings, second_of
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.checkpoints.reading import read_checkpoint, read_init_arguments
from lcsc_opt.checkpoints.weights import difference, weights_sha256
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.settings import ImageObjectiveSettings
from lcsc_opt.sampling import (
    ClassLabels,
    DecoderSettings,
    EdmDenoiser,
    HeunSampler,
    HeunSchedule,
    ImageNoise,
    Labels,
    LatentDecoder,
    Sampler,
    load_weights,
)

Arguments = dict[str, JsonValue]
NonNegative = Annotated[float, Field(ge=0)]


class SamplerSettings(AlsoSettings):
    """Noise levels of Karras et al. 2022, Eq. 5."""

    steps: Count = 18
    sigma_min: NonNegative = 0.002
    sigma_max: NonNegative = 80.0
    rho: float = 7.0


class GuideSettings(FrozenModel):
    """The network that guidance leads away from.

    Attributes:
        scale: 1 is no guidance.
        checkpoint: of another network.
        key: which state dict of it; in a snapshot ``ema``.
        network: the class of that network; by default the one that is merged.
        arguments: of that network; missing ones are those of its snapshot.
    """

    checkpoint: str
    scale: float
    key: str | None = None
    network: str | None = None
    arguments: Arguments = Field(default={})


class Settings(ImageObjectiveSettings):
    """The settings of all objectives over images, and the network's class, its sampler, its classes and its guide."""

    network: str
    arguments: Arguments = Field(default={})
    arguments_from: str | None = None
    sampler: SamplerSettings = SamplerSettings()
    labels: Labels | None = None
    guide: GuideSettings | None = None
    decoder: DecoderSettings | None = None


def build(settings: dict[str, Any], context: BuildContext) -> Objective:
    """Build the network from the user's class; every candidate's weights come from the checkpoints."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check(context)
    import_dotted(checked.network, setting="network")  # so that a wrong name fails before checkpoints are packed
    trajectory = checked.trajectory(context)
    denoiser = _denoiser(checked, context)
    labels = ClassLabels.choose(checked.labels, classes=denoiser.label_dim or None)
    noise = checked.noise(_image_shape(denoiser.network), labels)
    decoder = None
    if checked.decoder is not None:
        decoder = checked.decoder.build(noise.shape[0], context)  # channels of the latents
    sampler = _sampler(checked, checked.sampler, denoiser, noise, decoder)
    second = second_of(checked.sampler)
    also = None if second is None else _sampler(checked, second, denoiser, noise, decoder)
    return checked.objective(sampler, trajectory, context, also=also)


def _sampler(
    checked: Settings,
    settings: SamplerSettings,
    denoiser: EdmDenoiser,
    noise: ImageNoise,
    decoder: LatentDecoder | None,
) -> Sampler:
    """Heun's method with these ``settings``, those of ``checked`` or of its second sampler."""
    network = denoiser.network
    schedule = HeunSchedule(  # the network may be limited to fewer noise levels
        settings.steps,
        sigma_min=max(settings.sigma_min, float(getattr(network, "sigma_min", 0))),
        sigma_max=min(settings.sigma_max, float(getattr(network, "sigma_max", "inf"))),
        rho=settings.rho,
    )
    return HeunSampler(
        denoiser,
        schedule=schedule,
        noise=noise,
        decoder=decoder,
        settings=checked.model_copy(update={"dtype": "fp32"}),  # EDM's networks choose their arithmetic
    )


def _denoiser(checked: Settings, context: BuildContext) -> EdmDenoiser:
    """The network that is merged, together with the guide if there is one."""
    snapshot = _first_snapshot(checked, context)
    arguments: Mapping[str, Any] = {}
    if snapshot is not None:
        arguments = read_init_arguments(snapshot, key=checked.key or "ema")
    network = _network(checked.network, arguments, checked.arguments)
    _use_fp16(network, checked.dtype)
    label_dim = int(getattr(network, "label_dim", 0))
    # what decides images beside the weights, for the fingerprint of a study
    config: dict[str, object] = {"made_with": [arguments, checked.arguments], "dtype": checked.dtype}
    settings = checked.guide
    if settings is None:
        return EdmDenoiser(network, label_dim=label_dim, config=config)
    guide = _guide(settings, checked.network, context)
    _use_fp16(guide, checked.dtype)
    config["guide"] = weights_sha256(guide.state_dict())
    return EdmDenoiser(network, label_dim=label_dim, guide=guide, guidance=settings.scale, config=config)


def _first_snapshot(checked: Settings, context: BuildContext) -> Path | None:
    """A snapshot of NVlabs' code, which has the network's arguments; ``None`` if the checkpoints have none."""
    if checked.arguments_from is not None:
        return context.path(checked.arguments_from)
    paths = checked.checkpoint_paths(context)
    if any(is_packed(path) for path in paths):
        return None
    first = find_checkpoints(paths, key=checked.key)[0]
    if first.suffix != ".pkl":
        return None
    return first


def _network(name: str, stored: Mapping[str, Any], changes: Arguments) -> nn.Module:
    """A network of the user's class, with the arguments of the snapshot and the study file's changes.

    Args:
        name: ``module:class``.
        stored: ``class_name``, ``init_args`` and ``init_kwargs`` of a snapshot; empty without one.
        changes: keyword arguments.
    """
    factory = import_dotted(name, setting="network")
    class_name = stored.get("class_name", factory.__name__)
    if class_name != factory.__name__:
        notice(f"network: the snapshot contains a {class_name}; using {name} in its place")
    positional = stored.get("init_args", ())
    keywords = {**stored.get("init_kwargs", {}), **changes}
    try:
        network = factory(*positional, **keywords)
    except (TypeError, ValueError, KeyError, AssertionError) as error:  # EDM's code asserts what it expects
        raise ObjectiveError(
            f"arguments: {name} cannot be made with these: {type(error).__name__}: {' '.join(str(error).split())}; "
            "they are read from the first snapshot, or from the one that arguments_from names"
        ) from error
    if not isinstance(network, nn.Module):
        raise ObjectiveError(f"network: {name} made a {type(network).__name__}; expected a torch.nn.Module")
    return network


def _guide(guide: GuideSettings, network: str, context: BuildContext) -> nn.Module:
    """The network that guidance leads away from, with its weights."""
    path = context.path(guide.checkpoint)
    stored: Mapping[str, Any] = {}
    if path.suffix == ".pkl":
        stored = read_init_arguments(path, key=guide.key or "ema")
    module = _network(guide.network or network, stored, guide.arguments)
    weights = read_checkpoint(path, key=guide.key).tensors
    misfit = difference(weights, module.state_dict())
    if misfit is not None:
        raise ObjectiveError(
            f"guide.checkpoint: {path} {misfit}; if it is of another architecture, give guide.network and "
            "guide.arguments"
        )
    load_weights(module, weights)
    return module


def _use_fp16(network: nn.Module, dtype: str) -> None:
    """Set the network's own ``use_fp16``: EDM's networks choose and check their arithmetic themselves."""
    has_fp16 = hasattr(network, "use_fp16")
    if dtype == "bf16" or (dtype == "fp16" and not has_fp16):
        raise ObjectiveError(f"dtype: EDM's networks have fp32, and fp16 if they have use_fp16; got {dtype}")
    if has_fp16:
        cast("Any", network).use_fp16 = dtype == "fp16"


def _image_shape(network: nn.Module) -> tuple[int, int, int]:
    """``(C, H, W)`` of the images, or latents, of a network of EDM's."""
    channels = getattr(network, "img_channels", None)
    size = getattr(network, "img_resolution", None)
    if not isinstance(channels, int) or not isinstance(size, int):
        raise ObjectiveError(
            f"network: {type(network).__name__} has no img_channels and img_resolution, as EDM's networks have"
        )
    return channels, size, size
