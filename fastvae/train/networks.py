"""Layers, activations and initial weights of the networks, by the names that settings give them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Gated", "hidden_layer", "initialize", "make_activation"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus,
}  # fmt: skip


def make_activation(name: str) -> nn.Module:
    """Return a new activation."""
    return _ACTIVATIONS[name]()


class Gated(nn.Linear):
    """Gated linear units: a linear function of x times the sigmoid of another (Dauphin et al. 2017, equation 1).

    One layer computes both; the second half of its outputs are the gates.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(super().forward(x), -1)


def hidden_layer(inputs: int, outputs: int, activation: str) -> list[nn.Module]:
    """Return a linear layer with its activation, or a gated one."""
    if activation == "gated":
        return [Gated(inputs, outputs)]
    return [nn.Linear(inputs, outputs), make_activation(activation)]


def initialize(network: nn.Module, init: str) -> None:
    """Draw the weights of all linear layers again from torch's generator, and set their biases to zero.

    - default: nothing; torch has drawn weights and biases from U(-1/sqrt(n), 1/sqrt(n)) for n inputs.
    - xavier: uniform with variance 2 / (inputs + outputs) (Glorot and Bengio 2010, equation 16).
    - kaiming: normal with variance 2 / inputs (He et al. 2015, equation 10).
    """
    if init == "default":
        return
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            # Random numbers fill memory in its order, which may be any.
            drawn = torch.empty_like(layer.weight, memory_format=torch.contiguous_format)
            # The two functions of a gated layer are two layers.
            for weight in drawn.chunk(2) if isinstance(layer, Gated) else (drawn,):
                if init == "xavier":
                    nn.init.xavier_uniform_(weight)
                else:
                    nn.init.kaiming_normal_(weight)
            with torch.no_grad():
                layer.weight.copy_(drawn)
            nn.init.zeros_(layer.bias)
