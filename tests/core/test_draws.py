"""K draws of the parameters with one target: the same as K calls, with the target read in place."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import functional as fv
from fastvae import likelihoods

K, B = 3, 4
IMAGE = torch.rand(B, 3, 5, 7)
LEVELS = torch.randint(0, 256, (B, 3, 5), dtype=torch.uint8)
COUNTS = torch.randint(0, 4, (B, 9)).float()
CLASSES = torch.randint(0, 6, (B, 5))
CLASSES[1, 2] = -100


def normal(*shape: int) -> Tensor:
    return torch.randn(K, B, *shape)


def positive(*shape: int) -> Tensor:
    return torch.rand(K, B, *shape) + 0.5


# function, parameters by name (those with draws first), those that all draws share, the target, options
CASES = {
    "bernoulli": (fv.bernoulli_nll, {"logits": normal(3, 5, 7)}, {}, IMAGE, {}),
    "bernoulli, bool": (fv.bernoulli_nll, {"logits": normal(3, 5, 7)}, {}, IMAGE > 0.5, {}),
    "gaussian": (fv.gaussian_nll, {"mean": normal(3, 5, 7)}, {}, IMAGE, {"scale": 0.5}),
    "gaussian, learned": (fv.gaussian_nll, {"mean": normal(9)}, {"logvar": torch.tensor(0.3)}, COUNTS, {}),
    "gaussian, per element": (fv.gaussian_nll, {"mean": normal(9), "logvar": normal(9)}, {}, COUNTS, {}),
    "gaussian, head": (fv.gaussian_head_nll, {"params": normal(6, 5, 7)}, {}, IMAGE, {}),
    "laplace": (fv.laplace_nll, {"loc": normal(9)}, {}, COUNTS, {}),
    "student": (fv.student_t_nll, {"loc": normal(9)}, {}, COUNTS, {"df": 3.0}),
    "continuous Bernoulli": (fv.continuous_bernoulli_nll, {"logits": normal(3, 5, 7)}, {}, IMAGE, {}),
    "gamma": (fv.gamma_nll, {"log_scale": normal(9)}, {}, COUNTS + 1, {"shape": 2.0}),
    "poisson": (fv.poisson_nll, {"log_rate": normal(9)}, {}, COUNTS, {}),
    "poisson, int": (fv.poisson_nll, {"log_rate": normal(9)}, {}, COUNTS.int(), {}),
    "rate": (fv.poisson_rate_nll, {"rate": positive(9)}, {}, COUNTS, {}),
    "negative binomial": (
        fv.negative_binomial_nll,
        {"mean": positive(9)},
        {"inverse_dispersion": torch.rand(9) + 0.5},
        COUNTS,
        {},
    ),
    "negative binomial, of each element": (
        fv.negative_binomial_nll,
        {"mean": positive(9), "inverse_dispersion": positive(9)},
        {},
        COUNTS,
        {},
    ),
    "zero-inflated, raw": (
        fv.zero_inflated_negative_binomial_logits_nll,
        {"logits": normal(9), "zi_logits": normal(9), "library": 10 * positive(1)},
        {"log_dispersion": torch.randn(9)},
        COUNTS,
        {},
    ),
    "raw, CSR": (
        fv.negative_binomial_logits_nll,
        {"logits": normal(9), "library": 10 * positive()},
        {"log_dispersion": torch.randn(9)},
        "CSR",
        {},
    ),
    "multinomial": (fv.multinomial_nll, {"logits": normal(9)}, {}, COUNTS, {}),
    "multinomial, CSR": (fv.multinomial_nll, {"logits": normal(9)}, {}, "CSR", {}),
    "categorical": (fv.categorical_nll, {"logits": normal(5, 6)}, {}, CLASSES, {}),
    "logistic": (fv.discretized_logistic_nll, {"params": normal(6, 5)}, {}, LEVELS, {}),
    "mixture": (
        fv.discretized_logistic_mixture_nll,
        {"params": normal(20, 5)},
        {},
        LEVELS,
        {"components": 2},
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float64, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_draws_give_what_calls_one_by_one_give(backend: str, name: str, dtype: torch.dtype) -> None:
    function, drawn, shared, target, options = CASES[name]
    if target is not None and isinstance(target, str):
        target = COUNTS.to_sparse_csr()
    drawn = {key: value.to(dtype).requires_grad_() for key, value in drawn.items()}
    shared = {key: value.to(dtype).requires_grad_() for key, value in shared.items()}
    leaves = [*drawn.values(), *shared.values()]
    got = function(target=target, draws=K, **drawn, **shared, **options)
    assert got.shape == (K, B)
    weights = torch.rand(K, B, dtype=got.dtype)
    gradients = torch.autograd.grad((got * weights).sum(), leaves)
    each = [
        function(target=target, **{key: value[k] for key, value in drawn.items()}, **shared, **options)
        for k in range(K)
    ]
    want = torch.stack(each)
    assert torch.equal(got, want)
    wanted = torch.autograd.grad((want * weights).sum(), leaves)
    exact = dtype != torch.bfloat16
    for i, (a, b) in enumerate(zip(gradients, wanted, strict=True)):
        if i < len(drawn) and exact:
            torch.testing.assert_close(a, b)
        else:  # a sum over all draws, or rounded before it
            torch.testing.assert_close(a, b, rtol=1e-5 if exact else 0.05, atol=1e-5 if exact else 0.05)


def test_draws_pass_a_gradient_to_the_target(backend: str) -> None:
    mean, target = normal(9).requires_grad_(), torch.rand(B, 9, requires_grad=True)
    got = torch.autograd.grad(fv.gaussian_nll(mean, target, draws=K).sum(), target)[0]
    want = torch.autograd.grad(sum(fv.gaussian_nll(mean[k], target).sum() for k in range(K)), target)[0]
    torch.testing.assert_close(got, want)


def test_draws_compile_to_one_graph() -> None:
    def loss(logits: Tensor) -> Tensor:
        return fv.bernoulli_nll(logits, IMAGE, draws=K).logsumexp(0).sum()

    leaf = normal(3, 5, 7).requires_grad_()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(got, loss(leaf))
    (gradient,) = torch.autograd.grad(got, leaf)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fv.bernoulli_nll(normal(3), IMAGE[:, :, 0, 0], draws=2),
            ValueError,
            r"K = `draws` = 2, got \(3, 4, 3\)",
        ),
        (
            lambda: fv.bernoulli_nll(normal(3), IMAGE[:2, :, 0, 0], draws=K),
            ValueError,
            r"`target` must have B = 4 rows for the \(K, B, ...\) of `logits` \(3, 4, 3\), got \(2, 3\)",
        ),
        (
            lambda: fv.bernoulli_nll(normal(3)[0], IMAGE[:, :, 0, 0], draws=0),
            ValueError,
            "`draws` must be at least 1, got 0",
        ),
        (
            lambda: fv.bernoulli_nll(normal(3)[0], IMAGE[:, :, 0, 0], draws=2.0),
            TypeError,
            "`draws` must be an int, got 2.0",
        ),
        (
            lambda: fv.bernoulli_nll(normal(3)[:1].flatten(0, 1), IMAGE[:2, :, 0, 0]),
            ValueError,
            "`target` must have the shape",
        ),
    ],
)
def test_wrong_draws_are_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_draws_do_not_repeat_the_target(native: None) -> None:
    """16 draws of 4 MiB in half precision: repeating the target alone would take 64 MiB more."""
    from benchmarks.timing import peak_bytes

    logits, target = torch.randn(16, 4, 2**18), torch.rand(4, 2**18)
    with torch.no_grad():
        assert peak_bytes(lambda: fv.bernoulli_nll(logits, target, draws=16), torch.device("cpu")) < 2**20


LOGITS, X = torch.randn(K * B, 5), torch.rand(B, 5)


@pytest.mark.parametrize(
    ("call", "message", "advice"),
    [
        (
            lambda: fv.bernoulli_nll(LOGITS, X, draws=K),
            "fastvae.bernoulli_nll: `logits` must have shape (K, B, ...) = (3, 4, 5) with K = `draws` = 3, got "
            "(12, 5); did you mean logits.unflatten(0, (3, -1))?",
            lambda: fv.bernoulli_nll(LOGITS.unflatten(0, (3, -1)), X, draws=K),
        ),
        (
            lambda: likelihoods.Bernoulli().nll(LOGITS.view(K, B, 5), X, draws=K),
            "fastvae.likelihoods.Bernoulli: `params` must have K * B rows with K = `draws` = 3, got 3 rows for 4 of "
            "`target`; did you mean params.flatten(0, 1)?",
            lambda: likelihoods.Bernoulli().nll(LOGITS.view(K, B, 5).flatten(0, 1), X, draws=K),
        ),
        (
            lambda: fastvae.ELBO("bernoulli", samples=K)(LOGITS.view(K, B, 5), X, kl=torch.zeros(B)),
            "fastvae.ELBO: the decoder must return K * B rows, 3 times those of `x`, got 3 for 4 rows of `x`; did you "
            "mean recon.flatten(0, 1)?",
            lambda: fastvae.ELBO("bernoulli", samples=K)(LOGITS, X, kl=torch.zeros(B)),
        ),
        (
            lambda: fastvae.IWAE(Squared(), K)(
                lambda z: z.view(K, B, 5), X, torch.zeros(B, 5), torch.zeros(B, 5)
            ),
            "fastvae.IWAE: the decoder must return K * B rows, 3 times those of `x`, got 3 for 4 rows of `x`; did you "
            "mean recon.flatten(0, 1)?",
            lambda: fastvae.IWAE(Squared(), K)(lambda z: z, X, torch.zeros(B, 5), torch.zeros(B, 5)),
        ),
        (
            lambda: fastvae.ELBO("bernoulli", samples=K)(LOGITS[:, :3], X, kl=torch.zeros(B)),
            "fastvae.ELBO: `x` must have the shape of `recon` (4, 3), got (4, 5)",
            lambda: fastvae.ELBO("bernoulli", samples=K)(LOGITS[:, :3], X[:, :3], kl=torch.zeros(B)),
        ),
    ],
    ids=["function", "module", "ELBO", "IWAE of a module", "ELBO of another width"],
)
def test_the_message_says_how_to_arrange_the_draws(call, message: str, advice) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
    advice()


def test_a_decoder_that_returns_too_few_rows_gets_no_advice_about_draws() -> None:
    iwae, mu = fastvae.IWAE("bernoulli", samples=2), torch.zeros(5, 5)
    with pytest.raises(ValueError, match=r"2 times those of `x`, got 8 for 5 rows of `x`$"):
        iwae(lambda z: z[:8], torch.rand(5, 5), mu, mu)


class Spy(likelihoods.Bernoulli):
    """A Bernoulli that records the shapes of its data and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def nll(
        self, params: Any, target: Tensor, *, weight: Tensor | None = None, draws: int | None = None
    ) -> Tensor:
        self.seen.append((tuple(target.shape), None if weight is None else tuple(weight.shape), draws))
        return super().nll(params, target, weight=weight, draws=draws)


