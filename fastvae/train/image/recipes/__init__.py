"""Whole models of images trained with `fastvae.ELBO`, one file for each kind of network, to be read and copied from."""

from .conv import Conv
from .conv_lstm import ConvLSTM
from .mlp import MLP
from .residual import Colour, Photos
from .vae_gan import VAEGAN

__all__ = ["MLP", "VAEGAN", "Colour", "Conv", "ConvLSTM", "Photos"]
