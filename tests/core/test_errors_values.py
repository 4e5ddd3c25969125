"""The messages for wrong values, and checks outside the public functions."""

import pytest
import torch
from wrong_inputs import (
    FLAT,
    ROWS,
    SEED,
    Wrong,
    check_raises,
    elbo,
)

import fastvae
import fastvae.functional as fv
from fastvae.likelihoods import (
    Gaussian,
)

WRONG = {
    "unknown likelihood": Wrong(
        lambda: fastvae.ELBO("bernouilli"),
        ValueError,
        "fastvae.ELBO: `likelihood` must be one of 'bernoulli', 'gaussian', 'laplace', 'continuous_bernoulli', "
        "'poisson', 'categorical', got 'bernouilli'",
    ),
    "unknown reduction": Wrong(
        lambda: fastvae.ELBO("bernoulli", reduction="avg"),
        ValueError,
        "fastvae.ELBO: `reduction` must be one of 'none', 'sum', 'mean', 'batchmean', got 'avg'",
    ),
    "unknown kl reduction": Wrong(
        lambda: fv.gaussian_kl(FLAT, FLAT, reduction="mean"),
        ValueError,
        "fastvae.gaussian_kl: `reduction` must be one of 'event', 'channel', 'none', got 'mean'",
    ),
    "unknown backend": Wrong(
        lambda: fastvae.set_backend("cuda"),
        ValueError,
        "fastvae.set_backend: `name` must be one of 'auto', 'reference', 'native', 'triton', got 'cuda'",
    ),
    "unknown scale": Wrong(
        lambda: Gaussian("learnt"),
        ValueError,
        "fastvae.likelihoods.Gaussian: `scale` must be a positive float, 'learned' or 'per_element', got 'learnt'",
    ),
    "negative scale": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, scale=-1.0),
        ValueError,
        "fastvae.gaussian_nll: `scale` must be positive and finite, got -1.0",
    ),
    "zero module scale": Wrong(
        lambda: Gaussian(0.0),
        ValueError,
        "fastvae.likelihoods.Gaussian: `scale` must be positive and finite, got 0.0",
    ),
    "nan scale": Wrong(
        lambda: Gaussian(float("nan")), ValueError, "`scale` must be positive and finite, got nan"
    ),
    "logvar and scale": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, FLAT, scale=2.0),
        ValueError,
        "fastvae.gaussian_nll: `logvar` and `scale` exclude each other, got `scale` 2.0",
    ),
    "negative beta": Wrong(
        lambda: fastvae.ELBO("bernoulli", beta=-1.0),
        ValueError,
        "fastvae.ELBO: `beta` must be finite and at least 0, got -1.0",
    ),
    "beta per row": Wrong(
        lambda: fastvae.ELBO("bernoulli", beta=ROWS),
        ValueError,
        "fastvae.ELBO: `beta` must be a float or a 0-dim tensor, got shape (4,)",
    ),
    "beta a string": Wrong(
        lambda: fastvae.ELBO("bernoulli", beta="high"),
        TypeError,
        "fastvae.ELBO: `beta` must be a float or a 0-dim tensor, got 'high'",
    ),
    "target with a gradient": Wrong(
        lambda: fv.bernoulli_nll(FLAT, FLAT.clone().requires_grad_()),
        ValueError,
        "fastvae.bernoulli_nll: `target` requires a gradient, which this likelihood does not provide; "
        "pass target.detach(), or differentiate fastvae.reference.bernoulli_nll",
    ),
    "x with a gradient": Wrong(
        lambda: elbo(FLAT, FLAT.clone().requires_grad_(), kl=ROWS),
        ValueError,
        "fastvae.ELBO: `x` requires a gradient, which this likelihood does not provide; pass x.detach()",
    ),
    "seed and generator": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, seed=SEED, generator=torch.Generator()),
        ValueError,
        "fastvae.reparameterize_kl: `seed` and `generator` exclude each other, got both",
    ),
    "eps and seed": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, eps=FLAT, seed=SEED),
        ValueError,
        "fastvae.reparameterize_kl: `eps` and `seed` exclude each other, got both",
    ),
    "eps and generator": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, eps=FLAT, generator=torch.Generator()),
        ValueError,
        "fastvae.reparameterize_kl: `eps` and `generator` exclude each other, got both",
    ),
    "no samples": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, samples=0),
        ValueError,
        "fastvae.reparameterize_kl: `samples` must be at least 1, got 0",
    ),
    "negative row_offset": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, row_offset=-1),
        ValueError,
        "fastvae.reparameterize_kl: `row_offset` must be at least 0 and below 2^63, got -1",
    ),
    "row_offset that no int64 holds": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, row_offset=2**70),
        ValueError,
        "fastvae.reparameterize_kl: `row_offset` must be at least 0 and below 2^63, got 1180591620717411303424",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_raises_the_same_message_on_every_backend(backend: str, name: str) -> None:
    check_raises(backend, WRONG[name])


