"""The recipe `counts`: a VAE of cells and their genes after scVI (Lopez et al. 2018), or of rows of items or words.

The encoder gets log(1 + counts), or for the multinomial counts of unit length as in Mult-VAE (Liang et al. 2018), and
its first layer reads a sparse matrix. The decoder outputs logits for the share of each gene in a cell, which the
likelihood turns into rates: library size x softmax. Both get the batch and covariates of the cell, so that z need not
contain them. A linear decoder has no hidden layers, so that its weights can be read: those of a latent dimension are a
program of genes (Svensson et al. 2020), or a topic if softmax(z) gives the shares of topics (Srivastava and Sutton
2017).
`fastvae.train.counts.module` joins them with a `fastvae.ELBO`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae import likelihoods
from fastvae.likelihoods import Likelihood
from fastvae.nn import SparseLinear
from fastvae.train.networks import initialize, make_activation
from fastvae.train.settings import option

from .cells import Batch
from .conditions import Conditions
from .settings import CountsSettings

__all__ = ["Counts", "Decoder", "Encoder"]


@dataclass(frozen=True, kw_only=True)
class Counts(CountsSettings):
    """VAE of counts: of genes in cells, or with a multinomial likelihood of a user's items or a document's words."""

    recipe = "counts"

    likelihood: Literal["zinb", "nb", "poisson", "multinomial"] = option(
        "zinb",
        "zinb (zero-inflated negative binomial), nb (negative binomial), poisson, or multinomial (items of users, or "
        "words of documents; Mult-VAE).",
        "Model",
    )
    dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = option(
        "gene",
        "Dispersion of zinb and nb: gene (one per gene), gene-batch or gene-label (one per gene in each batch or "
        "label), or gene-cell (from the decoder).",
        "Model",
    )
    decoder: Literal["mlp", "linear", "topics"] = option(
        "mlp",
        "mlp (as many hidden layers as the encoder), linear (none; LDVAE), or topics (linear in softmax(z), the shares "
        "of the topics; ProdLDA).",
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
    dropout: float = option(0.1, "Dropout rate of the encoder's layers.", "Model", at_least=0, below=1)
    input_dropout: float = option(
        0.0, "Dropout rate of the encoder's input; 0.5 in Mult-VAE.", "Model", at_least=0, below=1
    )

    epochs: int = option(100, "Number of passes over the data.", "Training", at_least=1)
    batch_size: int = option(128, "Cells per batch, over all devices together.", "Training", at_least=1)
    warmup: Literal["none", "linear", "cyclical", "sigmoid"] = option(
        "linear", "Warm-up of the KL's weight to beta: none, linear, cyclical or sigmoid.", "Objective"
    )
    warmup_epochs: float = option(20.0, "Length of the warm-up in epochs.", "Objective", above=0)

    def networks(
        self, genes: int, batches: int, categories: tuple[int, ...] = ()
    ) -> tuple["Encoder", "Decoder"]:
        """Return encoder and decoder. `categories` are the number of categories of each covariate; see `Conditions`."""
        conditions = Conditions(batches, categories)
        shared, hidden = (genes, conditions, self.latent), [self.hidden] * self.layers
        heads = 1 + (self.likelihood == "zinb")
        heads += self.has_dispersion and self.dispersion == "gene-cell"
        encoder = Encoder(
            *shared,
            hidden,
            self.activation,
            self.dropout,
            self.input_dropout,
            unit_length=self.likelihood == "multinomial",
        )
        decoder = Decoder(
            *shared,
            hidden if self.decoder == "mlp" else [],
            self.activation,
            heads,
            shares=self.decoder == "topics",
        )
        for network in (encoder, decoder):
            initialize(network, self.init)
        return encoder, decoder

    @property
    def has_dispersion(self) -> bool:
        return self.likelihood in ("zinb", "nb")

    def make_likelihood(self, genes: int) -> Likelihood:
        if self.likelihood == "multinomial":
            return likelihoods.Multinomial(genes)
        if self.likelihood == "poisson":
            return likelihoods.Poisson()
        kind = (
            likelihoods.NegativeBinomial
            if self.likelihood == "nb"
            else likelihoods.ZeroInflatedNegativeBinomial
        )
        return kind(genes, "gene" if self.dispersion == "gene" else "gene-cell")


class Encoder(nn.Module):
    """Maps a batch of cells to (B, 2 latent), the posterior's mu and logvar.

    Its input is log(1 + counts) or, with `unit_length`, each cell's counts divided by their L2 norm.
    """

    def __init__(
        self,
        genes: int,
        conditions: Conditions,
        latent: int,
        hidden: list[int],
        activation: str,
        dropout: float,
        input_dropout: float,
        *,
        unit_length: bool,
    ) -> None:
        super().__init__()
        self.conditions, self.input_dropout, self.unit_length = conditions, input_dropout, unit_length
        first = SparseLinear(genes + conditions.width, hidden[0])
        self.layers = _layers(first, hidden, activation, dropout)
        self.posterior = nn.Linear(hidden[-1], 2 * latent)

    def forward(self, cells: Batch) -> Tensor:
        x = self.transform(cells.counts)
        if self.input_dropout and self.training:
            # Zeros stay zeros, so this is the dropout of the whole row.
            x = _map_values(x, lambda values: F.dropout(values, self.input_dropout))
        return self.read_transformed(x, cells.batch, cells.covariates)

    def transform(self, counts: Tensor) -> Tensor:
        """Return the input for counts (B, G), in the same layout."""
        return _unit_length(counts) if self.unit_length else _map_values(counts, torch.log1p)

    def read_transformed(self, x: Tensor, batch: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Map transformed counts (B, G), dense or sparse, the batches (B,) and covariates (B, K) to (B, 2 latent)."""
        return self.posterior(self.layers(self.conditions.append(x, batch, covariates)))


