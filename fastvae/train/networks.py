"""Activations and initial weights of the networks, by the names that settings give them."""

from torch import nn

__all__ = ["initialize", "make_activation"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus,
}  # fmt: skip


def make_activation(name: str) -> nn.Module:
    """Return a new activation."""
    return _ACTIVATIONS[name]()


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
            if init == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
