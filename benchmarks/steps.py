"""Whole training steps with the hand-written loss and with fastvae's, eager and compiled: does it pay for my model?

    python -m benchmarks.steps [--steps NAME ...] [--budget SECONDS] [--save]

The network, the optimiser (Adam, fused) and the batch are the same on all sides. `compiled` is torch.compile of the
model and the hand-written loss together, `compiled + fused` of the model with fastvae's loss. Of scvi-tools' own
model, where that is installed, there are the eager sides. The sides take turns in one process, and times are medians.
`loss` is the share of the eager step that drawing z, the KL and the reconstruction take, forward and backward. Peak
memory is what a step holds at most above what is there before it.

`--save` keeps the figures in benchmarks/results/steps-<machine>.json, draws benchmarks/results/steps.png, and puts the
short table into README.md and the whole one into docs/benchmarks.md.
"""

import argparse
import importlib.util
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae
from fastvae.integrations.scvi import accelerate

from . import cases, machine, scvi
from .report import PAGE, RESULTS, ROOT, put_between, slug
from .timing import peak_bytes

SIDES = ("eager", "compiled", "fused", "compiled + fused")
FEWEST_ROUNDS = 5


class VAE(nn.Module):
    """An encoder and a decoder, and the loss as fastvae has it and as users write it."""

    def __init__(self, elbo: fastvae.ELBO) -> None:
        super().__init__()
        self.elbo = elbo

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(mu, logvar)"""
        raise NotImplementedError

    def decode(self, z: Tensor, x: Tensor) -> Any:
        """What the likelihood takes. Only a decoder that reads the words before looks at x."""
        raise NotImplementedError

    def written_loss(self, decoded: Any, x: Tensor, kld: Tensor) -> Tensor:
        """The same loss by hand, from the KL summed over the batch."""
        raise NotImplementedError

    def loss_alone(self, x: Tensor) -> Callable[[], Tensor]:
        """The part of the eager step that is the loss: z, the KL and the reconstruction, forward and backward."""
        with torch.no_grad():
            mu, logvar = self.encode(x)
            decoded = self.decode(mu, x)
        mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        tensors = [decoded] if isinstance(decoded, Tensor) else list(decoded)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]

        def run() -> Tensor:
            z = cases._written_sample(mu, logvar)
            given = leaves[0] if isinstance(decoded, Tensor) else tuple(leaves)
            loss = self.written_loss(given, x, cases._written_kld(mu, logvar))
            inputs = [mu, logvar, *leaves, *self.elbo.parameters()]
            torch.autograd.grad([loss, z.sum()], inputs, allow_unused=True)
            return loss.detach()

        return run

    def fused(self, x: Tensor) -> Tensor:
        mu, logvar = self.encode(x)
        z, kl = self.elbo.reparameterize(mu, logvar)
        return self.elbo(self.decode(z, x), x, kl=kl).loss

    def written(self, x: Tensor) -> Tensor:
        mu, logvar = self.encode(x)
        z = cases._written_sample(mu, logvar)
        return self.written_loss(self.decode(z, x), x, cases._written_kld(mu, logvar))


class Dense(VAE):
    """The fully connected VAE of the tutorials, on images of MNIST's size."""

    def __init__(self) -> None:
        super().__init__(fastvae.ELBO("bernoulli"))
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))

    @staticmethod
    def batch() -> Tensor:
        return torch.rand(128, 784)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x).chunk(2, 1)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z)

    def written_loss(self, decoded: Tensor, x: Tensor, kld: Tensor) -> Tensor:
        return cases._written_bernoulli(decoded, x, kld)[0]


