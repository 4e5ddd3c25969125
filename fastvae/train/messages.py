"""Messages to the user. They are printed on rich's global console, so that they do not break a progress bar."""

import importlib
import shlex
import warnings

import torch
from rich import get_console
from torch import nn

import fastvae
from fastvae import backends

from .settings import Settings

__all__ = ["describe_backend", "describe_model", "describe_prior", "pluralize", "print_line", "shell_command"]


def print_line(line: str = "") -> None:
    get_console().print(line.rstrip(" "), highlight=False, markup=False, soft_wrap=True)


def pluralize(n: int, what: str) -> str:
    """Return a number with its noun: "1 epoch", "2 epochs"."""
    return f"{n} {what}{'s' if n != 1 else ''}"


def shell_command(*words: object) -> str:
    """Return a fastvae command, quoted for a shell."""
    return shlex.join(["fastvae", *map(str, words)])


def describe_prior(settings: Settings, temperature: float = 1.0) -> str:
    """Return the distribution that new samples are decoded from."""
    if not settings.has_mixture_prior:
        return f"z ~ N(0, {temperature:g}² I)" if temperature != 1 else "z ~ N(0, I)"
    scaled = f", with {temperature:g} times their standard deviations" if temperature != 1 else ""
    return f"z of the prior, {_describe_mixture(settings)}{scaled}"


def _describe_mixture(settings: Settings) -> str:
    if settings.prior == "mog":
        return f"a mixture of {pluralize(settings.components, 'Gaussian')}"
    return f"the mean posterior of {pluralize(settings.components, 'pseudo-input')}"


def describe_model(model: nn.Module, settings: Settings, detail: str = "") -> str:
    parameters = sum(p.numel() for p in model.parameters())
    prior = f", prior: {_describe_mixture(settings)}" if settings.has_mixture_prior else ""
    return f"model: {settings.recipe}{detail}, {settings.latent} latent dimensions, {parameters:,} parameters{prior}"


def describe_backend(device: torch.device | str = "cpu") -> list[str]:
    """Return which backend runs on the device and, if that is the slow reference, why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same is reported below
        name = backends.for_tensor(torch.empty(0, device=device)).name
    kind = torch.device(device).type
    detail = kind
    if kind == "cpu":
        threads = torch.get_num_threads()
        detail = f"{threads} thread{'s' if threads > 1 else ''}"
        if name == "native":
            detail = f"{importlib.import_module('fastvae._C').cpu_capability()}, {detail}"
    lines = [f"fastvae {fastvae.__version__} · backend {name} ({detail})"]
    if name == "reference":
        lines.append(f"The reference backend is slow. Reason: {backends.reason('native', kind)}")
    return lines
