"""The recipes that ``lcsc train`` knows."""

from lcsc_opt.training.recipes.base import Batch, TrainingRecipe
from lcsc_opt.training.recipes.consistency import Cd, Ct, Ict
from lcsc_opt.training.recipes.diffusion import Ddpm, Edm, Flow

RECIPES: dict[str, type[TrainingRecipe]] = {recipe.name: recipe for recipe in (Ddpm, Edm, Ct, Ict, Cd, Flow)}

__all__ = ["RECIPES", "Batch", "TrainingRecipe"]