@pytest.mark.parametrize("value", [-1.0, float("nan"), torch.ones(2)], ids=str)
def test_invalid_beta_changes_nothing(value: object) -> None:
    elbo = fastvae.ELBO("bernoulli", beta=0.5)
    with pytest.raises(ValueError, match="`beta`"):
        elbo.beta = value
    assert elbo.beta.item() == 0.5


def test_target_requiring_gradient_under_no_grad_is_accepted(backend: str) -> None:
    x = torch.rand(4, 12, requires_grad=True)
    with torch.no_grad():
        assert fv.bernoulli_nll(FLAT, x).shape == (4,)


def test_ops_with_wrong_input_raise() -> None:
    """Direct calls of the native ops, without the Python checks, still refuse inputs that would be read out of
    bounds."""
    ops = torch.ops.fastvae
    form = "logvar", [], None
    for wrong in (
        lambda: ops.nll("bernoulli", [FLAT], FLAT[:3], [], None, None, 0),
        lambda: ops.nll("bernoulli", [FLAT, FLAT], FLAT, [], None, None, 0),
        lambda: ops.nll("gaussian", [FLAT], FLAT, [], None, None, 0),
        lambda: ops.nll("bernoulli", [FLAT], FLAT, [], ROWS[:2], None, 0),
        lambda: ops.nll("bernoulli", [FLAT], FLAT, [], None, None, 3),
        lambda: ops.nll("no such", [FLAT], FLAT, [], None, None, 0),
        lambda: ops.gaussian_kl(FLAT, FLAT[:2], None, None, *form, False),
        lambda: ops.gaussian_kl(FLAT, FLAT, FLAT, None, *form, False),
        lambda: ops.gaussian_kl(FLAT[:, :5], None, None, None, *form, False),
        lambda: ops.gaussian_kl(FLAT, None, FLAT[:, :6], None, *form, False),
        lambda: ops.gaussian_kl(FLAT, FLAT, None, None, "no such", [], None, False),
        lambda: ops.gaussian_kl(FLAT, FLAT, None, None, "softplus", [], None, False),
        lambda: ops.gaussian_kl(FLAT, FLAT, None, None, "logvar", [], 0.5, False),
        lambda: ops.reparameterize_kl(FLAT, FLAT, None, None, *form, False, 0, None, 0, None, None),
        lambda: ops.reparameterize_kl(FLAT, FLAT, None, None, *form, False, None, SEED[:1], 0, None, None),
        lambda: ops.reparameterize_kl(FLAT, FLAT, None, None, *form, False, None, None, 0, FLAT[:2], None),
    ):
        with pytest.raises(ValueError, match="fastvae"):
            wrong()


def test_generator_of_another_gpu_raises() -> None:
    """Tested without two GPUs, with objects that report the devices."""
    from types import SimpleNamespace

    from fastvae.functional.latents import _check_generator

    class Played(torch.Generator):
        device = torch.device("cuda:0")

    mu = SimpleNamespace(device=torch.device("cuda:1"))
    with pytest.raises(
        ValueError, match=r"must be on the device of `mu`, cuda:1, got cuda:0; .*Generator\(mu\.device\)"
    ):
        _check_generator("reparameterize_kl", Played(), mu)
    _check_generator("reparameterize_kl", Played(), SimpleNamespace(device=torch.device("cuda:0")))
    _check_generator("reparameterize_kl", torch.Generator(), SimpleNamespace(device=torch.device("cpu")))
