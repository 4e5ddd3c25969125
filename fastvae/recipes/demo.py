"""The demo: one small VAE, trained with `fastvae.ELBO` and then with the loss that everybody writes by hand.

To read it: `VAE` and `train` are the tutorial, `HandWritten` is what `fastvae.ELBO` replaces; the rest is measuring,
printing and pictures.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fastvae
from fastvae import backend, reference
from fastvae.training import data, pictures
from fastvae.training.data import InputError

__all__ = ["VAE", "HandWritten", "Settings", "run", "train"]

PICTURES = ("reconstructions.png", "samples.png")


@dataclass(frozen=True)
class Settings:
    data: Path | None = None
    """A .npz file; None takes scikit-learn's digits."""
    out: Path = Path("runs/demo")
    epochs: int | None = None
    """None: 40 for the digits, 5 for a file."""
    batch_size: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for a number out of its range."""
        for name, value, low, high in (
            ("--epochs", self.epochs, 1, None),
            ("--batch-size", self.batch_size, 1, None),
            ("--seed", self.seed, 0, 2**32 - 1),
        ):
            if value is not None and (value < low or (high is not None and value > high)):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise InputError(f"{name} must be {bounds}, got {value}")


# ---------------------------------------------------------------------------------------------------------------------
# The tutorial
# ---------------------------------------------------------------------------------------------------------------------


class VAE(nn.Module):
    """pixels - 400 - 20 - 400 - pixels, as in the tutorials; the decoder ends in logits, without a sigmoid."""

    def __init__(self, pixels: int, hidden: int = 400, latents: int = 20) -> None:
        super().__init__()
        self.latents = latents
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


class HandWritten:
    """The loss as tutorials write it, in the two steps of `fastvae.ELBO`."""

    def reparameterize(
        self, mu: Tensor, logvar: Tensor, *, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        std = torch.exp(0.5 * logvar)
        # With a seed: the noise that `fastvae.ELBO` draws from it inside its kernel, for a comparison step by step.
        eps = torch.randn_like(std) if seed is None else reference.normal_noise(seed, 0, *mu.shape)[0]
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(mu)
        return mu + eps * std, kl

    def __call__(self, logits: Tensor, x: Tensor, *, kl: Tensor) -> fastvae.ELBOOutput:
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        return fastvae.ELBOOutput(nll + kl, nll, kl)


Objective = fastvae.ELBO | HandWritten


class Losses(NamedTuple):
    """Means over images, in nats."""

    nll: float
    kl: float

    @property
    def negative_elbo(self) -> float:
        return self.nll + self.kl


class Epoch(NamedTuple):
    train: Losses
    held_out: Losses


def batches(images: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled batches, (B, pixels), binarised anew: each pixel is 1 with the probability of its grey value.

    The Bernoulli likelihood is one of binary data; on the grey values themselves the loss would not be an ELBO.
    Binarising in every epoch rather than once keeps so small a model from learning the draws by heart (Burda,
    Grosse and Salakhutdinov 2016, appendix D).
    """
    for rows in torch.randperm(len(images), generator=generator).split(batch_size):
        yield torch.bernoulli(images[rows].flatten(1) / 255, generator=generator)


