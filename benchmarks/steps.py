"""Time whole training steps with the hand-written loss and with fastvae's, eager and compiled.

    python -m benchmarks.steps [--steps NAME ...] [--budget SECONDS] [--save]

The network, the optimiser (fused Adam) and the batch are the same on all sides. `compiled` is torch.compile of the
model together with the hand-written loss, and `compiled + fused` that of the model with fastvae's loss. scvi-tools' own
model, if it is installed, has only the eager sides. The sides take turns in one process, and the times are medians.
`loss` is the share of the eager step that is spent on drawing z, the KL and the reconstruction, forward and backward.
Peak memory is the maximum that a step holds above what was allocated before it.

`--save` saves the figures in benchmarks/results/steps-<machine>.json, draws benchmarks/results/steps.png, and writes
the short table into README.md and the whole one into docs/benchmarks.md.
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
MIN_ROUNDS = 5


class VAE(nn.Module):
    """An encoder and a decoder, with fastvae's loss and with the loss as users write it."""

    def __init__(self, elbo: fastvae.ELBO) -> None:
        super().__init__()
        self.elbo = elbo

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return (mu, logvar)."""
        raise NotImplementedError

    def decode(self, z: Tensor, x: Tensor) -> Any:
        """Return the parameters of the likelihood. Only a decoder that reads the previous words uses x."""
        raise NotImplementedError

    def baseline_loss(self, decoded: Any, x: Tensor, kld: Tensor) -> Tensor:
        """Compute the same loss by hand, from the KL summed over the batch."""
        raise NotImplementedError

    def loss_only(self, x: Tensor) -> Callable[[], Tensor]:
        """Return a function that runs the loss of the eager step: z, KL and reconstruction, forward and backward."""
        with torch.no_grad():
            mu, logvar = self.encode(x)
            decoded = self.decode(mu, x)
        mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        tensors = [decoded] if isinstance(decoded, Tensor) else list(decoded)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]

        def run() -> Tensor:
            z = cases._baseline_sample(mu, logvar)
            params = leaves[0] if isinstance(decoded, Tensor) else tuple(leaves)
            loss = self.baseline_loss(params, x, cases._baseline_kld(mu, logvar))
            inputs = [mu, logvar, *leaves, *self.elbo.parameters()]
            torch.autograd.grad([loss, z.sum()], inputs, allow_unused=True)
            return loss.detach()

        return run

    def fused(self, x: Tensor) -> Tensor:
        mu, logvar = self.encode(x)
        z, kl = self.elbo.reparameterize(mu, logvar)
        return self.elbo(self.decode(z, x), x, kl=kl).loss

    def baseline(self, x: Tensor) -> Tensor:
        mu, logvar = self.encode(x)
        z = cases._baseline_sample(mu, logvar)
        return self.baseline_loss(self.decode(z, x), x, cases._baseline_kld(mu, logvar))


class Dense(VAE):
    """The fully connected VAE of tutorials, on images of MNIST's size."""

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

    def baseline_loss(self, decoded: Tensor, x: Tensor, kld: Tensor) -> Tensor:
        return cases._baseline_bernoulli(decoded, x, kld)[0]