class Decoder(nn.Module):
    """Maps z (B, latent), the batches (B,) and covariates (B, K) to (B, G) each: the genes' logits and further
    parameters.

    Without hidden layers it is linear: in z or, with `shares`, in softmax(z).
    """

    def __init__(
        self,
        genes: int,
        conditions: Conditions,
        latent: int,
        hidden: list[int],
        activation: str,
        heads: int,
        *,
        shares: bool,
    ) -> None:
        super().__init__()
        self.conditions, self.latent, self.shares = conditions, latent, shares
        sizes = [latent + conditions.width, *hidden]
        self.layers = (
            _layers(nn.Linear(sizes[0], sizes[1]), hidden, activation, 0.0) if hidden else nn.Sequential()
        )
        self.heads = nn.ModuleList([nn.Linear(sizes[-1], genes) for _ in range(heads)])

    def forward(self, z: Tensor, batch: Tensor, covariates: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.shares:
            z = torch.softmax(z, 1)
        h = self.layers(self.conditions.append(z, batch, covariates))
        return tuple(head(h) for head in self.heads)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Return, of a linear decoder, the logits at the middle of z, (G,), and how they change along each latent
        dimension, (latent, G): by one unit, or to a single topic.

        The logits are those of the first batch and categories, and of the mean of continuous covariates.
        """
        head: Any = self.heads[0]
        weight = head.weight.detach().float()[:, : self.latent].T
        zeros = weight.new_zeros(1, self.latent + len(self.conditions.categories))
        z, covariates = zeros.split([self.latent, len(self.conditions.categories)], 1)
        batch = weight.new_zeros(1, dtype=torch.int64)
        with torch.no_grad():
            base = head(self.conditions.append(z, batch, covariates))[0].float()
        if not self.shares:
            return base, weight
        mean = weight.mean(0)
        return base + mean, weight - mean


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


def _map_values(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an elementwise function with f(0) = 0, to the stored values of a sparse matrix."""
    if x.layout != torch.sparse_csr:
        return function(x)
    parts = (x.crow_indices(), x.col_indices(), function(x.values()))
    return torch.sparse_csr_tensor(*parts, x.shape, check_invariants=False)


def _unit_length(x: Tensor) -> Tensor:
    """Return each row divided by its L2 norm. A row of zeros stays as it is."""
    if x.layout != torch.sparse_csr:
        return F.normalize(x, dim=1)
    lengths, exact = x.crow_indices().diff(), torch.promote_types(x.dtype, torch.float32)
    # index_add_ has no fixed order on a GPU. Squares of counts leave the range of half precision.
    norms = (
        torch.segment_reduce(x.values().to(exact).square(), "sum", lengths=lengths).sqrt().clamp(min=1e-12)
    )
    row = torch.repeat_interleave(lengths, output_size=len(x.values()))
    return _map_values(x, lambda values: (values / norms[row]).to(values.dtype))
