"""The categorical likelihood, with one of several classes at every position."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .conventions import compute_dtype, sum_event

__all__ = ["categorical_nll"]


def categorical_nll(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, weight: Tensor | None = None
) -> Tensor:
    """-log Categorical(target | softmax(logits)), (B,), summed over positions ([B], equations 4.104 and 4.108).

    Per position it is log sum_v e^a_v - a_t for the logits a, along the last dimension, and the class t. Positions
    whose target is `ignore_index` (padding) add nothing and pass no gradient.
    """
    ignored = target == ignore_index
    if weight is not None:
        ignored = ignored | (weight == 0)
    # The logits of an ignored position are replaced, because even a NaN there would make the gradient NaN (0 * NaN).
    known = logits.to(compute_dtype(logits)).masked_fill(ignored.unsqueeze(-1), 0.0)
    log_probs = F.log_softmax(known, dim=-1)
    chosen = log_probs.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return sum_event(torch.where(ignored, 0.0, -chosen), weight)
