"""`fastvae.ELBO(samples=K)`: the average over K draws of z, equal to K calls with one draw each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import likelihoods

K, B, D, L = 3, 4, 12, 5
SEED = torch.tensor([5, 6])
X = (torch.rand(B, D) > 0.5).float()
COUNTS = torch.randint(0, 5, (B, D)).float()
HEAD = nn.Linear(L, 2 * D)


class Squared(nn.Module):
    """A likelihood of a user, without a kernel."""

    def nll(self, params: Tensor, target: Tensor) -> Tensor:
        return (params - target).square().sum(1)


# The likelihood, the decoder, and the data. As D = K * B, a dispersion has as many elements as the decoder has rows.
CASES: dict[str, tuple[Any, Callable[[Tensor], Any], Any]] = {
    "bernoulli": ("bernoulli", lambda z: HEAD(z)[:, :D], X),
    "image": ("bernoulli", lambda z: HEAD(z).view(-1, 2, 3, 4), torch.rand(B, 2, 3, 4)),
    "learned": (likelihoods.Gaussian("learned"), lambda z: HEAD(z)[:, :D], X),
    "head": (likelihoods.Gaussian("per_element"), HEAD, X),
    "genes": (likelihoods.NegativeBinomial(D), lambda z: (HEAD(z)[:, :D], 50 * torch.ones(len(z))), COUNTS),
    "categorical": ("categorical", lambda z: HEAD(z).view(-1, 4, 6), torch.randint(0, 6, (B, 4))),
    "product": (
        likelihoods.Product({"a": "bernoulli", "b": "poisson"}),
        lambda z: {"a": HEAD(z)[:, :D], "b": HEAD(z)[:, D:]},
        {"a": X, "b": COUNTS},
    ),
    "own": (Squared(), lambda z: HEAD(z)[:, :D], X),
}


def posterior() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(B, L, requires_grad=True), torch.randn(B, L, requires_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_average_of_single_draws(
    backend: str, case: str, reduction: str
) -> None:
    likelihood, decoder, x = CASES[case]
    elbo = fastvae.ELBO(likelihood, samples=K, beta=0.5, reduction=reduction)
    single = fastvae.ELBO(elbo.likelihood, beta=0.5, reduction=reduction)
    mu, logvar = posterior()
    z, kl = elbo.reparameterize(mu, logvar, seed=SEED)
    assert z.shape == (K, B, L)
    out = elbo(decoder(z.flatten(0, 1)), x, kl=kl)
    each = [single(decoder(draw), x, kl=kl) for draw in z]
    torch.testing.assert_close(out.nll, torch.stack([one.nll for one in each]).mean(0))
    torch.testing.assert_close(out.kl, kl)
    expected = torch.stack([one.loss for one in each]).mean(0)
    torch.testing.assert_close(out.loss, expected)
    parameters = [mu, logvar, *HEAD.parameters(), *elbo.parameters()]
    ours, theirs = (
        torch.autograd.grad(loss.sum(), parameters, retain_graph=True) for loss in (out.loss, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_posterior_and_free_bits_are_those_of_a_single_draw(backend: str) -> None:
    _, decoder, x = CASES["bernoulli"]
    mu, logvar = posterior()
    elbo = fastvae.ELBO("bernoulli", samples=K, free_bits=0.25)
    z, kl = elbo.reparameterize(mu, logvar, seed=SEED)
    assert kl.shape == mu.shape
    out = elbo(decoder(z.flatten(0, 1)), x, kl=kl)
    single = fastvae.ELBO("bernoulli", free_bits=0.25)(decoder(z[0]), x, kl=kl)
    torch.testing.assert_close(out.loss - out.nll.mean(), single.loss - single.nll.mean())
    torch.testing.assert_close(out.kl, single.kl)
    torch.testing.assert_close(elbo(decoder(z.flatten(0, 1)), x, mu, logvar).loss, out.loss)


def test_samples_of_a_call_take_precedence() -> None:
    mu, logvar = posterior()
    assert fastvae.ELBO("bernoulli", samples=K).reparameterize(mu, logvar, samples=2)[0].shape == (2, B, L)
    assert fastvae.ELBO("bernoulli").reparameterize(mu, logvar)[0].shape == (B, L)


@pytest.mark.slow
def test_compiled_loss_is_one_graph_for_all_batch_sizes(native: None) -> None:
    elbo = fastvae.ELBO("bernoulli", samples=K)

    def loss(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        z, kl = elbo.reparameterize(mu, logvar, seed=SEED)
        return elbo(HEAD(z.flatten(0, 1))[:, :D], x, kl=kl).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    mu, logvar = posterior()
    for rows in (B, 2):
        args = X[:rows], mu[:rows], logvar[:rows]
        torch.testing.assert_close(compiled(*args), loss(*args))


def test_repr_shows_the_samples_once() -> None:
    assert "samples=3" in repr(fastvae.ELBO("bernoulli", samples=3))
    assert "samples" not in repr(fastvae.ELBO("bernoulli"))
    assert repr(fastvae.IWAE("bernoulli", 3)).count("samples=3") == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastvae.ELBO("bernoulli", samples=0), ValueError, "`samples` must be at least 1, got 0"),
        (lambda: fastvae.ELBO("bernoulli", samples=2.0), TypeError, "`samples` must be an int, got 2.0"),
        (
            lambda: fastvae.ELBO("bernoulli", samples=K)(torch.zeros(7, D), X, kl=torch.zeros(B)),
            ValueError,
            "fastvae.ELBO: the decoder must return K \\* B rows, 3 times those of `x`, got 7 for 4 rows of `x`",
        ),
        (
            lambda: fastvae.ELBO("bernoulli", samples=K)(torch.zeros(K * B, D), X, kl=torch.zeros(K * B)),
            ValueError,
            "`kl` must have one value per row of `nll`, shape \\(4,\\), got \\(12,\\)",
        ),
    ],
)
def test_wrong_calls_are_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
