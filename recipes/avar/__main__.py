# SPDX-License-Identifier: Apache-2.0
"""`python -m recipes.avar` prints the folder of the recipe: its configs, scripts and synthesis settings."""

from importlib.resources import files

print(files("recipes.avar"))