class ImportanceWeighted(VAE):
    """The model of Burda et al. 2016, whose bound uses 50 draws of z for each image."""

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

    def baseline(self, x: Tensor) -> Tensor:
        return self._bound(x, self._baseline_nll)

    def _bound(self, x: Tensor, nll: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Compute the negative bound. log q and log p are cheap, and the same on all sides."""
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
    def _baseline_nll(recon: Tensor, x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(recon, x.expand_as(recon), reduction="none").sum(-1)

    def loss_only(self, x: Tensor) -> Callable[[], Tensor]:
        """Return a function that runs the reconstruction of every draw, forward and backward."""
        with torch.no_grad():
            mu, logvar = self.encode(x)
            z = mu + torch.randn(self.DRAWS, *mu.shape) * torch.exp(0.5 * logvar)
            recon = self.decode(z, x)
        recon.requires_grad_()
        return lambda: torch.autograd.grad(self._baseline_nll(recon, x).sum(), recon)[0]


def _tanh_layers(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Convolutional(VAE):
    """Strided convolutions that halve `side` to 4 pixels, and their transposes. The output has `planes` channels."""

    def __init__(self, elbo: fastvae.ELBO, side: int, planes: int, latent: int = 64) -> None:
        super().__init__(elbo)
        halvings = (side // 4).bit_length() - 1
        widths = [32 << i for i in range(halvings)]
        down: list[nn.Module] = []
        for inputs, outputs in zip([3, *widths], widths, strict=False):
            down += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.ReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(16 * widths[-1], 2 * latent))
        up: list[nn.Module] = [
            nn.Linear(latent, 16 * widths[-1]),
            nn.Unflatten(1, (widths[-1], 4, 4)),
            nn.ReLU(),
        ]
        for inputs, outputs in zip(widths[::-1], widths[-2::-1], strict=False):
            up += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.ReLU()]
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(widths[0], planes, 4, 2, 1))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(x / 127.5 - 1 if x.dtype == torch.uint8 else x).chunk(2, 1)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z)


class Photographs(Convolutional):
    """64 x 64 colour images with a Gaussian, whose mean and log-variance are a packed head."""

    def __init__(self) -> None:
        super().__init__(fastvae.ELBO(fastvae.likelihoods.Gaussian("per_element")), 64, 6)

    @staticmethod
    def batch() -> Tensor:
        return torch.rand(64, 3, 64, 64)

    def baseline_loss(self, decoded: Tensor, x: Tensor, kld: Tensor) -> Tensor:
        return cases._baseline_head(decoded, x, kld)[0]


class Levels(Convolutional):
    """32 x 32 colour images as bytes, with a mixture of ten discretised logistics."""

    def __init__(self) -> None:
        super().__init__(fastvae.ELBO(fastvae.likelihoods.DiscretizedLogisticMixture(10)), 32, 100)

    @staticmethod
    def batch() -> Tensor:
        return torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)

    def baseline_loss(self, decoded: Tensor, x: Tensor, kld: Tensor) -> Tensor:
        return cases._baseline_mixture(decoded, x, kld)[0]


class Cells(VAE):
    """A model similar to scVI: 20,000 genes, and zero-inflated negative binomials of the decoder's raw outputs."""

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

    def baseline_loss(self, decoded: tuple[Tensor, ...], x: Tensor, kld: Tensor) -> Tensor:
        logits, library, zi_logits = decoded
        log_theta = self.elbo.likelihood.log_dispersion
        kl = (kld / len(x)).expand(len(x))
        return cases._baseline_zinb_raw(logits, log_theta, zi_logits, library.squeeze(1), x, kl)[0]


class Sentences(VAE):
    """LSTMs that read and write sentences of 20 words, from a vocabulary of 10,000."""

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
        previous = self.embedding(torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1))
        h, _ = self.writer(torch.cat((previous, z.unsqueeze(1).expand(-1, x.shape[1], -1)), 2))
        return self.words(h)

    def baseline_loss(self, decoded: Tensor, x: Tensor, kld: Tensor) -> Tensor:
        return cases._baseline_categorical(decoded, x, kld)[0]


class ScviTools(nn.Module):
    """The module of scvi-tools' SCVI with ZINB, as its own training calls it. `fused` runs it with `accelerate`."""

    sides = ("eager", "fused")

    def __init__(self) -> None:
        super().__init__()
        self.model = _scvi_model()
        self.module = self.model.module

    @staticmethod
    def batch() -> dict[str, Tensor]:
        model = _scvi_model()
        return next(iter(model._make_data_loader(adata=model.adata, batch_size=scvi.BATCH)))

    def baseline(self, x: dict[str, Tensor]) -> Tensor:
        return self.module(x)[2].loss

    def fused(self, x: dict[str, Tensor]) -> Tensor:
        with accelerate(strict=True):
            return self.baseline(x)

    def loss_only(self, x: dict[str, Tensor]) -> Callable[[], Tensor]:
        """Return a function that runs the reconstruction, forward and backward."""
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
    return scvi.create_model(scvi.CASES["zinb"])


STEPS: dict[str, tuple[str, type[VAE] | type[ScviTools]]] = {
    "scvi": ("scvi-tools' SCVI, ZINB, 128 cells x 20,000 genes", ScviTools),
    "counts": ("ZINB, 128 cells x 20,000 genes", Cells),
    "levels": ("discretised logistic mixture, 32 x 3 x 32 x 32", Levels),
    "importance": ("IWAE's MLP, 50 draws, Bernoulli, batch 100", ImportanceWeighted),
    "text": ("LSTM, 32 sentences x 20 of 10,000 words", Sentences),
    "photographs": ("conv, Gaussian head with variances, 64 x 3 x 64 x 64", Photographs),
    "dense": ("MLP 784-400-20, Bernoulli, batch 128", Dense),
}


@dataclass
class Result:
    name: str
    milliseconds: dict[str, float]
    loss_share: float
    peak_bytes: dict[str, int]
    rounds: int

    def speedup(self, side: str, baseline: str) -> float:
        """The ratio of the times; NaN if a side is missing."""
        return self.milliseconds.get(baseline, math.nan) / self.milliseconds.get(side, math.nan)

    def memory(self, side: str, baseline: str) -> float:
        return self.peak_bytes.get(side, math.nan) / self.peak_bytes.get(baseline, math.nan)

    def table_row(self) -> list[str]:
        return [
            self.name,
            f"{self.milliseconds['eager']:.1f}",
            f"{self.loss_share:.0%}",
            _format_ratio(self.speedup("fused", "eager")),
            _format_ratio(self.speedup("compiled", "eager")),
            _format_ratio(self.speedup("compiled + fused", "compiled")),
            _format_ratio(self.memory("fused", "eager")),
            _format_ratio(self.memory("compiled + fused", "compiled")),
        ]


