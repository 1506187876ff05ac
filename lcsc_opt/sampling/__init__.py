"""From a merged model to images: noise that belongs to an image's index, and samplers."""

from lcsc_opt.sampling.base import DifferentiableSampler, Sampler
from lcsc_opt.sampling.consistency import ConsistencyFunction, noise_levels
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.sampling.diffusers_sampler import SCHEDULERS, DiffusersSampler, SchedulerSettings, build_scheduler
from lcsc_opt.sampling.edm import EdmDenoiser, HeunSampler, HeunSchedule
from lcsc_opt.sampling.function import FunctionSampler
from lcsc_opt.sampling.latents import DecoderSettings, LatentDecoder, load_autoencoder
from lcsc_opt.sampling.network import NetworkSettings, PreparedNetwork, load_weights
from lcsc_opt.sampling.noise import ClassLabels, ImageNoise, Labels

__all__ = [
    "SCHEDULERS",
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
    "Sampler",
    "SchedulerSettings",
    "build_scheduler",
    "load_autoencoder",
    "load_weights",
    "noise_levels",
]
