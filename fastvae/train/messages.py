"""What is told to the user: lines on rich's own console, which a progress bar makes room for."""

import importlib
import shlex
import warnings

import torch
from rich import get_console
from torch import nn

import fastvae
from fastvae import backends

from .settings import Settings

__all__ = ["backend_lines", "command", "count", "model_line", "prior", "say"]


def say(line: str = "") -> None:
    get_console().print(line.rstrip(" "), highlight=False, markup=False, soft_wrap=True)


def count(n: int, what: str) -> str:
    """n of them: "1 epoch", "2 epochs"."""
    return f"{n} {what}{'s' if n != 1 else ''}"


def command(*words: object) -> str:
    """A command of ours, quoted for a shell."""
    return shlex.join(["fastvae", *map(str, words)])


def prior(temperature: float) -> str:
    """What new data are decoded from."""
    return f"z ~ N(0, {temperature:g}² I)" if temperature != 1 else "z ~ N(0, I)"


def model_line(model: nn.Module, settings: Settings, detail: str = "") -> str:
    parameters = sum(p.numel() for p in model.parameters())
    return f"model: {settings.recipe}{detail}, {settings.latent} latent dimensions, {parameters:,} parameters"


def backend_lines(device: torch.device | str = "cpu") -> list[str]:
    """Which backend runs there, and why it is the slow one if it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below, in our own words
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
        lines.append(f"This is the slow one: {backends.reason('native', kind)}")
    return lines
