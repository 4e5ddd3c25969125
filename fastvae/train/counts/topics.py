"""What the latent dimensions of a linear decoder mean: the words, items or genes that each makes more likely."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvae.train import files, messages

from .recipe import Decoder
from .run import CellRun

__all__ = ["FILE", "top_genes", "write"]

FILE = "topics.txt"

_PRINTED = 5  # the number of lines that are printed


def top_genes(base: Tensor, direction: Tensor, count: int = 10) -> Tensor:
    """Return the genes that stand out most when a direction (G,) is added to the logits `base` (G,).

    They are those with the largest terms p log(p / p0) of the KL between the shares p with and p0 without it: a ratio
    alone would put rare genes first, and a share alone those that are frequent everywhere.
    """
    before, after = torch.log_softmax(base, 0), torch.log_softmax(base + direction, 0)
    return (after.exp() * (after - before)).topk(min(count, len(base))).indices


def write(run: CellRun) -> Iterator[str]:
    """Write topics.txt, a line for each topic, or two for the directions of a dimension. Yields the first lines."""
    names = run.cells.gene_names
    if names is None:
        yield (
            f"{FILE} was not written: the data have no names; an .npz file can have them as the array `genes` or "
            "`vocab`"
        )
        return
    decoder = run.model.decoder
    assert isinstance(decoder, Decoder)
    base, directions = (part.cpu() for part in decoder.directions())
    lines = []
    for k, direction in enumerate(directions):
        ends = {f"topic {k}": 1.0} if decoder.shares else {f"z{k} rising": 1.0, f"z{k} falling": -1.0}
        for end, sign in ends.items():
            lines.append(f"{end}: {' '.join(names[top_genes(base, sign * direction).numpy()])}")
    path = run.path / FILE
    files.write(path, ("\n".join(lines) + "\n").encode())
    yield ""
    yield from lines[:_PRINTED]
    if len(lines) > _PRINTED:
        yield f"and {messages.pluralize(len(lines) - _PRINTED, 'further line')} in {path}"
