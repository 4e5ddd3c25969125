"""How well a run with a multinomial likelihood ranks items that are hidden from it (Liang et al. 2018, section 4.2).

A fifth of the items of each row are held out. The encoder gets the others, and all items but those are ranked by their
logits at the mean of the posterior.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cells import make_batch, to_device
from .run import CellRun

__all__ = ["FEWEST", "hold_out", "measure", "ndcg", "recall"]

FEWEST = 5
"""The smallest number of items that a row must have; of fewer, a fifth is no item."""

_RECALL, _NDCG = (20, 50), 100  # the lengths of the lists
_ROWS = 500  # the number of rows to decode at a time


def hold_out(rows: Any, indices: Any, seed: int) -> tuple[Any, Any]:
    """Split rows of counts, a scipy.sparse.csr_array, into those of the input and of the held-out items.

    A row's items are drawn with the seed and its index in the data, so that they do not depend on the other rows.
    """
    from scipy import sparse

    held = np.zeros(len(rows.data), bool)
    for row, index in enumerate(indices.tolist()):
        start, end = int(rows.indptr[row]), int(rows.indptr[row + 1])
        places = np.random.default_rng([seed, index]).permutation(end - start)[: (end - start) // FEWEST]
        held[start + places] = True
    # The number of held-out items before each place gives the start of each row.
    before = np.concatenate(([0], np.cumsum(held)))[rows.indptr]
    parts = ((~held, rows.indptr - before), (held, before))
    split = [
        sparse.csr_array((rows.data[chosen], rows.indices[chosen], starts), shape=rows.shape)
        for chosen, starts in parts
    ]
    return split[0], split[1]


def recall(hits: Tensor, held_out: Tensor, length: int) -> Tensor:
    """Return the share of the held-out items among the first `length`, (B,), divided by at most `length` items.

    `hits` (B, K) says which of the ranked items are held out, and `held_out` (B,) is their number.
    """
    return hits[:, :length].sum(1).double() / held_out.clamp(max=length)


def ndcg(hits: Tensor, held_out: Tensor, length: int) -> Tensor:
    """Return the discounted cumulative gain of the first `length`, (B,), divided by that of the ideal ranking."""
    discount = 1 / torch.log2(torch.arange(2, length + 2, dtype=torch.float64))
    hits = hits[:, :length].double()
    ideal = discount.cumsum(0)[held_out.clamp(max=length) - 1]
    return hits @ discount[: hits.shape[1]] / ideal


@torch.no_grad()
def measure(run: CellRun, indices: Tensor, seed: int) -> dict[str, Any]:
    """Return the measures of these rows: for each its mean and the standard error, None where there are too few rows.

    `rows` is the number of rows that were ranked, and `left_out` that of the rows with fewer than FEWEST items.
    """
    found: dict[str, list[Tensor]] = {}
    parts = indices.split(_ROWS)
    for part, rows in zip(parts, run.cells.counts.batches([p.numpy() for p in parts]), strict=True):
        rows = rows.copy()
        rows.eliminate_zeros()
        enough = np.diff(rows.indptr) >= FEWEST
        if not enough.any():
            continue
        chosen = part[torch.from_numpy(enough)]
        given, held = hold_out(rows[enough], chosen.numpy(), seed)
        hits = _rank(run, chosen, given, held)
        number = torch.from_numpy(np.diff(held.indptr).astype(np.int64))
        for length in _RECALL:
            found.setdefault(f"recall@{length}", []).append(recall(hits, number, length))
        found.setdefault(f"ndcg@{_NDCG}", []).append(ndcg(hits, number, _NDCG))
    values = {name: torch.cat(of_parts) for name, of_parts in found.items()}
    ranked = len(next(iter(values.values()))) if values else 0
    names = (*(f"recall@{length}" for length in _RECALL), f"ndcg@{_NDCG}")
    return {
        **{
            name: {
                "mean": values[name].mean().item() if ranked else None,
                "standard_error": values[name].std().item() / math.sqrt(ranked) if ranked > 1 else None,
            }
            for name in names
        },
        "rows": ranked,
        "left_out": len(indices) - ranked,
    }


def _rank(run: CellRun, indices: Tensor, given: Any, held: Any) -> Tensor:
    """Return which of the first items of each row's ranking are held out, (B, K), on the CPU."""
    batch = to_device(make_batch(run.cells, indices, given), run.device)
    mu, _ = run.model.encode(batch)
    scores = run.model.params(mu, batch).float().cpu()
    row = np.repeat(np.arange(len(indices)), np.diff(given.indptr))
    scores[row, given.indices] = -math.inf
    is_held = torch.zeros(scores.shape, dtype=torch.bool)
    is_held[np.repeat(np.arange(len(indices)), np.diff(held.indptr)), held.indices] = True
    return is_held.gather(1, scores.topk(min(_NDCG, scores.shape[1]), 1).indices)
