"""The table of likelihoods: every row has its functions, and its names are what users and backends know."""

import pytest

from fastvae import _spec, functional, likelihoods, reference


@pytest.mark.parametrize("row", _spec.ROWS.values(), ids=list(_spec.ROWS))
def test_every_row_has_its_functions(row: _spec.Row) -> None:
    assert row.function in functional.__all__
    assert row.function in reference.__all__


@pytest.mark.parametrize("spec", _spec.SPECS, ids=[spec.name for spec in _spec.SPECS])
def test_every_density_has_its_module(spec: _spec.Spec) -> None:
    module = getattr(likelihoods, spec.module)
    assert spec.module in likelihoods.__all__
    assert module.__module__ == f"fastvae.likelihoods.{spec.family}"
    assert (likelihoods.BY_NAME.get(spec.name) is module) == spec.by_name


def test_rows_are_named_once() -> None:
    assert len(_spec.ROWS) == sum(len(spec.forms) for spec in _spec.SPECS)


def test_what_the_extension_is_to_agree_with() -> None:
    rows = {name: rest for name, *rest in _spec.rows()}
    assert rows["gaussian_bounded_head"] == [1, 2, True, False, False, "continuous"]
    assert rows["student_t_learned"] == [2, 1, False, True, False, "continuous"]
    assert rows["zero_inflated_negative_binomial_logits"] == [4, 0, False, False, True, "counts"]
