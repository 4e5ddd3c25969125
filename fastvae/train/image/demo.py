"""The demo: one small VAE, trained with `fastvae.ELBO` and then with a hand-written loss.

`VAE` and `train` are the tutorial, and `HandWritten` is what `fastvae.ELBO` replaces. The rest measures time, prints
the results and draws pictures.
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
    """An .npz file; None uses scikit-learn's digits."""
    out: Path = Path("runs/demo")
    epochs: int | None = None
    """None means 40 for the digits and 5 for a file."""
    batch_size: int = 128
    seed: int = 0

    def check(self) -> None:
        """Raises InputError if a number is out of range."""
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
    """pixels - 400 - 20 - 400 - pixels, as in tutorials, but the decoder ends in logits, without a sigmoid."""

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
    """The loss as tutorials write it, with the interface of `fastvae.ELBO`."""

    def reparameterize(
        self, mu: Tensor, logvar: Tensor, *, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        std = torch.exp(0.5 * logvar)
        # With a seed, use the noise that `fastvae.ELBO` draws in its kernel, to compare the two step by step.
        eps = torch.randn_like(std) if seed is None else reference.normal_noise(seed, 0, *mu.shape)[0]
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(mu)
        return mu + eps * std, kl

    def __call__(self, logits: Tensor, x: Tensor, *, kl: Tensor) -> fastvae.ELBOOutput:
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        return fastvae.ELBOOutput(nll + kl, nll, kl)


Objective = fastvae.ELBO | HandWritten


class Losses(NamedTuple):
    """Means over the images in nats."""

    nll: float
    kl: float

    @property
    def neg_elbo(self) -> float:
        return self.nll + self.kl


class Epoch(NamedTuple):
    train: Losses
    val: Losses


def binarise(images: Tensor) -> Tensor:
    """Convert uint8 images to (B, pixels) of zeros and ones, with a threshold at half of the range.

    The Bernoulli likelihood is defined for binary data. With grey values the loss would be a cross-entropy and not an
    ELBO.
    """
    return (images.flatten(1) >= 128).float()


def batches(images: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield shuffled batches."""
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
    """Train the model, yielding the losses after each epoch. The same seed gives the same batches and noise."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.tensor([settings.seed, 0])
    for _ in range(epochs):
        losses = []
        for x in batches(images.train, settings.batch_size, generator):
            mu, logvar = model.encode(x)
            z, kl = objective.reparameterize(mu, logvar, seed=noise)
            out = objective(model.decode(z), x, kl=kl)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

            noise = noise + torch.tensor(
                [0, 4]
            )  # the next noise; without `seed=`, torch's generator takes care of it
            losses.append((len(x), out.nll.mean().item(), out.kl.mean().item()))
            advance()
        yield Epoch(_mean_losses(losses), evaluate(model, objective, images.val, settings.seed))


@torch.no_grad()
def evaluate(model: VAE, objective: Objective, images: Tensor, seed: int) -> Losses:
    """Return the losses for validation images, with the same noise every time."""
    losses = []
    for i, x in enumerate(map(binarise, images.split(1000))):
        mu, logvar = model.encode(x)
        z, kl = objective.reparameterize(mu, logvar, seed=torch.tensor([seed + 1, 4 * i]))
        out = objective(model.decode(z), x, kl=kl)
        losses.append((len(x), out.nll.mean().item(), out.kl.mean().item()))
    return _mean_losses(losses)


def _mean_losses(losses: list[tuple[int, float, float]]) -> Losses:
    total = sum(count for count, _, _ in losses)
    return Losses(sum(n * nll for n, nll, _ in losses) / total, sum(n * kl for n, _, kl in losses) / total)


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    medians: list[float]
    """Seconds, one for each call."""
    rounds: int
    """How often each call was timed."""
    unsteady: float
    """The largest ratio of a median to the fastest tenth of the same calls. It is 1.0 to 1.3 on a quiet machine."""


def time_alternately(calls: list[Callable[[], object]], seconds: float) -> Timing:
    """Time the calls alternately, after a warm-up."""
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


def loss_calls(model: VAE, x: Tensor, objectives: list[Objective]) -> list[Callable[[], object]]:
    """Return one call per objective that runs only its part of a training step, on the tensors of this batch.

    This part is sampling, KL and reconstruction, and their backward pass to the decoder's output, mu and logvar. Each
    call draws new noise, as in normal training.
    """
    mu, logvar = (t.detach().requires_grad_() for t in model.encode(x))
    z = mu.detach().clone()
    logits = model.decode(z).detach().requires_grad_()
    grad_z = torch.randn_like(z)  # stands for the gradient that comes back through the decoder

    def call(objective: Objective) -> Callable[[], object]:
        def part() -> object:
            z, kl = objective.reparameterize(mu, logvar)
            loss = objective(logits, x, kl=kl).loss
            return torch.autograd.grad((loss, z), (logits, mu, logvar), (None, grad_z))

        return part

    return [call(objective) for objective in objectives]


def step_calls(model: VAE, x: Tensor, objectives: list[Objective]) -> list[Callable[[], object]]:
    """Return one call per objective that runs a whole training step on a copy of the model."""

    def call(objective: Objective) -> Callable[[], object]:
        model_copy = copy.deepcopy(model)
        optimizer = torch.optim.Adam(model_copy.parameters(), lr=LEARNING_RATE)

        def step() -> None:
            mu, logvar = model_copy.encode(x)
            z, kl = objective.reparameterize(mu, logvar)
            loss = objective(model_copy.decode(z), x, kl=kl).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return [call(objective) for objective in objectives]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(settings: Settings, console: Console) -> None:
    """Train with both losses, compare and time them, and save the pictures. Raises InputError before any work."""

    def print_line(line: str = "") -> None:
        console.print(line.rstrip(" "), highlight=False, markup=False, soft_wrap=True)

    settings.check()
    images = (
        data.load_digits(settings.seed)
        if settings.data is None
        else data.load_npz(settings.data, settings.seed)
    )
    files.prepare_folder(settings.out, PICTURES)
    epochs = settings.epochs or (40 if settings.data is None else 5)
    shape = tuple(images.train.shape[1:])

    for line in messages.describe_backend():
        print_line(line)
    size = data.format_size(shape)
    print_line(
        f"data: {images.name}, {size}, {len(images.train)} training images, {len(images.val)} validation images,"
    )
    print_line(
        "      binarised at half of the range, because the Bernoulli likelihood is defined for zeros and ones"
    )

    torch.manual_seed(settings.seed)
    model = VAE(images.train[0].numel())
    by_hand = copy.deepcopy(model)
    print_line(
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
        print_line("\n1. Trained with fastvae.ELBO (nats per image)\n")
        print_line(f"{'':5}  {'training':^27}  {'validation':^27}")
        print_line("epoch" + f"  {'-ELBO':>9}{'recon':>9}{'KL':>9}" * 2)
        task = bar.add_task("fastvae", total=steps)
        for epoch in train(model, fused, images, settings, epochs, lambda: bar.advance(task)):
            curve.append(epoch)
            print_line(
                f"{len(curve):5}"
                + "".join(f"  {part.neg_elbo:9.2f}{part.nll:9.2f}{part.kl:9.2f}" for part in epoch)
            )
        bar.remove_task(task)

        print_line(
            "\n2. The same training with the hand-written loss: same weights, batches and noise (-ELBO)\n"
        )
        print_line(f"{'':5}  {'training':^27}  {'validation':^27}")
        print_line("epoch" + f"  {'by hand':>9}{'fastvae':>9}{'diff':>9}" * 2)
        task = bar.add_task("by hand", total=steps)
        worst = 0.0
        epochs_by_hand = train(by_hand, HandWritten(), images, settings, epochs, lambda: bar.advance(task))
        for number, (epoch, before) in enumerate(zip(epochs_by_hand, curve, strict=True), 1):
            pairs = [(a.neg_elbo, b.neg_elbo) for a, b in zip(epoch, before, strict=True)]
            worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs))
            print_line(
                f"{number:5}" + "".join(f"  {a:9.2f}{b:9.2f}{round(a - b, 4) + 0.0:9.4f}" for a, b in pairs)
            )
        bar.remove_task(task)
    print_line(
        f"\nLargest relative difference: {worst:.0e}. It comes from float32 rounding, which accumulates in training."
    )

    x = next(batches(images.train, settings.batch_size, torch.Generator().manual_seed(settings.seed)))
    print_line(
        f"\n3. Time for one batch of {len(x)} images (medians; the two take turns and draw new noise each time)\n"
    )
    print_line(f"{'':27}{'fastvae':>12}{'by hand':>12}{'ratio':>9}{'calls':>9}")
    objectives: list[Objective] = [fused, HandWritten()]
    unsteady = 1.0
    for label, calls in (
        ("the loss part (*)", loss_calls(model, x, objectives)),
        ("the whole training step", step_calls(model, x, objectives)),
    ):
        (ours, theirs), rounds, spread = time_alternately(calls, 1.0)
        unsteady = max(unsteady, spread)
        print_line(f"{label:27}{ours * 1e6:9.0f} µs{theirs * 1e6:9.0f} µs{theirs / ours:8.1f}x{rounds:9}")
    if unsteady > 1.5:
        print_line(
            "\nThese times are not reliable: something else is using this machine (the medians are "
            f"{unsteady:.1f} times the fastest calls)."
        )
    print_line(
        "\n(*) Sampling, KL, reconstruction, and their backward pass to the decoder's output, mu and logvar. In small"
    )
    print_line(
        "    batches PyTorch's overhead per call dominates: `pytest benchmarks/` measures larger ones."
    )

    _pictures(model, fused, images, settings)
    print_line(f"\n{settings.out / PICTURES[0]}: binarised validation images, each above its reconstruction")
    print_line(f"{settings.out / PICTURES[1]}: new images, decoded from z ~ N(0, I)")


@torch.no_grad()
def _pictures(model: VAE, elbo: fastvae.ELBO, images: data.Images, settings: Settings) -> None:
    """Save the pictures; their grey values are the probabilities that a pixel is 1."""
    shape = images.train.shape[1:]

    def decode_means(z: Tensor) -> Tensor:
        return elbo.likelihood.mean(model.decode(z)).view(-1, *shape)  # type: ignore[operator]

    originals = images.val[:30]
    recon = decode_means(model.encode(binarise(originals))[0])
    pictures.save_reconstructions(originals / 255, recon, settings.out / PICTURES[0])

    z = torch.randn(64, model.latents, generator=torch.Generator().manual_seed(settings.seed))
    pictures.save_samples(decode_means(z), settings.out / PICTURES[1])
