"""The table of likelihoods: every variant has its functions, and names agree with those of users and backends."""

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


def test_variants_have_unique_names() -> None:
    assert len(_spec.VARIANTS) == sum(len(spec.forms) for spec in _spec.SPECS)


def test_extension_has_the_same_table() -> None:
    extension = pytest.importorskip("fastvae._C", reason="the pure package")
    assert extension.likelihoods() == _spec.table()


def test_csrc_list_has_the_same_elements() -> None:
    """The list itself, for use without the extension. On CUDA, the discretised logistic is elementwise."""
    elements = {variant.element for variant in _spec.VARIANTS.values() if variant.element}
    assert set(cuda_kernels.ENUM) == elements | {"discretized_logistic"}
