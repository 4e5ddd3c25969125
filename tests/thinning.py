"""Which tests of a grid `make test` runs: enough that every two values of two parameters meet.

Most faults need one value to show, or two that meet: a dtype, or a likelihood in that dtype. So of the tests that one
function makes of its parameters, `make test` runs a few in which each pair of values occurs, and `make test-all` runs
all of them. A backend's grid is a grid of its own: what the reference passes says nothing of a kernel.
"""

from collections.abc import Hashable, Iterable, Mapping
from itertools import combinations
from random import Random

Combination = tuple[tuple[str, Hashable], ...]


def pairwise(grid: Iterable[Mapping[str, Hashable]], *, pairs: bool = True) -> list[int]:
    """The places in `grid` of few points among which every value, and every pair of values, that occurs in it occurs.

    A point names its parameters' values; one without parameters is kept. The choice depends on the grid alone. Without
    `pairs` every value occurs, and few pairs.
    """
    points = [_combinations(point, pairs) for point in grid]
    uncovered: set[Combination] = set().union(*points)
    order = list(range(len(points)))
    # Neighbours differ in one value: in their own order the first points would cover little.
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
