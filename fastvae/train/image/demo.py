"""The demo: one small VAE, trained with `fastvae.ELBO` and then with the loss that everybody writes by hand.

To read it: `VAE` and `train` are the tutorial, `HandWritten` is what `fastvae.ELBO` replaces; the rest is measuring,
printing and pictures.
"""

import copy
import statistics
import time
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
from fastvae import reference
from fastvae.train import files, messages
from fastvae.train.errors import InputError

from . import data, pictures

__all__ = ["VAE", "HandWritten", "Settings", "run", "train"]

LEARNING_RATE = 2e-3
PICTURES = ("reconstructions.png", "samples.png")


@dataclass(frozen=True)
class Settings:
    data: Path | None = None
    """A .npz file; None takes scikit-learn's digits."""
    out: Path = Path("runs/demo")
    epochs: int | None = None
    """None: 40 for the digits, 5 for a file."""
    batch_size: int = 128
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


def binarise(images: Tensor) -> Tensor:
    """uint8 images to (B, pixels) of zeros and ones: 1 from half of the full value on.

    The Bernoulli likelihood is one of binary data; on the grey values themselves the loss would be a cross-entropy, and
    not an ELBO.
    """
    return (images.flatten(1) >= 128).float()


def batches(images: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled batches."""
    for rows in torch.randperm(len(images), generator=generator).split(batch_size):
        yield binarise(images[rows])


def train(
    model: VAE,
    objective: Objective,
    images: data.Images,
    settings: Settings,
    epochs: int,
    advance: Callable[[], object] = lambda: None,
) -> Iterator[Epoch]:
    """Train the model, giving the losses of each epoch as it ends. The same seed gives the same batches and noise."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
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
    """The losses on images held out, with the same noise every time."""
    seen = []
    for i, x in enumerate(map(binarise, images.split(1000))):
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


class Timing(NamedTuple):
    medians: list[float]
    """In seconds, one for each call."""
    rounds: int
    """How many times each was timed."""
    unsteady: float
    """The largest ratio of a median to what the fastest tenth of the same calls took: 1.0 to 1.3 on a quiet machine."""


def interleaved(calls: list[Callable[[], object]], seconds: float) -> Timing:
    """Time the calls in turns, after a warm-up."""
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
    medians = [statistics.median(record) for record in times]
    fastest = [statistics.quantiles(record, n=10)[0] for record in times]
    return Timing(medians, len(times[0]), max(m / f for m, f in zip(medians, fastest, strict=True)))


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
        optimizer = torch.optim.Adam(own.parameters(), lr=LEARNING_RATE)

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
        console.print(line.rstrip(" "), highlight=False, markup=False, soft_wrap=True)

    settings.check()
    images = data.digits(settings.seed) if settings.data is None else data.npz(settings.data, settings.seed)
    files.prepare_folder(settings.out, PICTURES)
    epochs = settings.epochs or (40 if settings.data is None else 5)
    shape = tuple(images.train.shape[1:])

    for line in messages.backend_lines():
        say(line)
    size = data.size_of(shape)
    say(f"data: {images.name}, {size}: {len(images.train)} to train on, {len(images.held_out)} held out,")
    say("      binarised at half of the full value: the Bernoulli likelihood is one of zeros and ones")

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
            say(f"{number:5}" + "".join(f"  {a:9.2f}{b:9.2f}{round(a - b, 4) + 0.0:9.4f}" for a, b in pairs))
        bar.remove_task(task)
    say(
        f"\nLargest relative difference: {worst:.0e}. It grows from float32 rounding, which training carries along."
    )

    x = next(batches(images.train, settings.batch_size, torch.Generator().manual_seed(settings.seed)))
    say(
        f"\n3. Time, on one batch of {len(x)} images (medians, the two in turns, each drawing its own noise)\n"
    )
    say(f"{'':27}{'fastvae':>12}{'by hand':>12}{'ratio':>9}{'calls':>9}")
    objectives: list[Objective] = [fused, HandWritten()]
    unsteady = 1.0
    for label, calls in (
        ("the loss part (*)", loss_part(model, x, objectives)),
        ("the whole training step", whole_step(model, x, objectives)),
    ):
        (ours, theirs), rounds, spread = interleaved(calls, 1.0)
        unsteady = max(unsteady, spread)
        say(f"{label:27}{ours * 1e6:9.0f} µs{theirs * 1e6:9.0f} µs{theirs / ours:8.1f}x{rounds:9}")
    if unsteady > 1.5:
        say(
            f"\nThese times mean little: something else is using this machine (medians {unsteady:.1f} times the best)."
        )
    say(
        "\n(*) sampling, KL, reconstruction, and their backward up to the decoder's output, mu and logvar. In a small"
    )
    say("    batch much of it is PyTorch's own cost per call: `pytest benchmarks/` measures larger ones.")

    _pictures(model, fused, images, settings)
    say(f"\n{settings.out / PICTURES[0]}: held-out images, each above what the model makes of it, binarised")
    say(f"{settings.out / PICTURES[1]}: new images, decoded from z ~ N(0, I)")


@torch.no_grad()
def _pictures(model: VAE, elbo: fastvae.ELBO, images: data.Images, settings: Settings) -> None:
    """Grey values are the decoder's means, the probability that a pixel is 1."""
    shape = images.train.shape[1:]

    def shown(z: Tensor) -> Tensor:
        return elbo.likelihood.mean(model.decode(z)).view(-1, *shape)  # type: ignore[operator]

    originals = images.held_out[:30]
    recon = shown(model.encode(binarise(originals))[0])
    pictures.save_reconstructions(originals / 255, recon, settings.out / PICTURES[0])

    z = torch.randn(64, model.latents, generator=torch.Generator().manual_seed(settings.seed))
    pictures.save_samples(shown(z), settings.out / PICTURES[1])
