"""The recipe `counts`: a VAE of cells and their genes after scVI (Lopez et al. 2018).

The encoder gets log(1 + counts), and its first layer reads a sparse matrix. The decoder outputs logits for the share of
each gene in a cell, which the likelihood turns into rates: library size x softmax. Both get the batch of the cell, so
that z need not contain it.
`fastvae.train.counts.module` joins them with a `fastvae.ELBO`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae import likelihoods
from fastvae.likelihoods import Likelihood
from fastvae.nn import SparseLinear
from fastvae.train.networks import initialize, make_activation
from fastvae.train.settings import option

from .cells import Batch
from .settings import CountsSettings

__all__ = ["Counts", "Decoder", "Encoder"]


@dataclass(frozen=True, kw_only=True)
class Counts(CountsSettings):
    """VAE of single-cell RNA counts with a (zero-inflated) negative binomial or Poisson likelihood."""

    recipe = "counts"

    likelihood: Literal["zinb", "nb", "poisson"] = option(
        "zinb",
        "zinb (zero-inflated negative binomial), nb (negative binomial) or poisson.",
        "Model",
    )
    dispersion: Literal["gene", "gene-cell"] = option(
        "gene",
        "Dispersion of zinb and nb: gene (one per gene) or gene-cell (from the decoder).",
        "Model",
    )
    latent: int = option(10, "Number of latent dimensions.", "Model", at_least=1)
    hidden: int = option(128, "Units per hidden layer.", "Model", at_least=1)
    layers: int = option(1, "Hidden layers in the encoder and in the decoder.", "Model", at_least=1)
    activation: Literal["relu", "tanh", "elu", "silu", "gelu", "softplus"] = option(
        "relu", "Activation of the hidden layers: relu, tanh, elu, silu, gelu or softplus.", "Model"
    )
    init: Literal["default", "xavier", "kaiming"] = option(
        "default",
        "Initial weights: default (torch's), xavier (Glorot and Bengio 2010, uniform) or kaiming (He et al. 2015, "
        "normal). With the last two, biases start at 0.",
        "Model",
    )
    dropout: float = option(0.1, "Dropout rate of the encoder.", "Model", at_least=0, below=1)

    epochs: int = option(100, "Number of passes over the data.", "Training", at_least=1)
    batch_size: int = option(128, "Cells per batch, over all devices together.", "Training", at_least=1)
    warmup: Literal["none", "linear", "cyclical", "sigmoid"] = option(
        "linear", "Warm-up of the KL's weight to beta: none, linear, cyclical or sigmoid.", "Objective"
    )
    warmup_epochs: float = option(20.0, "Length of the warm-up in epochs.", "Objective", above=0)

    def networks(self, genes: int, batches: int) -> tuple["Encoder", "Decoder"]:
        shared = (genes, batches, self.latent, [self.hidden] * self.layers, self.activation)
        heads = 1 + (self.likelihood == "zinb")
        heads += self.likelihood != "poisson" and self.dispersion == "gene-cell"
        encoder, decoder = Encoder(*shared, self.dropout), Decoder(*shared, heads)
        for network in (encoder, decoder):
            initialize(network, self.init)
        return encoder, decoder

    def make_likelihood(self, genes: int) -> Likelihood:
        if self.likelihood == "poisson":
            return likelihoods.Poisson()
        kind = (
            likelihoods.NegativeBinomial
            if self.likelihood == "nb"
            else likelihoods.ZeroInflatedNegativeBinomial
        )
        return kind(genes, self.dispersion)


class Encoder(nn.Module):
    """Maps a batch of cells to (B, 2 latent), the posterior's mu and logvar."""

    def __init__(
        self, genes: int, batches: int, latent: int, hidden: list[int], activation: str, dropout: float
    ) -> None:
        super().__init__()
        self.batches = batches
        first = SparseLinear(genes + _width(batches), hidden[0])
        self.layers = _layers(first, hidden, activation, dropout)
        self.posterior = nn.Linear(hidden[-1], 2 * latent)

    def forward(self, cells: Batch) -> Tensor:
        return self.read_logs(_log1p(cells.counts), cells.batch)

    def read_logs(self, logs: Tensor, batch: Tensor) -> Tensor:
        """Map log(1 + counts), (B, G), dense or sparse, and the batches (B,) to (B, 2 latent)."""
        return self.posterior(self.layers(_append_batch(logs, batch, self.batches)))


class Decoder(nn.Module):
    """Maps z (B, latent) and the batches (B,) to (B, G) each: the genes' logits and other parameters."""

    def __init__(
        self, genes: int, batches: int, latent: int, hidden: list[int], activation: str, heads: int
    ) -> None:
        super().__init__()
        self.batches = batches
        self.layers = _layers(nn.Linear(latent + _width(batches), hidden[0]), hidden, activation, 0.0)
        self.heads = nn.ModuleList([nn.Linear(hidden[-1], genes) for _ in range(heads)])

    def forward(self, z: Tensor, batch: Tensor) -> tuple[Tensor, ...]:
        h = self.layers(_append_batch(z, batch, self.batches))
        return tuple(head(h) for head in self.heads)


def _layers(first: nn.Linear, hidden: list[int], activation: str, dropout: float) -> nn.Sequential:
    # LayerNorm, unlike BatchNorm, does not mix cells, so several processes give the same result.
    layers: list[nn.Module] = []
    for i, width in enumerate(hidden):
        layers += [
            nn.Linear(hidden[i - 1], width) if i else first,
            nn.LayerNorm(width),
            make_activation(activation),
            nn.Dropout(dropout),
        ]
    return nn.Sequential(*layers)


def _width(batches: int) -> int:
    return batches if batches > 1 else 0  # a single batch carries no information


def _log1p(x: Tensor) -> Tensor:
    """Return log(1 + x), of the stored values of a sparse matrix."""
    if x.layout != torch.sparse_csr:
        return torch.log1p(x)
    parts = (x.crow_indices(), x.col_indices(), torch.log1p(x.values()))
    return torch.sparse_csr_tensor(*parts, x.shape, check_invariants=False)


def _append_batch(x: Tensor, batch: Tensor, batches: int) -> Tensor:
    """Append a column for each batch, which is 1 in its cells and otherwise 0."""
    if batches < 2:
        return x
    if x.layout != torch.sparse_csr:
        return torch.cat((x, F.one_hot(batch, batches).to(x.dtype)), 1)
    starts, columns, values = x.crow_indices(), x.col_indices(), x.values()
    cells, genes = x.shape
    row = torch.arange(cells + 1, device=x.device)
    # Each row moves up by one place for every row before it, and its new value comes last.
    place = torch.arange(len(values), device=x.device)
    place += torch.repeat_interleave(row[:-1], starts.diff(), output_size=len(values))
    last = starts[1:] + row[:-1]
    new_columns, new_values = columns.new_empty(len(values) + cells), values.new_empty(len(values) + cells)
    new_columns[place], new_columns[last] = columns, (genes + batch).to(columns.dtype)
    new_values[place], new_values[last] = values, 1.0
    size = (cells, genes + batches)
    return torch.sparse_csr_tensor(starts + row, new_columns, new_values, size, check_invariants=False)
