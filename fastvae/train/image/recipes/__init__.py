"""Image models, one file for each architecture. They are meant to be read and adapted."""

from .conv import Conv
from .conv_lstm import ConvLSTM
from .mlp import MLP
from .resnet import Photos, ResNet
from .vae_gan import VAEGAN

__all__ = ["MLP", "VAEGAN", "Conv", "ConvLSTM", "Photos", "ResNet"]
