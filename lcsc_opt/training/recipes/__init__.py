"""The recipes that ``lcsc train`` knows, one file each."""

from lcsc_opt.training.recipes.base import Batch, Recipe
from lcsc_opt.training.recipes.cd import Cd
from lcsc_opt.training.recipes.ct import Ct
from lcsc_opt.training.recipes.ddpm import Ddpm
from lcsc_opt.training.recipes.ect import Ect
from lcsc_opt.training.recipes.edm import Edm
from lcsc_opt.training.recipes.flow import Flow
from lcsc_opt.training.recipes.ict import Ict
from lcsc_opt.training.recipes.slct import Slct

RECIPES: dict[str, type[Recipe]] = {
    "ddpm": Ddpm,
    "edm": Edm,
    "ct": Ct,
    "ict": Ict,
    "cd": Cd,
    "ect": Ect,
    "flow": Flow,
    "slct": Slct,
}

__all__ = ["RECIPES", "Batch", "Recipe"]
