"""The recipes that ``lcsc train`` knows."""

from lcsc_opt.training.recipes.base import Batch, TrainingRecipe
from lcsc_opt.training.recipes.consistency import Cd, Ct, Ect, Ict, Slct
from lcsc_opt.training.recipes.diffusion import Ddpm, Edm, Flow

RECIPES: dict[str, type[TrainingRecipe]] = {recipe.name: recipe for recipe in (Ddpm, Edm, Ct, Ict, Cd, Ect, Flow, Slct)}

__all__ = ["RECIPES", "Batch", "TrainingRecipe"]
