"""Selects the tests of a grid for `make test`, such that every pair of values of two parameters occurs.

Most faults show with one particular value, or with two together: a dtype, or a likelihood in that dtype. So, from all
tests that one function generates, `make test` runs a few in which each pair of values occurs, `make test-rest` others
in which each three values occur, and `make test-all` runs all of them. Each backend has its own grid, because a pass on
the reference says nothing about a kernel.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from itertools import chain, combinations
from random import Random

Combination = tuple[tuple[str, Hashable], ...]


def covering(grid: Iterable[Mapping[str, Hashable]], together: int) -> list[int]:
    """Choose few points of `grid` that contain every combination of up to `together` values that occurs in it.

    A point maps parameters to values; one without parameters is kept. The choice depends only on the grid.
    """
    points = [_combinations(point, together) for point in grid]
    uncovered: set[Combination] = set().union(*points)
    order = list(range(len(points)))
    # Neighbours differ in one value, so in the original order the first points would cover few combinations.
    Random(len(order)).shuffle(order)
    # The places of points by how many uncovered combinations they had when they were last looked at. It only falls.
    waiting: dict[int, list[int]] = defaultdict(list)
    for place in order:
        waiting[len(points[place])].append(place)
    kept = []
    for wanted in range(max(waiting, default=0), 0, -1):
        for place in waiting.pop(wanted, ()):
            new = points[place] & uncovered
            if len(new) == wanted:
                kept.append(place)
                uncovered -= new
            else:
                waiting[len(new)].append(place)
    return sorted(kept)


def _combinations(point: Mapping[str, Hashable], together: int) -> set[Combination]:
    values = sorted(point.items(), key=lambda item: item[0])
    return set(chain.from_iterable(combinations(values, count) for count in range(together + 1)))
