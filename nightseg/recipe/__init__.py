"""Reading recipes: everything that is wrong with one is said in one message, before anything starts."""

from nightseg.recipe.inherit import presets
from nightseg.recipe.load import RecipeError, load_recipe, load_settings, save_recipe, told_of, written

__all__ = ["RecipeError", "load_recipe", "load_settings", "presets", "save_recipe", "told_of", "written"]
