"""The results of a search: figures, the merged model as a file, and the recipe to make it again elsewhere.

``figures`` keeps figures with the study, ``recipe`` says how a model was merged, ``writing`` writes models and
``model_folder`` those that diffusers loads, ``rebuild`` makes a model again from its recipe, and ``averaging`` merges
checkpoints without a study.
"""

from lcsc_opt.database.summary import chosen_trial
from lcsc_opt.exports.figures import attach_figures
from lcsc_opt.exports.recipe import Recipe, read_recipe

__all__ = [
    "Recipe",
    "attach_figures",
    "chosen_trial",
    "read_recipe",
]
