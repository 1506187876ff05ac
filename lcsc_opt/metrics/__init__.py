"""Images to numbers: features, their statistics, and the Fréchet distance between two sets of them.

::

    features.py     the contract of a feature extractor; images → features [N, D]
    statistics.py   count, mean and scatter of features, which merge; reference statistics and their file
    frechet.py      two means and covariances → FID, with everything about the reference computed once
    digits.py       an extractor for 8×8 digits, trained here in seconds (needs scikit-learn)
    inception.py    the Inception network that published FIDs are computed with (needs torch-fidelity)

The last two are imported by name where they are used, so that importing this package stays cheap.
"""

from lcsc_opt.metrics.features import FeatureExtractor, extract
from lcsc_opt.metrics.frechet import FrechetReference, frechet_distance
from lcsc_opt.metrics.statistics import FeatureStatistics, ReferenceStatistics, reference_warning

__all__ = [
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetReference",
    "ReferenceStatistics",
    "extract",
    "frechet_distance",
    "reference_warning",
]
