"""Whole models trained with `fastvae.ELBO`, one file per kind, to be read and copied from."""

from fastvae.training.settings import Settings

from .counts import Counts
from .image import MLP, Conv
from .recurrent import ConvLSTM
from .residual import Colour, Photos
from .text import Text
from .vae_gan import VAEGAN

__all__ = ["RECIPES"]

RECIPES: dict[str, type[Settings]] = {
    recipe.recipe: recipe for recipe in (MLP, Conv, ConvLSTM, Colour, Photos, VAEGAN, Text, Counts)
}