class Squared(nn.Module):
    """A likelihood of a user, without `draws`."""

    def nll(self, params: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return ((params - target).square() * (1 if weight is None else weight)).sum(1)


class Returns(nn.Module):
    """A likelihood of a user with `draws`, whose result has any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def nll(self, params: Tensor, target: Tensor, draws: int | None = None) -> Tensor:
        return params.new_ones(self.shape)


class ReturnsColumn(nn.Module):
    """A likelihood of a user without `draws`, whose result keeps a dimension of 1."""

    def nll(self, params: Tensor, target: Tensor) -> Tensor:
        return (params - target).square().sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("likelihood", "rows", "message"),
    [
        (
            Returns(K),
            1,
            "`nll` of Returns must return the shape (K, B) = (3, 1), got (3,); did you mean to return "
            "nll.unflatten(0, (3, -1))?",
        ),
        (Returns(B, K), B, "shape (K, B) = (3, 4), got (4, 3)"),
        (Returns(K, 1), B, "shape (K, B) = (3, 4), got (3, 1)"),
        (Returns(), B, "shape (K, B) = (3, 4), got ()"),
        (ReturnsColumn(), 1, "`nll` of ReturnsColumn must return the shape (B,) = (3,), got (3, 1)"),
    ],
    ids=["no rows", "transposed", "one row", "scalar", "column"],
)
def test_a_result_that_would_broadcast_is_refused(likelihood: nn.Module, rows: int, message: str) -> None:
    x, mu = X[:rows], torch.zeros(rows, 5)
    product = likelihoods.Product({"a": likelihood})
    calls = {
        "IWAE": lambda: fastvae.IWAE(likelihood, K)(lambda z: z, x, mu, mu),
        "ELBO": lambda: fastvae.ELBO(likelihood, samples=K)(LOGITS[: K * rows], x, mu, mu),
        "likelihoods.Product": lambda: product.nll({"a": LOGITS[: K * rows]}, {"a": x}, draws=K),
    }
    for where, call in calls.items():
        with pytest.raises(ValueError, match=re.escape(f"fastvae.{where}: ") + ".*" + re.escape(message)):
            call()


def test_options_are_given_to_modules_whose_nll_takes_any(native: None) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def nll(self, *arguments: Any, **options: Any) -> Tensor:
            self.seen.append(set(options))
            return Squared().nll(*arguments, weight=options["weight"])

    wrapper, weight = Wrapper(), torch.rand(B, 5)
    elbo = fastvae.ELBO(wrapper, samples=K)
    nll = elbo(LOGITS, X, kl=torch.zeros(B), weight=weight, validate=True).nll
    assert wrapper.seen == [{"weight", "validate"}]  # not `draws`, which the wrapped module may not have
    torch.testing.assert_close(nll, (weight * (LOGITS.view(K, B, 5) - X).square()).sum(2).mean(0))


@pytest.mark.parametrize("kind", [fastvae.ELBO, fastvae.IWAE])
def test_product_does_not_repeat_the_data_of_its_parts(backend: str, kind: type[fastvae.ELBO]) -> None:
    """ELBO and IWAE give K * B rows of parameters to the parts, with the data as they are."""
    spy, own = Spy(), Squared()
    product = likelihoods.Product({"a": spy, "b": own, "c": likelihoods.Product({"d": spy})})
    x: Any = {"a": X, "b": X, "c": {"d": X}}
    weight: Any = {"a": torch.rand(B, 1), "b": torch.rand(B, 5)}
    bound = kind(product, samples=K)
    mu, logvar = torch.randn(2, B, 5)
    z = bound.reparameterize(mu, logvar)[0]

    def decoder(z: Tensor) -> Any:
        return {"a": z, "b": z, "c": {"d": z}}

    if isinstance(bound, fastvae.IWAE):
        draws = bound.sample(mu, logvar)
        z, nll = draws.z, bound(decoder, x, draws=draws, weight=weight).nll
    else:
        nll = bound(decoder(z.flatten(0, 1)), x, kl=torch.zeros(B), weight=weight).nll
    assert spy.seen == [((B, 5), (B, 1), K), ((B, 5), None, K)]
    each = torch.stack([product.nll(decoder(one), x, weight=weight) for one in z])
    torch.testing.assert_close(nll, each if kind is fastvae.IWAE else each.mean(0))


def test_compiled_product_of_draws_is_one_graph(native: None) -> None:
    elbo = fastvae.ELBO(likelihoods.Product({"a": "bernoulli", "b": Squared()}), samples=K)

    def loss(params: Tensor, x: Tensor, kl: Tensor) -> Tensor:
        return elbo({"a": params, "b": params}, {"a": x, "b": x}, kl=kl).loss

    args = LOGITS, X, torch.rand(B)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), loss(*args))
