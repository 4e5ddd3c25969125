"""The schedules of a run, as functions of the number of epochs so far: the KL's weight and the learning rate."""

import math

__all__ = ["kl_weight", "learning_rate_factor"]


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


def learning_rate_factor(schedule: str, passed: float, epochs: float) -> float:
    """Return the factor for the learning rate, from 0 to 1, after `passed` of the `epochs` of a run.

    - cosine: falls from 1 to 0 along half a cosine (Loshchilov and Hutter 2017, equation 5, without restarts).
    - burda: 10^(-i / 7) in stage i = 0, ..., 7, which takes 3^i of every 3280 epochs (Burda et al. 2016, section 5).
    - constant: always 1.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return (1 + math.cos(math.pi * min(1.0, passed / epochs))) / 2
    # The first i stages together take (3^i - 1) / 2 of 3280.
    paper = passed * 3280 / epochs
    stage = next((i for i in range(7) if paper < (3 ** (i + 1) - 1) / 2), 7)
    return 10.0 ** (-stage / 7)