def train(
    model: VAE,
    objective: Objective,
    images: data.Images,
    settings: Settings,
    epochs: int,
    advance: Callable[[], object] = lambda: None,
) -> Iterator[Epoch]:
    """Train the model, giving the losses of each epoch as it ends. The same seed gives the same batches and noise."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.tensor([settings.seed, 0])
    for _ in range(epochs):
        seen = []
        for x in batches(images.train, settings.batch_size, generator):
            mu, logvar = model.encode(x)
            z, kl = objective.reparameterize(mu, logvar, seed=noise)
            out = objective(model.decode(z), x, kl=kl)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

            noise = noise + torch.tensor(
                [0, 4]
            )  # the next draw; without `seed=` torch's generator sees to it
            seen.append((len(x), out.nll.mean().item(), out.kl.mean().item()))
            advance()
        yield Epoch(_mean(seen), evaluate(model, objective, images.held_out, settings.seed))


@torch.no_grad()
def evaluate(model: VAE, objective: Objective, images: Tensor, seed: int) -> Losses:
    """The losses on images held out: the same binarisation and noise every time."""
    generator = torch.Generator().manual_seed(seed + 1)
    seen = []
    for i, x in enumerate(batches(images, 1000, generator)):
        mu, logvar = model.encode(x)
        z, kl = objective.reparameterize(mu, logvar, seed=torch.tensor([seed + 1, 4 * i]))
        out = objective(model.decode(z), x, kl=kl)
        seen.append((len(x), out.nll.mean().item(), out.kl.mean().item()))
    return _mean(seen)


def _mean(seen: list[tuple[int, float, float]]) -> Losses:
    total = sum(count for count, _, _ in seen)
    return Losses(sum(n * nll for n, nll, _ in seen) / total, sum(n * kl for n, _, kl in seen) / total)


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def interleaved(calls: list[Callable[[], object]], seconds: float) -> tuple[list[float], int]:
    """The median time of each call in seconds, and how many were timed: in turns, after a warm-up."""
    times: list[list[float]] = [[] for _ in calls]
    started, warm = time.perf_counter(), False
    while len(times[0]) < 20 or time.perf_counter() - started < seconds:
        for call, record in zip(calls, times, strict=True):
            before = time.perf_counter()
            call()
            record.append(time.perf_counter() - before)
        if not warm and len(times[0]) >= 10 and time.perf_counter() - started > seconds / 5:
            warm = True
            for record in times:
                record.clear()
    return [statistics.median(record) for record in times], len(times[0])


def loss_part(model: VAE, x: Tensor, objectives: list[Objective]) -> list[Callable[[], object]]:
    """For each objective a call of its part of a step alone, on the tensors of this batch.

    The part is sampling, KL and reconstruction, and the way back to the decoder's output, mu and logvar. Everything
    draws its own noise, as in anybody's training.
    """
    mu, logvar = (t.detach().requires_grad_() for t in model.encode(x))
    z = mu.detach().clone()
    logits = model.decode(z).detach().requires_grad_()
    grad_z = torch.randn_like(z)  # in a real step: what comes back through the decoder

    def call(objective: Objective) -> Callable[[], object]:
        def part() -> object:
            z, kl = objective.reparameterize(mu, logvar)
            loss = objective(logits, x, kl=kl).loss
            return torch.autograd.grad((loss, z), (logits, mu, logvar), (None, grad_z))

        return part

    return [call(objective) for objective in objectives]


def whole_step(model: VAE, x: Tensor, objectives: list[Objective]) -> list[Callable[[], object]]:
    """For each objective a call of a whole training step, each on a copy of the model."""

    def call(objective: Objective) -> Callable[[], object]:
        own = copy.deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-3)

        def step() -> None:
            mu, logvar = own.encode(x)
            z, kl = objective.reparameterize(mu, logvar)
            loss = objective(own.decode(z), x, kl=kl).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return [call(objective) for objective in objectives]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(settings: Settings, console: Console) -> None:
    """Train both ways, compare, time, and leave the pictures. Raises InputError before any of it."""

    def say(line: str = "") -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    settings.check()
    images = data.digits(settings.seed) if settings.data is None else data.npz(settings.data, settings.seed)
    pictures.prepare_folder(settings.out, PICTURES)
    epochs = settings.epochs or (40 if settings.data is None else 5)
    shape = tuple(images.train.shape[1:])

    for line in _backend_lines():
        say(line)
    size = " x ".join(str(n) for n in (shape if shape[2] > 1 else shape[:2]))
    say(f"data: {images.name}, {size}: {len(images.train)} to train on, {len(images.held_out)} held out,")
    say("      binarised anew in every epoch (a pixel is 1 with the probability of its grey value)")

    torch.manual_seed(settings.seed)
    model = VAE(images.train[0].numel())
    by_hand = copy.deepcopy(model)
    say(
        f"model: {model.encoder[0].in_features} - 400 - {model.latents} - 400 - {model.encoder[0].in_features}, Adam"
    )

    fused = fastvae.ELBO("bernoulli")
    steps = epochs * -(-len(images.train) // settings.batch_size)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    curve = []
    with bar:
        say("\n1. Trained with fastvae.ELBO (nats per image)\n")
        say(f"{'':5}  {'train':^27}  {'held out':^27}")
        say("epoch" + f"  {'-ELBO':>9}{'recon':>9}{'KL':>9}" * 2)
        task = bar.add_task("fastvae", total=steps)
        for epoch in train(model, fused, images, settings, epochs, lambda: bar.advance(task)):
            curve.append(epoch)
            say(
                f"{len(curve):5}"
                + "".join(f"  {part.negative_elbo:9.2f}{part.nll:9.2f}{part.kl:9.2f}" for part in epoch)
            )
        bar.remove_task(task)

        say(
            "\n2. The same with the hand-written loss: same initial weights, same batches, same noise (-ELBO)\n"
        )
        say(f"{'':5}  {'train':^27}  {'held out':^27}")
        say("epoch" + f"  {'by hand':>9}{'fastvae':>9}{'diff':>9}" * 2)
        task = bar.add_task("by hand", total=steps)
        worst = 0.0
        again = train(by_hand, HandWritten(), images, settings, epochs, lambda: bar.advance(task))
        for number, (epoch, before) in enumerate(zip(again, curve, strict=True), 1):
            pairs = [(a.negative_elbo, b.negative_elbo) for a, b in zip(epoch, before, strict=True)]
            worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs))
            say(f"{number:5}" + "".join(f"  {a:9.2f}{b:9.2f}{a - b:9.4f}" for a, b in pairs))
        bar.remove_task(task)
    say(
        f"\nLargest difference: {worst:.1g} of the value, the rounding of two orders of summation, carried along."
    )

    x = next(batches(images.train, settings.batch_size, torch.Generator().manual_seed(settings.seed)))
    say(
        f"\n3. Time, on one batch of {len(x)} images (medians, the two in turns, each drawing its own noise)\n"
    )
    say(f"{'':30}{'fastvae':>11}{'by hand':>11}")
    objectives: list[Objective] = [fused, HandWritten()]
    for label, calls in (
        ("the loss part (*)", loss_part(model, x, objectives)),
        ("the whole training step", whole_step(model, x, objectives)),
    ):
        (ours, theirs), count = interleaved(calls, 1.0)
        say(
            f"{label:30}{ours * 1e6:8.0f} µs{theirs * 1e6:8.0f} µs{theirs / ours:8.1f} times faster   ({count} calls)"
        )
    say("(*) sampling, KL, reconstruction, and their backward up to the decoder's output, mu and logvar")

    _pictures(model, fused, images, settings)
    say(f"\n{settings.out / PICTURES[0]}: held-out images, each above what the model makes of it")
    say(f"{settings.out / PICTURES[1]}: new images, decoded from z ~ N(0, I)")


def _backend_lines() -> list[str]:
    """Which backend runs, and why it is the slow one if it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below, in our own words
        name = backend.choose(torch.empty(0)).name
    threads = torch.get_num_threads()
    detail = f"{threads} thread{'s' if threads > 1 else ''}"
    if name == "native":
        from fastvae import _C

        detail = f"{_C.cpu_capability()}, {detail}"
    lines = [f"fastvae {fastvae.__version__} · backend {name} ({detail})"]
    if name == "reference":
        lines.append(f"This is the slow one: {backend._reason('native', 'cpu')}")
    return lines


@torch.no_grad()
def _pictures(model: VAE, elbo: fastvae.ELBO, images: data.Images, settings: Settings) -> None:
    """Grey values are the decoder's means, the probability that a pixel is 1."""
    shape = images.train.shape[1:]

    def shown(z: Tensor) -> Tensor:
        return elbo.likelihood.mean(model.decode(z)).view(-1, *shape)  # type: ignore[operator]

    originals = images.held_out[:30]
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.bernoulli(originals.flatten(1) / 255, generator=generator)
    columns = min(10, len(originals))
    rows = []
    for original, recon in zip(
        (originals / 255).split(columns), shown(model.encode(x)[0]).split(columns), strict=True
    ):
        if len(original) == columns:
            rows += [original, recon]
    pictures.save_grid(rows, settings.out / PICTURES[0], group=2)

    z = torch.randn(80, model.latents, generator=generator)
    pictures.save_grid(shown(z).split(10), settings.out / PICTURES[1])
