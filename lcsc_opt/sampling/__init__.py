"""From a merged model to images: noise that belongs to an image's index, and samplers."""

from lcsc_opt.sampling.base import DifferentiableSampler, Sampler
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.sampling.diffusers_sampler import DiffusersSampler, SchedulerSettings, build_scheduler
from lcsc_opt.sampling.edm import EdmDenoiser, HeunSampler, HeunSchedule
from lcsc_opt.sampling.function import FunctionSampler
from lcsc_opt.sampling.latents import DecoderSettings, LatentDecoder
from lcsc_opt.sampling.network import NetworkSettings, load_weights
from lcsc_opt.sampling.noise import ClassLabels, ImageNoise, Labels

__all__ = [
    "ClassLabels",
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
    "Sampler",
    "SchedulerSettings",
    "build_scheduler",
    "load_weights",
]
