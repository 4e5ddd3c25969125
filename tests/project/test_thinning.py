"""`make test` omits nothing that shows with a pair of values, and `make test-rest` nothing that shows with three."""

from itertools import combinations, product

import pytest
from thinning import covering

GRID = [
    dict(zip(("case", "shape", "dtype", "prior"), values, strict=True))
    for values in product(range(20), range(15), "abcd", (False, True))
]


def combined(points: list[dict[str, object]], together: int) -> set[tuple[object, ...]]:
    return {values for point in points for values in combinations(sorted(point.items()), together)}


# No selection is smaller than the product of the longest parameters.
@pytest.mark.parametrize(("together", "least"), [(1, 20), (2, 20 * 15), (3, 20 * 15 * 4)])
def test_thinning_keeps_every_combination_of_values(together: int, least: int) -> None:
    kept = [GRID[place] for place in covering(GRID, together)]
    assert combined(kept, together) == combined(GRID, together)
    assert least <= len(kept) <= 1.1 * least


def test_thinning_keeps_grids_of_two_parameters_and_lists() -> None:
    flat = [{"case": a, "dtype": b} for a, b in product(range(7), "abc")]
    assert covering(flat, 2) == list(range(21))
    assert covering([{"case": a} for a in range(9)], 2) == list(range(9))
    assert covering([{}], 2) == [0]
    assert covering([], 2) == []


def test_thinning_considers_only_existing_pairs() -> None:
    ragged = [point for point in GRID if not (point["dtype"] == "d" and point["prior"])]
    assert combined([ragged[place] for place in covering(ragged, 2)], 2) == combined(ragged, 2)
