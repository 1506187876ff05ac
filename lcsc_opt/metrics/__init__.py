"""Images to numbers: features, the metrics of features, and the loss made of metrics.

::

    names.py            fid, kid@clip, precision@module:factory
    loss.py             weighted sums of metrics, and the metric that is kept
    suite_metrics.py    which metrics a search has, and which its reports have
    from_settings.py    the settings of a study file → extractors and real images, found → MetricSuite
    suite.py            the loss, the metrics, and their references
    image_metrics.py    images of one evaluation → loss, metrics, gradients: update, merge, compute
    feature_metrics.py  features of one extractor → FID, KID, ...: update, merge, compute

    frechet.py          moments of features, which merge; two means and covariances → FID
    distances.py        KID, precision and recall, metrics of single samples
    tones.py            one-dimensional distributions of values and of their differences
    extrapolation.py    distances corrected for the bias of few images
    shrinking.py        few real images: how far the loss's target is an average of the checkpoints
    leave_out.py        metrics without each of ten groups of images, for intervals
    extractors/         images → features [N, D]: published networks, and those of users
    bundled_images.py   small images without a download; extractors/bundled.py has feature networks for them
    reference/          the real images, in the features of an extractor; cached by content

torch-fidelity, transformers, torchvision and scikit-learn are imported only when they are used, so that importing this
package stays cheap.
"""

from lcsc_opt.metrics.extractors.base import FeatureExtractor, extract
from lcsc_opt.metrics.frechet import FrechetReference, Moments
from lcsc_opt.metrics.loss import Loss
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.suite import MetricSuite
from lcsc_opt.metrics.suite_metrics import SuiteMetrics

__all__ = [
    "FeatureExtractor",
    "FrechetReference",
    "Loss",
    "MetricSuite",
    "Moments",
    "Reference",
    "SuiteMetrics",
    "extract",
]
