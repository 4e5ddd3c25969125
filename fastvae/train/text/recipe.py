"""The recipe `text`: a recurrent encoder, and a recurrent decoder that gets z at every step.

The encoder outputs 2 x latent numbers for each sentence, mu and logvar, and the decoder the logits of the next token at
every position (Bowman et al. 2016). `fastvae.train.text.module` joins them with a `fastvae.ELBO("categorical")`. Such a
decoder is strong enough to ignore z, and then the KL falls to 0. Word dropout, the warm-up of the KL and free bits
prevent this.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fastvae.train.settings import option

from .sentences import PAD, Batch
from .settings import TextSettings

__all__ = ["Decoder", "Encoder", "Text"]

State = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Text(TextSettings):
    """VAE of sentences: an LSTM or GRU encodes a sentence into z, and another decodes it."""

    recipe = "text"

    latent: int = option(16, "Number of latent dimensions.", "Model", at_least=1)
    cell: Literal["lstm", "gru"] = option("lstm", "Recurrent cell of both networks: lstm or gru.", "Model")
    embedding: int = option(200, "Dimensions of the token embeddings.", "Model", at_least=1)
    hidden: int = option(320, "Units of the encoder (per direction) and of the decoder.", "Model", at_least=1)
    bidirectional: bool = option(True, "Let the encoder read in both directions.", "Model")
    dropout: float = option(
        0.3,
        "Dropout rate of the embeddings and of the decoder's output.",
        "Model",
        at_least=0,
        below=1,
    )

    batch_size: int = option(64, "Sentences per batch, over all devices together.", "Training", at_least=1)
    lr: float = option(2e-3, "Learning rate of Adam.", "Training", above=0)
    word_dropout: float = option(
        0.1,
        "Share of the words that are hidden from the decoder, so that it has to use z.",
        "Training",
        at_least=0,
        at_most=1,
    )
    clip: float = option(5.0, "Clip the gradient to this norm; 0 turns clipping off.", "Training", at_least=0)
    free_bits: float = option(
        0.25,
        "KL in nats that each latent dimension may have at no cost (free bits).",
        "Objective",
        at_least=0,
    )
    warmup: Literal["none", "linear", "cyclical", "sigmoid"] = option(
        "linear", "Warm-up of the KL's weight to beta: none, linear, cyclical or sigmoid.", "Objective"
    )
    warmup_epochs: float = option(3.0, "Length of the warm-up in epochs.", "Objective", above=0)

    def networks(self, vocabulary: int) -> tuple["Encoder", "Decoder"]:
        """Build encoder and decoder for a vocabulary of this size."""
        shared = (vocabulary, self.embedding, self.hidden, self.latent, self.cell)
        return Encoder(*shared, self.dropout, self.bidirectional), Decoder(*shared, self.dropout)


class Encoder(nn.Module):
    """Maps a batch of sentences to (B, 2 latent), from the last state of each direction."""

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: int,
        latent: int,
        cell: str,
        dropout: float,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        self.rnn = _CELLS[cell](embedding, hidden, batch_first=True, bidirectional=bidirectional)
        self.posterior = nn.Linear((1 + bidirectional) * hidden, 2 * latent)

    def forward(self, batch: Batch) -> Tensor:
        lengths = (batch.words != PAD).sum(1).cpu()
        embedded = self.dropout(self.embedding(batch.words))
        # Packing skips the padding, so a sentence does not depend on the rest of its batch.
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        state = self.rnn(packed)[1]
        last = state[0] if isinstance(state, tuple) else state
        return self.posterior(torch.cat(last.unbind(), 1))


class Decoder(nn.Module):
    """Maps z (B, latent) and the previous tokens to the logits of the next ones, (B, T, V).

    z gives the initial state, and it is concatenated to every input token and to every output state.
    """

    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, latent: int, cell: str, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        self.state = nn.Linear(latent, (2 if cell == "lstm" else 1) * hidden)
        self.rnn = _CELLS[cell](embedding + latent, hidden, batch_first=True)
        self.to_embedding = nn.Linear(hidden + latent, embedding)
        # Input and output share one matrix (Press and Wolf 2017), which halves the parameters and lowers perplexity.
        self.logits = nn.Linear(embedding, vocabulary)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        self.logits.weight = self.embedding.weight
        nn.init.zeros_(self.logits.bias)

    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        return self.advance(z, tokens, self.initial_state(z))[0]

    def initial_state(self, z: Tensor) -> State:
        """Return the state before the first token."""
        return tuple(part.unsqueeze(0) for part in torch.tanh(self.state(z)).split(self.rnn.hidden_size, 1))

    def advance(self, z: Tensor, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits (B, T, V) after each of the tokens (B, T), and the state after the last one."""
        beside = z.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        read = torch.cat((self.dropout(self.embedding(tokens)), beside), 2)
        lstm = len(state) == 2
        out, after = self.rnn(read, state if lstm else state[0])
        to_embedding = self.to_embedding(torch.cat((self.dropout(out), beside), 2))
        return self.logits(to_embedding), after if lstm else (after,)


_CELLS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU}
