"""Merge → sample → score: coefficients → merged weights → images → features → FID."""

from lcsc_opt.merge_sample_score.objective import DEFAULT_IMAGES, MergeSampleScore

__all__ = ["DEFAULT_IMAGES", "MergeSampleScore"]