class ImportanceWeighted(VAE):
    """The model of Burda et al. 2016, whose bound takes 50 draws of z for each image."""

    DRAWS, LATENT = 50, 50

    def __init__(self) -> None:
        super().__init__(fastvae.ELBO("bernoulli"))
        self.encoder = _tanh_layers(784, 200, 200, 2 * self.LATENT)
        self.decoder = _tanh_layers(self.LATENT, 200, 200, 784)

    @staticmethod
    def batch() -> Tensor:
        return (torch.rand(100, 784) < 0.2).float()

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x).chunk(2, 1)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z)

    def fused(self, x: Tensor) -> Tensor:
        return self._bound(x, self._fused_nll)

    def written(self, x: Tensor) -> Tensor:
        return self._bound(x, self._written_nll)

    def _bound(self, x: Tensor, nll: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The negative bound; log q and log p, which are small, are the same on all sides."""
        mu, logvar = self.encode(x)
        eps = torch.randn(self.DRAWS, *mu.shape)
        z = mu + eps * torch.exp(0.5 * logvar)
        log_ratio = 0.5 * (eps.square() + logvar - z.square()).sum(-1)  # log p(z) - log q(z|x)
        log_weights = log_ratio - nll(self.decode(z, x), x)
        return math.log(self.DRAWS) - torch.logsumexp(log_weights, 0).mean()

    @staticmethod
    def _fused_nll(recon: Tensor, x: Tensor) -> Tensor:
        return fastvae.functional.bernoulli_nll(recon, x, draws=len(recon))

    @staticmethod
    def _written_nll(recon: Tensor, x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(recon, x.expand_as(recon), reduction="none").sum(-1)

    def loss_alone(self, x: Tensor) -> Callable[[], Tensor]:
        """The reconstruction of every draw, forward and backward."""
        with torch.no_grad():
            mu, logvar = self.encode(x)
            z = mu + torch.randn(self.DRAWS, *mu.shape) * torch.exp(0.5 * logvar)
            recon = self.decode(z, x)
        recon.requires_grad_()
        return lambda: torch.autograd.grad(self._written_nll(recon, x).sum(), recon)[0]


def _tanh_layers(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Convolutional(VAE):
    """Strided convolutions, halving `side` to 4 pixels, and their transposes; `planes` of the decoder's output."""

    def __init__(self, elbo: fastvae.ELBO, side: int, planes: int, latent: int = 64) -> None:
        super().__init__(elbo)
        halvings = (side // 4).bit_length() - 1
        widths = [32 << i for i in range(halvings)]
        down: list[nn.Module] = []
        for before, after in zip([3, *widths], widths, strict=False):
            down += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(16 * widths[-1], 2 * latent))
        up: list[nn.Module] = [
            nn.Linear(latent, 16 * widths[-1]),
            nn.Unflatten(1, (widths[-1], 4, 4)),
            nn.ReLU(),
        ]
        for before, after in zip(widths[::-1], widths[-2::-1], strict=False):
            up += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.ReLU()]
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(widths[0], planes, 4, 2, 1))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x / 127.5 - 1 if x.dtype == torch.uint8 else x).chunk(2, 1)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z)


class Photographs(Convolutional):
    """64 x 64 colour images, a Gaussian whose mean and log-variance are a packed head."""

    def __init__(self) -> None:
        super().__init__(fastvae.ELBO(fastvae.likelihoods.Gaussian("per_element")), 64, 6)

    @staticmethod
    def batch() -> Tensor:
        return torch.rand(64, 3, 64, 64)

    def written_loss(self, decoded: Tensor, x: Tensor, kld: Tensor) -> Tensor:
        return cases._written_head(decoded, x, kld)[0]


class Levels(Convolutional):
    """32 x 32 colour images as bytes, a mixture of ten discretised logistics."""

    def __init__(self) -> None:
        super().__init__(fastvae.ELBO(fastvae.likelihoods.DiscretizedLogisticMixture(10)), 32, 100)

    @staticmethod
    def batch() -> Tensor:
        return torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)

    def written_loss(self, decoded: Tensor, x: Tensor, kld: Tensor) -> Tensor:
        return cases._written_mixture(decoded, x, kld)[0]


