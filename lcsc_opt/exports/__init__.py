"""The results of a search: images, the merged model as a file, and the recipe to make it again elsewhere.

``recipe`` says how a model was merged, ``merging`` makes models (of a study, of a recipe, without a study) in the forms
of ``writing``, and ``images`` keeps images with the study.
"""

from lcsc_opt.exports.recipe import Recipe

__all__ = ["Recipe"]
