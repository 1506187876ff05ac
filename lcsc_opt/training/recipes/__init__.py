"""The recipes that ``lcsc train`` knows."""

from lcsc_opt.training.recipes.base import Batch, TrainingRecipe
from lcsc_opt.training.recipes.consistency import Cd, Ct, Ect, Ict, Slct
from lcsc_opt.training.recipes.diffusion import Ddpm, Edm, Flow

RECIPES: dict[str, type[TrainingRecipe]] = {
    "ddpm": Ddpm,
    "edm": Edm,
    "ct": Ct,
    "ict": Ict,
    "cd": Cd,
    "ect": Ect,
    "flow": Flow,
    "slct": Slct,
}

__all__ = ["RECIPES", "Batch", "TrainingRecipe"]
