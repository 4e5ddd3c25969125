"""`make test` omits nothing that shows only with a pair of values."""

from itertools import combinations, product

from thinning import pairwise

GRID = [
    dict(zip(("case", "shape", "dtype", "prior"), values, strict=True))
    for values in product(range(20), range(15), "abcd", (False, True))
]


def pairs(points: list[dict[str, object]]) -> set[tuple[object, object]]:
    return {pair for point in points for pair in combinations(sorted(point.items()), 2)}


def test_thinning_keeps_every_pair_of_values() -> None:
    kept = [GRID[place] for place in pairwise(GRID)]
    assert pairs(kept) == pairs(GRID)
    # No selection is smaller than the product of the two longest parameters.
    assert 20 * 15 <= len(kept) <= 1.1 * 20 * 15


def test_thinning_keeps_grids_of_two_parameters_and_lists() -> None:
    flat = [{"case": a, "dtype": b} for a, b in product(range(7), "abc")]
    assert pairwise(flat) == list(range(21))
    assert pairwise([{"case": a} for a in range(9)]) == list(range(9))
    assert pairwise([{}]) == [0]
    assert pairwise([]) == []


def test_thinning_considers_only_existing_pairs() -> None:
    ragged = [point for point in GRID if not (point["dtype"] == "d" and point["prior"])]
    assert pairs([ragged[place] for place in pairwise(ragged)]) == pairs(ragged)


def test_thinning_without_pairs_keeps_every_value() -> None:
    kept = [GRID[place] for place in pairwise(GRID, pairs=False)]
    assert {item for point in kept for item in point.items()} == {
        item for point in GRID for item in point.items()
    }
    assert len(kept) <= 1.1 * 20
