"""Whole models trained with `fastvae.ELBO`, one file per kind, to be read and copied from."""

from .image import MLP, Conv

__all__ = ["RECIPES"]

RECIPES = {recipe.recipe: recipe for recipe in (MLP, Conv)}
