"""Images to numbers: features, the metrics of features, and the loss made of metrics.

::

    names.py        fid, kid@clip, precision@module:factory, and weighted sums of them
    comparison.py   one set of samples beside the reference: FID, KID, Inception Score, precision, recall
    loss.py         the weighted sum that a search minimizes, and the way back from it to images
    parts.py        an evaluation whose images are spread over processes or devices, put together
    accumulator.py  takes the images of one evaluation, batch by batch
    scores.py       settings → Scores: images in, loss and metrics out
    keeping.py      a metric that a search may not make worse than at EMA*
    judges.py       the default metrics of held-out reports; cross_check.py: FID in features that the loss does not use
    from_settings.py  the settings of a study file → Scores

    frechet.py      two means and covariances → FID, with everything about the reference computed once
    distances.py    KID, in torch-fidelity's subsets; precision and recall, in blocks
    fidelity.py     distances that see single samples, clusters and projections
    statistics.py   count, mean and scatter of features, which merge; reference statistics and their file
    extractors/     images → features [N, D]: published networks, and those of users
    reference/      the real images, as an extractor sees them; kept by content

torch-fidelity, torchvision and scikit-learn are imported only where they are used, so that importing this package stays
cheap.
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
