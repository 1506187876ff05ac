"""What a search leaves behind: figures, the merged model as a file, and the recipe to make it again elsewhere.

``figures`` are artifacts of the chosen trial, ``recipe`` says how a model was merged, ``exports`` writes models,
``model_folder`` writes those that diffusers loads, ``rebuild`` makes a model again from its recipe.
"""

from lcsc_opt.results.figures import artifact_directory, attach_figures, copy_image_pairs, samples_images
from lcsc_opt.results.recipe import Recipe, chosen_trial, read_recipe

__all__ = [
    "Recipe",
    "artifact_directory",
    "attach_figures",
    "chosen_trial",
    "copy_image_pairs",
    "read_recipe",
    "samples_images",
]
