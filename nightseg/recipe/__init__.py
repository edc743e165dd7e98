"""Reading recipes: everything that is wrong with one is said in one message, before anything starts.

load.py      YAML and overrides to typed settings; the wording of errors
names.py     the names of a recipe as a graph: unknown names, cycles, missing folders
chain.py     rounds of a model as the models they stand for
schema.py    which keys and words the types allow at a place
"""

from nightseg.recipe.load import RecipeError, load_recipe, load_settings, presets, save_recipe

__all__ = ["RecipeError", "load_recipe", "load_settings", "presets", "save_recipe"]
