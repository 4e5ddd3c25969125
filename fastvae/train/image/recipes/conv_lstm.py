"""The recipe `conv-lstm`: convolutions, and an LSTM over the lines of the feature map.

The encoder's LSTM reads the feature map line by line, and its last state gives mu and logvar. The decoder's LSTM gets z
at every step and writes a feature map line by line, which convolutions turn into an image.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from fastvae.train.image.layers import Side, halving_sides, upsampling_layer
from fastvae.train.image.settings import ImageSettings
from fastvae.train.settings import option

__all__ = ["ConvLSTM"]


@dataclass(frozen=True, kw_only=True)
class ConvLSTM(ImageSettings):
    """Convolutional VAE with LSTMs for images of at least 8 pixels, designed for 28."""

    recipe = "conv-lstm"

    channels: int = option(
        32, "Channels of the first convolution; the second has twice as many.", "Model", at_least=1
    )
    hidden: int = option(256, "Units of each LSTM.", "Model", at_least=1)

    def build(self, shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
        height, width, colours = shape
        sides = halving_sides(self.recipe, height, width)[:3]
        widths = [self.channels * 2**i for i in range(len(sides) - 1)]
        return (
            Encoder(sides, [colours, *widths], self.hidden, 2 * self.latent),
            Decoder(sides, [self.output_channels(colours), *widths], self.hidden, self.latent),
        )


class Encoder(nn.Module):
    """Maps images (B, C, H, W) to (B, outputs)."""

    def __init__(self, sides: list[Side], widths: list[int], hidden: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers)
        self.lstm = nn.LSTM(widths[-1] * sides[-1][1], hidden, batch_first=True)
        self.posterior = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        features = self.convolutions(x)  # (B, C, h, w)
        lines = features.transpose(1, 2).flatten(2)  # (B, h, C w)
        _, (last, _) = self.lstm(lines)
        return self.posterior(last[-1])


class Decoder(nn.Module):
    """Maps z (B, L) to (B, P, H, W)."""

    def __init__(self, sides: list[Side], widths: list[int], hidden: int, latent: int) -> None:
        super().__init__()
        (self.height, width), channels = sides[-1], widths[-1]
        self.lstm = nn.LSTM(latent, hidden, batch_first=True)
        self.line = nn.Linear(hidden, channels * width)
        self.unflatten = nn.Unflatten(2, (channels, width))
        layers: list[nn.Module] = []
        for i in range(len(sides) - 1, 0, -1):
            layers += [nn.SiLU(), upsampling_layer(widths[i], widths[i - 1], sides[i - 1])]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        states, _ = self.lstm(z.unsqueeze(1).expand(-1, self.height, -1))
        features = self.unflatten(self.line(states)).transpose(1, 2)  # (B, C, h, w)
        return self.convolutions(features)
