"""From a merged model to images: noise that belongs to an image's index, and samplers."""

from lcsc_opt.sampling.autoguidance import Autoguidance
from lcsc_opt.sampling.base import DifferentiableSampler, Sampler
from lcsc_opt.sampling.consistency import ConsistencyFunction, noise_levels
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.sampling.diffusers_sampler import ALWAYS, SCHEDULERS, DiffusersSampler, SchedulerSettings, build_scheduler
from lcsc_opt.sampling.edm import EdmDenoiser, HeunSampler, HeunSchedule, RawOutput
from lcsc_opt.sampling.function import FunctionSampler
from lcsc_opt.sampling.latents import DecoderSettings, LatentDecoder, load_autoencoder
from lcsc_opt.sampling.network import NetworkSettings, PreparedNetwork, load_weights
from lcsc_opt.sampling.noise import ClassLabels, ImageNoise, Labels

__all__ = [
    "ALWAYS",
    "SCHEDULERS",
    "Autoguidance",
    "ClassLabels",
    "ConsistencyFunction",
    "DecoderSettings",
    "DifferentiableSampler",
    "DiffusersFolder",
    "DiffusersSampler",
    "EdmDenoiser",
    "FunctionSampler",
    "HeunSampler",
    "HeunSchedule",
    "ImageNoise",
    "Labels",
    "LatentDecoder",
    "NetworkSettings",
    "PreparedNetwork",
    "RawOutput",
    "Sampler",
    "SchedulerSettings",
    "build_scheduler",
    "load_autoencoder",
    "load_weights",
    "noise_levels",
]