def _format_ratio(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}"


HEAD = [
    "training step", "eager, ms", "loss", "fused: × eager", "compiled: × eager", "compiled + fused: × compiled",
    "memory: fused / eager", "memory: compiled + fused / compiled",
]  # fmt: skip


def measure(name: str, budget: float) -> Result:
    """Time the sides of one step in turns for about `budget` seconds, after checking that their losses agree."""
    title, kind = STEPS[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = kind.batch()
    steps: dict[str, Callable[[], Tensor]] = {}
    losses = {}
    sides_measured = getattr(kind, "sides", SIDES)
    for side in sides_measured:
        torch.manual_seed(1)
        model = kind()
        loss = model.fused if "fused" in side else model.baseline
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
    for side, value in losses.items():  # each side draws its own noise
        assert abs(value - losses["eager"]) < 0.02 * abs(losses["eager"]), (
            f"{title}: the loss of {side} is different"
        )

    steps["loss"] = kind().loss_only(x)
    times: dict[str, list[float]] = {side: [] for side in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    stop, sides, rounds = time.perf_counter() + budget, list(steps), 0
    while rounds < MIN_ROUNDS or time.perf_counter() < stop:
        for side in sides[rounds % len(sides) :] + sides[: rounds % len(sides)]:
            start = time.perf_counter()
            steps[side]()
            times[side].append(time.perf_counter() - start)
        rounds += 1
    medians = {side: 1e3 * statistics.median(seconds) for side, seconds in times.items()}
    share = medians.pop("loss") / medians["eager"]
    peak = {side: peak_bytes(steps[side], torch.device("cpu")) for side in sides_measured}
    return Result(title, medians, share, peak, rounds)


def table(results: list[Result]) -> list[str]:
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "--:|" * (len(HEAD) - 1)]
    return lines + ["| " + " | ".join(result.table_row()) + " |" for result in results]


def short_table(results: list[Result]) -> list[str]:
    """The table for the README. The last column compares the fastest hand-written step with fastvae's fastest one."""
    lines = [
        "| training step | share of the loss | eager | compiled | best against best |",
        "|---|--:|--:|--:|--:|",
    ]
    for result in results:
        ms = result.milliseconds
        best_baseline = min(time for side, time in ms.items() if "fused" not in side)
        best_fused = min(time for side, time in ms.items() if "fused" in side)
        ratios = (
            result.speedup("fused", "eager"),
            result.speedup("compiled + fused", "compiled"),
            best_baseline / best_fused,
        )
        cells = " | ".join(_format_ratio(ratio) for ratio in ratios)
        lines.append(f"| {result.name} | {result.loss_share:.0%} | {cells} |")
    return lines


def draw(results: list[Result], title: str) -> None:
    """Left: the speed of a step relative to the hand-written one of its kind. Right: its relative peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(11, 0.7 * len(results) + 1.6), sharey=True, layout="constrained"
    )
    pairs = (("fused", "eager", "#1b7f5c"), ("compiled + fused", "compiled", "#4a6fa5"))
    for offset, (side, baseline, colour) in zip((-0.2, 0.2), pairs, strict=True):
        places = [i + offset for i in range(len(results))]
        label = f"{baseline} model: fastvae's loss compared with the hand-written one"
        speedups = [result.speedup(side, baseline) for result in results]
        speed.bar_label(
            speed.barh(places, speedups, 0.38, color=colour, label=label),
            [_format_ratio(value) for value in speedups],
            padding=3,
            fontsize=9,
        )
        shares = [result.memory(side, baseline) for result in results]
        memory.bar_label(
            memory.barh(places, shares, 0.38, color=colour),
            [_format_ratio(value) for value in shares],
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
    available = [name for name in STEPS if name != "scvi" or importlib.util.find_spec("scvi")]
    parser.add_argument(
        "--steps", nargs="+", choices=tuple(STEPS), default=available, help="the steps to measure"
    )
    parser.add_argument(
        "--budget", type=float, default=30.0, help="seconds for each step, not counting compilation"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="save the figures, and update picture and tables")
    options = parser.parse_args()

    machine.configure("cpu", options.threads)
    load_monitor = machine.LoadMonitor()
    results = []
    for name in options.steps:
        results.append(measure(name, options.budget))
        print(
            "; ".join(f"{head} {cell}" for head, cell in zip(HEAD, results[-1].table_row(), strict=True)),
            flush=True,
        )
    about = machine.describe(torch.device("cpu"))
    about |= {"cores_used_by_others": load_monitor.cores_used_by_others()}
    title = (
        f"{about['machine']}; {about['threads']} threads, {about['instruction_set'].upper()}; torch "
        f"{about['versions']['torch']}, fastvae {about['versions']['fastvae']}; {about['date']}"
    )
    print("\n" + "\n".join(table(results)) + "\n\n" + title)
    print(f"other processes kept {about['cores_used_by_others']} cores busy")
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
