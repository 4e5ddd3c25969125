"""Schedules of the KL's weight: pure functions of how many epochs have passed."""

import math

__all__ = ["weight"]


def weight(schedule: str, passed: float, epochs: float, cycles: int = 1) -> float:
    """What to multiply beta with, 0 to 1, when `passed` epochs are over.

    - linear: from 0 up to 1 over `epochs` (Sønderby et al. 2016, section 3.2).
    - sigmoid: the logistic curve over the same span, from 0.0025 to 0.9975, then 1 (Bowman et al. 2016, figure 2).
    - cyclical: `epochs` in `cycles` equal parts, each rising linearly over its first half and staying at 1 over its
      second (Fu et al. 2019, equations 6 and 7, with R = 0.5); then 1.
    - none: 1.
    """
    share = passed / epochs
    if schedule == "none" or share >= 1:
        return 1.0
    if schedule == "linear":
        return share
    if schedule == "sigmoid":
        return 1 / (1 + math.exp(-12 * (share - 0.5)))
    return min(1.0, 2 * (share * cycles % 1))
