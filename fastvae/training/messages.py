"""What is told to the user: lines on rich's own console, which a progress bar makes room for."""

import importlib
import warnings

import torch
from rich import get_console

import fastvae
from fastvae import backends

__all__ = ["backend_lines", "say", "size_of"]


def say(line: str = "") -> None:
    get_console().print(line.rstrip(" "), highlight=False, markup=False, soft_wrap=True)


def size_of(shape: tuple[int, ...]) -> str:
    """H x W, or H x W x C where C is not 1."""
    return " x ".join(str(n) for n in (shape if shape[2] > 1 else shape[:2]))


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
