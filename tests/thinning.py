"""Selects the tests of a grid for `make test`, such that every pair of values of two parameters occurs.

Most faults show with one particular value, or with two together: a dtype, or a likelihood in that dtype. So, from all
tests that one function generates, `make test` runs a few in which each pair of values occurs, and `make test-all` runs
all of them. Each backend has its own grid, because a pass on the reference says nothing about a kernel.
"""

from collections.abc import Hashable, Iterable, Mapping
from itertools import combinations
from random import Random

Combination = tuple[tuple[str, Hashable], ...]


def pairwise(grid: Iterable[Mapping[str, Hashable]], *, pairs: bool = True) -> list[int]:
    """Choose few points of `grid` that contain every value, and every pair of values, that occurs in it.

    A point maps parameters to values; one without parameters is kept. The choice depends only on the grid. Without
    `pairs`, every value occurs, but few pairs.
    """
    points = [_combinations(point, pairs) for point in grid]
    uncovered: set[Combination] = set().union(*points)
    order = list(range(len(points)))
    # Neighbours differ in one value, so in the original order the first points would cover few pairs.
    Random(len(order)).shuffle(order)
    kept = []
    for wanted in range(max(map(len, points), default=0), 0, -1):
        for place in order:
            if uncovered and len(points[place] & uncovered) >= wanted:
                kept.append(place)
                uncovered -= points[place]
    return sorted(kept)


def _combinations(point: Mapping[str, Hashable], pairs: bool) -> set[Combination]:
    values = sorted(point.items(), key=lambda item: item[0])
    return {(), *((value,) for value in values), *(combinations(values, 2) if pairs else ())}