class Cells(VAE):
    """After scVI: 20,000 genes, zero-inflated negative binomials of the decoder's raw outputs."""

    GENES = 20_000

    def __init__(self) -> None:
        super().__init__(fastvae.ELBO(fastvae.likelihoods.ZeroInflatedNegativeBinomial(self.GENES)))
        self.encoder = nn.Sequential(nn.Linear(self.GENES, 128), nn.ReLU(), nn.Linear(128, 20))
        self.hidden = nn.Sequential(nn.Linear(10, 128), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(128, self.GENES) for _ in range(2))

    @classmethod
    def batch(cls) -> Tensor:
        present = torch.rand(128, cls.GENES) < 0.09
        return (1 + torch.poisson(torch.exp(torch.randn(128, cls.GENES)))) * present

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(torch.log1p(x)).chunk(2, 1)

    def decode(self, z: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        h = self.hidden(z)
        return self.heads[0](h), x.sum(1, keepdim=True), self.heads[1](h)

    def written_loss(self, decoded: tuple[Tensor, ...], x: Tensor, kld: Tensor) -> Tensor:
        logits, library, zi_logits = decoded
        log_theta = self.elbo.likelihood.log_dispersion
        kl = (kld / len(x)).expand(len(x))
        return cases._written_zinb_raw(logits, log_theta, zi_logits, library.squeeze(1), x, kl)[0]


class Sentences(VAE):
    """LSTMs that read and write sentences of 20 words, out of 10,000."""

    WORDS, HIDDEN, LATENT = 10_000, 256, 16

    def __init__(self) -> None:
        super().__init__(fastvae.ELBO("categorical"))
        self.embedding = nn.Embedding(self.WORDS, self.HIDDEN)
        self.reader = nn.LSTM(self.HIDDEN, self.HIDDEN, batch_first=True)
        self.latent = nn.Linear(self.HIDDEN, 2 * self.LATENT)
        self.writer = nn.LSTM(self.HIDDEN + self.LATENT, self.HIDDEN, batch_first=True)
        self.words = nn.Linear(self.HIDDEN, self.WORDS)

    @classmethod
    def batch(cls) -> Tensor:
        return torch.randint(cls.WORDS, (32, 20))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        _, (h, _) = self.reader(self.embedding(x))
        return self.latent(h[0]).chunk(2, 1)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        before = self.embedding(torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1))
        h, _ = self.writer(torch.cat((before, z.unsqueeze(1).expand(-1, x.shape[1], -1)), 2))
        return self.words(h)

    def written_loss(self, decoded: Tensor, x: Tensor, kld: Tensor) -> Tensor:
        return cases._written_categorical(decoded, x, kld)[0]


class ScviTools(nn.Module):
    """The module of scvi-tools' SCVI, ZINB, as its own training calls it; `fused` is with `accelerate`."""

    sides = ("eager", "fused")

    def __init__(self) -> None:
        super().__init__()
        self.model = _scvi_model()
        self.module = self.model.module

    @staticmethod
    def batch() -> dict[str, Tensor]:
        model = _scvi_model()
        return next(iter(model._make_data_loader(adata=model.adata, batch_size=scvi.BATCH)))

    def written(self, x: dict[str, Tensor]) -> Tensor:
        return self.module(x)[2].loss

    def fused(self, x: dict[str, Tensor]) -> Tensor:
        with accelerate(strict=True):
            return self.written(x)

    def loss_alone(self, x: dict[str, Tensor]) -> Callable[[], Tensor]:
        """The reconstruction, forward and backward."""
        from scvi.distributions import ZeroInflatedNegativeBinomial

        p = self.module(x)[1]["px"]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (p.mu, p.theta, p.zi_logits)]

        def run() -> Tensor:
            mu, theta, zi_logits = leaves
            p = ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=zi_logits)
            return torch.autograd.grad(p.log_prob(x["X"]).sum(), leaves)[0]

        return run


