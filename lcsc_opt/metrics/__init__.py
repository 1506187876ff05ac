"""Images to numbers: features, what metrics make of them, and the loss that metrics make.

::

    scores.py           settings → Scores: images in, loss and metrics out
    accumulator.py      takes the images of one evaluation; the loss, and its gradient in the features
    names.py            fid, kid@clip, precision@module:factory, and weighted sums of them
    reduction.py        features, batch by batch, to count, mean and scatter on their device
    parts.py            an evaluation whose images are spread over processes or devices, put together
    comparison.py       one set of samples beside the reference: FID, KID, Inception Score, precision, recall

    frechet.py          two means and covariances → FID, with everything about the reference computed once
    kernel.py           KID's distance, in torch-fidelity's subsets
    neighbours.py       precision and recall, in blocks
    statistics.py       count, mean and scatter of features, which merge; reference statistics and their file

    reference.py        the real images, seen by one extractor
    build_reference.py  the setting ``reference`` → that; kept by content
    reference_files.py  statistics, features and images of other code bases
    images.py           folders, zip files and arrays of images; datasets.py: torchvision's

    features.py         the contract of a feature extractor; images → features [N, D]
    graphs.py           features with a graph, and gradients in features → gradients in images
    extractors.py       inception.py, clip.py, dinov2.py and module:factory by name
    classifier.py       extractors that are trained here in seconds, for small images (digits.py, photographs.py)

What needs torch-fidelity, torchvision or scikit-learn imports them where it uses them, so that importing this package
stays cheap.
"""

from lcsc_opt.metrics.extractors.base import FeatureExtractor, extract
from lcsc_opt.metrics.frechet import FrechetReference, frechet_distance
from lcsc_opt.metrics.loss import View
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.scores import Scores
from lcsc_opt.metrics.statistics import FeatureStatistics, ReferenceStatistics, reference_warning

__all__ = [
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetReference",
    "Reference",
    "ReferenceStatistics",
    "Scores",
    "View",
    "extract",
    "frechet_distance",
    "reference_warning",
]
