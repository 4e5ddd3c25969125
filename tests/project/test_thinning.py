"""`make test` leaves nothing out that only a pair of values would show."""

from itertools import combinations, product

from thinning import pairwise

GRID = [
    dict(zip(("case", "shape", "dtype", "prior"), values, strict=True))
    for values in product(range(20), range(15), "abcd", (False, True))
]


def pairs(points: list[dict[str, object]]) -> set[tuple[object, object]]:
    return {pair for point in points for pair in combinations(sorted(point.items()), 2)}


def test_every_pair_of_values_is_kept() -> None:
    kept = [GRID[place] for place in pairwise(GRID)]
    assert pairs(kept) == pairs(GRID)
    # No selection is smaller than the two longest parameters' product.
    assert 20 * 15 <= len(kept) <= 1.1 * 20 * 15


def test_a_grid_of_two_parameters_and_a_list_are_kept_whole() -> None:
    flat = [{"case": a, "dtype": b} for a, b in product(range(7), "abc")]
    assert pairwise(flat) == list(range(21))
    assert pairwise([{"case": a} for a in range(9)]) == list(range(9))
    assert pairwise([{}]) == [0]
    assert pairwise([]) == []


def test_only_pairs_that_occur_count() -> None:
    ragged = [point for point in GRID if not (point["dtype"] == "d" and point["prior"])]
    assert pairs([ragged[place] for place in pairwise(ragged)]) == pairs(ragged)


def test_every_value_is_kept_where_pairs_do_not_matter() -> None:
    kept = [GRID[place] for place in pairwise(GRID, pairs=False)]
    assert {item for point in kept for item in point.items()} == {
        item for point in GRID for item in point.items()
    }
    assert len(kept) <= 1.1 * 20
