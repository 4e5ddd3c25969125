"""Reproducible random number generators."""

import numpy as np
import torch

__all__ = ["seeded_generator"]


def seeded_generator(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream depends only on the integers of the key."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