def _scvi_model() -> Any:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return scvi.made(scvi.ROWS["zinb"])


STEPS: dict[str, tuple[str, type[VAE] | type[ScviTools]]] = {
    "scvi": ("scvi-tools' SCVI, ZINB, 128 cells x 20,000 genes", ScviTools),
    "counts": ("ZINB, 128 cells x 20,000 genes", Cells),
    "levels": ("discretised logistic mixture, 32 x 3 x 32 x 32", Levels),
    "importance": ("MLP of IWAE, 50 draws, Bernoulli, batch 100", ImportanceWeighted),
    "text": ("LSTM, 32 sentences x 20 of 10,000 words", Sentences),
    "photographs": ("conv, Gaussian with variances, 64 x 3 x 64 x 64", Photographs),
    "dense": ("MLP 784-400-20, Bernoulli, batch 128", Dense),
}


@dataclass
class Result:
    name: str
    milliseconds: dict[str, float]
    loss_share: float
    peak_bytes: dict[str, int]
    rounds: int

    def faster(self, side: str, than: str) -> float:
        """How many times; NaN where a side is missing."""
        return self.milliseconds.get(than, math.nan) / self.milliseconds.get(side, math.nan)

    def memory(self, side: str, than: str) -> float:
        return self.peak_bytes.get(side, math.nan) / self.peak_bytes.get(than, math.nan)

    def row(self) -> list[str]:
        return [
            self.name,
            f"{self.milliseconds['eager']:.1f}",
            f"{self.loss_share:.0%}",
            _times(self.faster("fused", "eager")),
            _times(self.faster("compiled", "eager")),
            _times(self.faster("compiled + fused", "compiled")),
            _times(self.memory("fused", "eager")),
            _times(self.memory("compiled + fused", "compiled")),
        ]


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}"


HEAD = [
    "training step", "eager, ms", "loss", "fused: × eager", "compiled: × eager", "compiled + fused: × compiled",
    "memory: fused / eager", "memory: compiled + fused / compiled",
]  # fmt: skip


