"""Warm-up schedules for the weight of the KL, as functions of the number of epochs so far."""

import math

__all__ = ["kl_weight"]


def kl_weight(schedule: str, passed: float, epochs: float, cycles: int = 1) -> float:
    """Return the factor for beta, from 0 to 1, after `passed` epochs.

    - linear: rises from 0 to 1 over `epochs` (Sønderby et al. 2016, section 3.2).
    - sigmoid: follows a logistic curve from 0.0025 to 0.9975 over `epochs`, then 1 (Bowman et al. 2016, figure 2).
    - cyclical: `epochs` is divided into `cycles` equal parts. Each part rises linearly over its first half and stays
      at 1 over its second half; afterwards 1 (Fu et al. 2019, equations 6 and 7, with R = 0.5).
    - none: always 1.
    """
    share = passed / epochs
    if schedule == "none" or share >= 1:
        return 1.0
    if schedule == "linear":
        return share
    if schedule == "sigmoid":
        return 1 / (1 + math.exp(-12 * (share - 0.5)))
    return min(1.0, 2 * (share * cycles % 1))
