"""From a merged model to images: noise that belongs to an image's index, and samplers."""

from lcsc_opt.sampling.base import Sampler
from lcsc_opt.sampling.consistency import ConsistencyFunction, ConsistencySampler, noise_levels
from lcsc_opt.sampling.noise import ImageNoise

__all__ = ["ConsistencyFunction", "ConsistencySampler", "ImageNoise", "Sampler", "noise_levels"]