def measure(name: str, budget: float) -> Result:
    """Times the sides of one step in turns for about `budget` seconds, after a check that their losses agree."""
    title, kind = STEPS[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = kind.batch()
    steps: dict[str, Callable[[], Tensor]] = {}
    losses = {}
    measured = getattr(kind, "sides", SIDES)
    for side in measured:
        torch.manual_seed(1)
        model = kind()
        loss = model.fused if "fused" in side else model.written
        losses[side] = torch.stack([loss(x).detach() for _ in range(3)]).mean()
        if "compiled" in side:
            loss = torch.compile(loss, dynamic=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def step(
            loss: Callable[[Tensor], Tensor] = loss, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            value = loss(x)
            value.backward()
            optimizer.step()
            return value

        steps[side] = step
    for side, value in losses.items():  # each draws noise of its own
        assert abs(value - losses["eager"]) < 0.02 * abs(losses["eager"]), (
            f"{title}: the loss of {side} is another"
        )

    steps["loss"] = kind().loss_alone(x)
    times: dict[str, list[float]] = {side: [] for side in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    stop, sides, rounds = time.perf_counter() + budget, list(steps), 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() < stop:
        for side in sides[rounds % len(sides) :] + sides[: rounds % len(sides)]:
            start = time.perf_counter()
            steps[side]()
            times[side].append(time.perf_counter() - start)
        rounds += 1
    medians = {side: 1e3 * statistics.median(seconds) for side, seconds in times.items()}
    share = medians.pop("loss") / medians["eager"]
    peak = {side: peak_bytes(steps[side], torch.device("cpu")) for side in measured}
    return Result(title, medians, share, peak, rounds)


def table(results: list[Result]) -> list[str]:
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "--:|" * (len(HEAD) - 1)]
    return lines + ["| " + " | ".join(result.row()) + " |" for result in results]


def short_table(results: list[Result]) -> list[str]:
    """README's. The last column compares the faster hand-written step with the faster one of fastvae."""
    lines = [
        "| training step | share of the loss | eager | compiled | best against best |",
        "|---|--:|--:|--:|--:|",
    ]
    for result in results:
        ms = result.milliseconds
        by_hand = min(time for side, time in ms.items() if "fused" not in side)
        ours = min(time for side, time in ms.items() if "fused" in side)
        ratios = (
            result.faster("fused", "eager"),
            result.faster("compiled + fused", "compiled"),
            by_hand / ours,
        )
        cells = " | ".join(_times(ratio) for ratio in ratios)
        lines.append(f"| {result.name} | {result.loss_share:.0%} | {cells} |")
    return lines


def draw(results: list[Result], title: str) -> None:
    """Left: how much faster a step gets than the hand-written one of its kind. Right: its peak memory beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(11, 0.7 * len(results) + 1.6), sharey=True, layout="constrained"
    )
    pairs = (("fused", "eager", "#1b7f5c"), ("compiled + fused", "compiled", "#4a6fa5"))
    for offset, (side, than, colour) in zip((-0.2, 0.2), pairs, strict=True):
        places = [i + offset for i in range(len(results))]
        label = f"{than} model: fastvae's loss against the hand-written one"
        faster = [result.faster(side, than) for result in results]
        speed.bar_label(
            speed.barh(places, faster, 0.38, color=colour, label=label),
            [_times(value) for value in faster],
            padding=3,
            fontsize=9,
        )
        shares = [result.memory(side, than) for result in results]
        memory.bar_label(
            memory.barh(places, shares, 0.38, color=colour),
            [_times(value) for value in shares],
            padding=3,
            fontsize=9,
        )
    speed.set_yticks(
        range(len(results)),
        [f"{result.name}\n(loss: {result.loss_share:.0%} of the step)" for result in results],
    )
    speed.invert_yaxis()
    speed.set_xlabel("speed of a whole training step, hand-written loss = 1")
    memory.set_xlabel("peak memory of a step, hand-written loss = 1")
    for axes in (speed, memory):
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *speed.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(RESULTS / "steps.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n\n")[0])
    here = [name for name in STEPS if name != "scvi" or importlib.util.find_spec("scvi")]
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=here, help="which of them")
    parser.add_argument(
        "--budget", type=float, default=30.0, help="seconds for each, compilation not counted"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="keep the figures and draw the picture")
    options = parser.parse_args()

    machine.settle("cpu", options.threads)
    neighbours = machine.Neighbours()
    results = []
    for name in options.steps:
        results.append(measure(name, options.budget))
        print(
            "; ".join(f"{head} {cell}" for head, cell in zip(HEAD, results[-1].row(), strict=True)),
            flush=True,
        )
    about = machine.describe(torch.device("cpu")) | {"cores_used_by_others": neighbours.cores()}
    title = (
        f"{about['machine']}; {about['threads']} threads, {about['instruction_set'].upper()}; torch "
        f"{about['versions']['torch']}, fastvae {about['versions']['fastvae']}; {about['date']}"
    )
    print("\n" + "\n".join(table(results)) + "\n\n" + title)
    print(f"others kept {about['cores_used_by_others']} cores busy")
    if options.save:
        path = RESULTS / f"steps-{slug(about['machine'])}.json"
        steps = [vars(result) for result in results]
        path.write_text(json.dumps(about | {"steps": steps}, indent=1) + "\n")
        draw(results, title)
        print(f"wrote {path} and {RESULTS / 'steps.png'}")
        put_between(ROOT / "README.md", "steps", "\n".join([*short_table(results), "", f"{title}."]))
        put_between(PAGE, "steps", "\n".join([*table(results), "", f"{title}."]))


if __name__ == "__main__":
    main()
