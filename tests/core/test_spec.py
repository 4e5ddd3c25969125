"""The table of likelihoods: every row has its functions, and its names are what users and backends know."""

import cuda_kernels
import pytest

from fastvae import _spec, functional, likelihoods, reference


@pytest.mark.parametrize("variant", _spec.VARIANTS.values(), ids=list(_spec.VARIANTS))
def test_every_variant_has_its_functions(variant: _spec.Variant) -> None:
    assert variant.function in functional.__all__
    assert variant.function in reference.__all__


@pytest.mark.parametrize("spec", _spec.SPECS, ids=[spec.name for spec in _spec.SPECS])
def test_every_density_has_its_module(spec: _spec.Spec) -> None:
    module = getattr(likelihoods, spec.module)
    assert spec.module in likelihoods.__all__
    assert module.__module__ == f"fastvae.likelihoods.{spec.family}"
    assert (likelihoods.BY_NAME.get(spec.name) is module) == spec.by_name


def test_rows_are_named_once() -> None:
    assert len(_spec.VARIANTS) == sum(len(spec.forms) for spec in _spec.SPECS)


def test_the_extension_has_the_same_table() -> None:
    extension = pytest.importorskip("fastvae._C", reason="the pure package")
    assert extension.likelihoods() == _spec.table()


def test_the_list_of_csrc_has_the_same_elements() -> None:
    """The list as it stands, where there is no extension; the discretised logistic is one of CUDA's."""
    elements = {variant.element for variant in _spec.VARIANTS.values() if variant.element}
    assert set(cuda_kernels.ENUM) == elements | {"discretized_logistic"}
