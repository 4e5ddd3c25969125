"""Random numbers that are the same in every run."""

import numpy as np
import torch

__all__ = ["generator"]


def generator(*key: int) -> torch.Generator:
    """A torch.Generator on the CPU that is the same for the same integers, and unrelated for others."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
