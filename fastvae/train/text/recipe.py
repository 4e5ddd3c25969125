"""The recipe for text: `text`, a recurrent encoder and a recurrent decoder that sees z at every step.

To read as an example: the encoder gives 2 x latent numbers for each sentence, mu and logvar, the decoder logits of the
next token at every position (Bowman et al. 2016). They meet a `fastvae.ELBO("categorical")` in
`fastvae.train.text.module`. A decoder as able as this one can do without z, and then the KL falls to 0: word dropout,
the warm-up of the KL and free bits are there to keep it from that.
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
    """A VAE of sentences: an LSTM or GRU reads a sentence into z, another writes it from z."""

    recipe = "text"

    latent: int = option(16, "Latent dimensions.", "Model", at_least=1)
    cell: Literal["lstm", "gru"] = option("lstm", "Of the encoder and the decoder: lstm or gru.", "Model")
    embedding: int = option(200, "Dimensions of a token's embedding.", "Model", at_least=1)
    hidden: int = option(
        320, "Units of the encoder (in each direction) and of the decoder.", "Model", at_least=1
    )
    bidirectional: bool = option(True, "The encoder reads from both ends.", "Model")
    dropout: float = option(
        0.3, "Of embeddings and of the decoder's output, in training.", "Model", at_least=0, below=1
    )

    batch_size: int = option(64, "Sentences in a batch, over all devices together.", "Training", at_least=1)
    lr: float = option(2e-3, "Learning rate of Adam.", "Training", above=0)
    word_dropout: float = option(
        0.1,
        "Share of the words that are hidden from the decoder, so that it has to ask z.",
        "Training",
        at_least=0,
        at_most=1,
    )
    clip: float = option(5.0, "Largest norm of the gradient; 0: not clipped.", "Training", at_least=0)
    free_bits: float = option(
        0.25, "Nats of KL that each latent dimension has at no cost; 0: none.", "Objective", at_least=0
    )
    warmup: Literal["none", "linear", "cyclical", "sigmoid"] = option(
        "linear", "How the weight of the KL rises to beta: none, linear, cyclical or sigmoid.", "Objective"
    )
    warmup_epochs: float = option(3.0, "Over how many epochs.", "Objective", above=0)

    def networks(self, vocabulary: int) -> tuple["Encoder", "Decoder"]:
        """Encoder and decoder for so many tokens."""
        shared = (vocabulary, self.embedding, self.hidden, self.latent, self.cell)
        return Encoder(*shared, self.dropout, self.bidirectional), Decoder(*shared, self.dropout)


class Encoder(nn.Module):
    """A batch of sentences to (B, 2 latent), from the last state of each direction."""

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
        # Packed, so that a sentence's padding, and with it the rest of its batch, is not read.
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        state = self.rnn(packed)[1]
        last = state[0] if isinstance(state, tuple) else state
        return self.posterior(torch.cat(last.unbind(), 1))


class Decoder(nn.Module):
    """z (B, latent) and the tokens so far to logits of the next ones, (B, T, V).

    z makes the first state and stands beside every token that is read, and beside every state that is written from.
    """

    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, latent: int, cell: str, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        self.state = nn.Linear(latent, (2 if cell == "lstm" else 1) * hidden)
        self.rnn = _CELLS[cell](embedding + latent, hidden, batch_first=True)
        self.narrow = nn.Linear(hidden + latent, embedding)
        # One matrix for reading and writing (Press and Wolf 2017): half the parameters, and better perplexities.
        self.logits = nn.Linear(embedding, vocabulary)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        self.logits.weight = self.embedding.weight
        nn.init.zeros_(self.logits.bias)

    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        return self.advance(z, tokens, self.begin(z))[0]

    def begin(self, z: Tensor) -> State:
        """The state before the first token."""
        return tuple(part.unsqueeze(0) for part in torch.tanh(self.state(z)).split(self.rnn.hidden_size, 1))

    def advance(self, z: Tensor, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, T, V) after each of the tokens (B, T), and the state after the last."""
        beside = z.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        read = torch.cat((self.dropout(self.embedding(tokens)), beside), 2)
        lstm = len(state) == 2
        out, after = self.rnn(read, state if lstm else state[0])
        narrow = self.narrow(torch.cat((self.dropout(out), beside), 2))
        return self.logits(narrow), after if lstm else (after,)


_CELLS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU}
