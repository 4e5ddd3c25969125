"""Building blocks that the image recipes share: sizes of feature maps, dense layers and residual blocks."""

from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.train import networks
from fastvae.train.errors import InputError

__all__ = [
    "Pixels",
    "Residual",
    "Side",
    "channel_counts",
    "dense",
    "halving_sides",
    "residual_decoder",
    "residual_encoder",
    "upsampling_layer",
]

Side = tuple[int, int]
"""Height and width."""


def halving_sides(recipe: str, height: int, width: int) -> list[Side]:
    """Return the sides of an image and of its feature maps, each half as large, until the smaller side is 4 to 7.

    Odd sides are rounded up. Raises InputError for images with fewer than 8 pixels on a side.
    """
    if min(height, width) < 8:
        raise InputError(
            f"{recipe}: images must be at least 8 x 8 pixels, got {height} x {width}; mlp takes any size"
        )
    sides = [(height, width)]
    while min(sides[-1]) > 7:
        sides.append(((sides[-1][0] + 1) // 2, (sides[-1][1] + 1) // 2))
    return sides


def upsampling_layer(before: int, after: int, side: Side) -> nn.Module:
    """Return a transposed convolution that doubles a feature map to exactly this side.

    A side n becomes 2n - 1 if the result must be odd, and 2n otherwise. A kernel of 4 covers every pixel equally often;
    other kernels leave a chequerboard pattern.
    """
    odd = (side[0] % 2, side[1] % 2)
    return nn.ConvTranspose2d(before, after, 4, 2, padding=(1 + odd[0], 1 + odd[1]), output_padding=odd)


def dense(*sizes: int, activation: str = "relu") -> list[nn.Module]:
    """Return linear layers with an activation between them."""
    *inner, inputs, outputs = sizes
    layers: list[nn.Module] = []
    for before, after in pairwise((*inner, inputs)):
        layers += networks.hidden_layer(before, after, activation)
    return [*layers, nn.Linear(inputs, outputs)]


class Residual(nn.Module):
    """x plus two convolutions of it (He et al. 2016), the second of which is initialised to zero.

    A deep network therefore starts as a shallow one and trains without normalisation (Zhang et al. 2019).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def residual_encoder(sides: list[Side], inputs: int, outputs: int, channels: int, blocks: int) -> nn.Module:
    """Map images (B, inputs, *sides[0]) to (B, outputs). Each halving has `blocks` blocks and doubles the channels."""
    sizes = [inputs, *channel_counts(channels, len(sides) - 1)]
    layers: list[nn.Module] = []
    for (before, after), (height, width) in zip(pairwise(sizes), sides, strict=False):
        if layers:
            # A kernel of 4, as in the decoder. An odd side is padded to an even one.
            odd = [nn.ZeroPad2d((0, width % 2, 0, height % 2))] if width % 2 or height % 2 else []
            layers += [nn.SiLU(), *odd, nn.Conv2d(before, after, 4, 2, padding=1)]
        else:
            layers += [nn.Conv2d(before, after, 5, 2, padding=2)]
        layers += [Residual(after) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Flatten(), nn.Linear(sizes[-1] * prod(sides[-1]), outputs))


def residual_decoder(sides: list[Side], latent: int, outputs: int, channels: int, blocks: int) -> nn.Module:
    """Map z (B, latent) to (B, outputs, *sides[0]), mirroring the encoder."""
    sizes = channel_counts(channels, len(sides) - 1)
    small = (sizes[-1], *sides[-1])
    layers: list[nn.Module] = [nn.Linear(latent, prod(small)), nn.Unflatten(1, small)]
    for level in range(len(sides) - 1, 0, -1):
        width = sizes[level - 1]
        layers += [*(Residual(width) for _ in range(blocks)), nn.SiLU()]
        if level > 1:
            layers.append(upsampling_layer(width, sizes[level - 2], sides[level - 1]))
    return nn.Sequential(*layers, Pixels(sizes[0], outputs, sides[0]))


class Pixels(nn.Module):
    """Upsamples to full size with four pixels per position (Shi et al. 2016), which avoids wide layers at full size.

    The four pixels are initialised equally, so that training starts without a chequerboard (Aitken et al. 2017).
    """

    def __init__(self, inputs: int, outputs: int, side: Side) -> None:
        super().__init__()
        self.side = side
        self.convolution = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)
        with torch.no_grad():
            for parameter in self.convolution.parameters():
                parameter.copy_(parameter[::4].repeat_interleave(4, 0))

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.side  # either may be odd
        return F.pixel_shuffle(self.convolution(x), 2)[:, :, :height, :width]


def channel_counts(channels: int, halves: int) -> list[int]:
    """Return the number of channels after each halving: doubled each time, up to eight times the first."""
    return [channels * min(2**i, 8) for i in range(halves)]
