"""IWAE on a model with known evidence and gradients: z ~ N(0, 1) and x ~ N(a z, 1) in one dimension."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import functional, likelihoods
from fastvae.bounds import ESTIMATORS, PosteriorDraws

GAUSSIAN = likelihoods.Gaussian()
A, MU, LOGVAR = 1.3, 0.4, -0.6  # the true posterior of x = 1 has mean 0.48 and log-variance -0.99


def log_evidence(x: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, math.sqrt(A * A + 1)).log_prob(x)


def estimates(estimator: str, samples: int, n: int, seed: int = 0) -> tuple[fastvae.IWAEOutput, Tensor]:
    """For n equal rows: the output, and each row's gradients with respect to mu and logvar, (n, 2)."""
    torch.manual_seed(seed)
    mu = torch.full((n, 1), MU, dtype=torch.float64, requires_grad=True)
    logvar = torch.full((n, 1), LOGVAR, dtype=torch.float64, requires_grad=True)
    iwae = fastvae.IWAE(GAUSSIAN, samples, estimator, reduction="sum")
    out = iwae(lambda z: A * z, torch.ones(n, 1, dtype=torch.float64), mu, logvar)
    gradients = torch.autograd.grad(out.loss, (mu, logvar))
    return out, torch.cat(gradients, 1)


def z_scores(a: Tensor, b: Tensor) -> Tensor:
    """The difference of the means of two sets of independent rows, in standard errors."""
    return (a.mean(0) - b.mean(0)).abs() / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_bound_is_unbiased_for_the_evidence(samples: int) -> None:
    out, _ = estimates("iwae", samples, 100_000)
    evidence = torch.exp(log_evidence(torch.ones((), dtype=torch.float64)))
    ratio = torch.exp(out.bound)
    assert (ratio.mean() - evidence).abs() < 4 * ratio.std() / math.sqrt(len(ratio))
    assert out.bound.mean() < torch.log(evidence)


@pytest.mark.parametrize("samples", [2, 8])
def test_dreg_agrees_with_iwae_in_expectation(samples: int) -> None:
    a, b = (estimates(estimator, samples, 100_000, seed)[1] for estimator, seed in (("iwae", 1), ("dreg", 2)))
    assert (z_scores(a, b) < 4).all()


def test_stl_agrees_with_iwae_for_one_draw_and_is_biased_for_more() -> None:
    a, b = (estimates(estimator, 1, 100_000, seed)[1] for estimator, seed in (("iwae", 1), ("stl", 2)))
    assert (z_scores(a, b) < 4).all()
    a, b = (estimates(estimator, 8, 100_000, seed)[1] for estimator, seed in (("iwae", 1), ("stl", 2)))
    assert (z_scores(a, b) > 10).any()


def test_stl_and_dreg_have_no_variance_at_the_true_posterior() -> None:
    """Roeder et al. 2017, section 3: the path derivative is 0 in every draw."""
    variance = 1 / (A * A + 1)
    mu = torch.full((9, 1), A * variance, dtype=torch.float64, requires_grad=True)
    logvar = torch.full((9, 1), math.log(variance), dtype=torch.float64, requires_grad=True)
    for estimator in ("stl", "dreg"):
        iwae = fastvae.IWAE(GAUSSIAN, 5, estimator)
        out = iwae(lambda z: A * z, torch.ones(9, 1, dtype=torch.float64), mu, logvar)
        for gradient in torch.autograd.grad(out.loss, (mu, logvar)):
            assert gradient.abs().max() < 1e-12
        torch.testing.assert_close(out.bound, log_evidence(torch.ones(9, dtype=torch.float64)))
        torch.testing.assert_close(out.ess, torch.full_like(out.ess, 5))


@pytest.mark.slow
def test_signal_to_noise_falls_under_iwae_and_rises_under_dreg() -> None:
    """Rainforth et al. 2018 and Tucker et al. 2019: as K^-1/2 and K^1/2."""
    counts = [2, 4, 8, 16, 32]
    for estimator, slope in (("iwae", -0.5), ("dreg", 0.5)):
        ratios = []
        for samples in counts:
            gradient = estimates(estimator, samples, 1_000_000)[1][:, 0]
            ratios.append((gradient.mean().abs() / gradient.std()).log2())
        found = (ratios[-1] - ratios[0]) / math.log2(counts[-1] / counts[0])
        assert abs(found - slope) < 0.1, (estimator, found)


class Model(nn.Module):
    def __init__(self, estimator: str, samples: int = 6, **options: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5))
        self.mu, self.logvar = nn.Parameter(torch.randn(4, 2)), nn.Parameter(0.3 * torch.randn(4, 2))
        self.iwae = fastvae.IWAE("bernoulli", samples, estimator, **options)

    def forward(self, x: Tensor) -> fastvae.IWAEOutput:
        torch.manual_seed(5)
        return self.iwae(self.decoder, x, self.mu, self.logvar)

    def gradients(self, x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(self(x).loss, list(self.parameters())))


X = (torch.rand(4, 5) > 0.5).float()


def test_bound_is_the_formula_of_burda(backend: str) -> None:
    model = Model("iwae")
    out = model(X)
    torch.manual_seed(5)
    z, _ = functional.reparameterize_kl(model.mu, model.logvar, samples=6)
    q = torch.distributions.Normal(model.mu, torch.exp(model.logvar / 2))
    p = torch.distributions.Bernoulli(logits=model.decoder(z))
    log_w = (
        p.log_prob(X).sum(-1) + torch.distributions.Normal(0, 1).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    )
    want = torch.logsumexp(log_w, 0) - math.log(6)
    torch.testing.assert_close(out.bound, want)
    torch.testing.assert_close(out.loss, -want.mean())
    torch.testing.assert_close(-out.nll - out.kl, log_w)
    weights = torch.softmax(log_w, 0)
    torch.testing.assert_close(out.ess, 1 / weights.square().sum(0))
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    for a, b in zip(ours, torch.autograd.grad(-want.mean(), list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_estimators_give_the_decoder_the_same_gradient() -> None:
    first, *rest = (Model(estimator).gradients(X)[2:] for estimator in ESTIMATORS)
    for other in rest:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_give_the_same_gradient(estimator: str, chunk: int) -> None:
    whole, apart = Model(estimator), Model(estimator, chunk=chunk)
    torch.testing.assert_close(apart(X).bound, whole(X).bound)
    for a, b in zip(apart.gradients(X), whole.gradients(X), strict=True):
        torch.testing.assert_close(a, b)


def test_chunks_hold_the_memory_of_one() -> None:
    from benchmarks.timing import peak_bytes

    peaks = []
    for chunk in (None, 2):
        iwae = fastvae.IWAE("bernoulli", 32, chunk=chunk)
        decoder = nn.Sequential(
            nn.Linear(2, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 5)
        )
        mu, x = torch.zeros(64, 2, requires_grad=True), torch.rand(64, 5)

        def step(
            iwae: fastvae.IWAE = iwae, decoder: nn.Module = decoder, mu: Tensor = mu, x: Tensor = x
        ) -> None:
            iwae(decoder, x, mu, mu).loss.backward()

        step()
        peaks.append(peak_bytes(step, torch.device("cpu")))
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_decoders_output_serves_with_its_draws(estimator: str) -> None:
    model = Model(estimator)
    want = model.gradients(X)
    torch.manual_seed(5)
    draws = model.iwae.sample(model.mu, model.logvar)
    out = model.iwae(model.decoder(draws.z.flatten(0, 1)), X, draws=draws)
    for a, b in zip(torch.autograd.grad(out.loss, list(model.parameters())), want, strict=True):
        torch.testing.assert_close(a, b)


def test_likelihoods_of_every_kind_are_served() -> None:
    counts = torch.randint(0, 5, (4, 5)).float()
    head = nn.Linear(2, 10)
    mu, logvar = torch.zeros(4, 2), torch.zeros(4, 2)

    class Own(nn.Module):
        def nll(self, params: Tensor, target: Tensor) -> Tensor:
            return (params - target).square().sum(1)

    cases = (
        (likelihoods.Gaussian("per_element"), head, X),
        (likelihoods.Gaussian("learned"), nn.Linear(2, 5), X),
        (likelihoods.Laplace("per_element", log_scale_bounds=(-2, 2)), head, X),
        (likelihoods.Bernoulli(from_probs=True), nn.Sequential(nn.Linear(2, 5), nn.Sigmoid()), X),
        (likelihoods.NegativeBinomial(5), lambda z: (head(z)[:, :5], 50 * torch.ones(len(z))), counts),
        (likelihoods.NegativeBinomial(5), lambda z: (head(z)[:, :5], 50 * torch.ones(len(z), 1)), counts),
        (likelihoods.Multinomial(5), lambda z: head(z)[:, :5], counts),
        (
            likelihoods.Product({"a": "bernoulli", "b": "poisson"}),
            lambda z: {"a": head(z)[:, :5], "b": head(z)[:, 5:]},
            {"a": X, "b": counts},
        ),
        (Own(), nn.Linear(2, 5), X),
    )
    for likelihood, decoder, x in cases:
        iwae = fastvae.IWAE(likelihood, 3)
        torch.manual_seed(1)
        out = iwae(decoder, x, mu, logvar)
        torch.manual_seed(1)
        draws = iwae.sample(mu, logvar)
        want = torch.stack([likelihood.nll(decoder(z), x) for z in draws.z])
        torch.testing.assert_close(out.nll, want)


def test_dreg_refuses_draws_that_are_not_reparameterised() -> None:
    model = Model("dreg")
    draws = model.iwae.sample(model.mu, model.logvar)
    with pytest.raises(ValueError, match="needs draws that are reparameterised"):
        model.iwae(model.decoder, X, draws=draws._replace(z=draws.z.detach()))


def test_non_finite_weight_is_named_with_its_row(range_warnings: None) -> None:
    model, x = Model("iwae"), X.clone()
    x[2, 1] = math.nan
    with pytest.warns(UserWarning, match=r"the log-weight of draw 0 of row 2 is nan.* in row 2 of the data"):
        out = model(x)
    assert out.bound.isnan().tolist() == [False, False, True, False]


def test_beta_and_reductions() -> None:
    model = Model("iwae", reduction="none")
    model.iwae.beta = 0.5
    out = model(X)
    want = torch.logsumexp(-out.nll - 0.5 * out.kl, 0) - math.log(6)
    torch.testing.assert_close(out.bound, want)
    torch.testing.assert_close(out.loss, -want)
    model.iwae.reduction = "sum"
    torch.testing.assert_close(model(X).loss, -want.sum())


def test_small_posterior_scales_keep_the_digits_of_log_q() -> None:
    mu, logvar = torch.full((2, 1), 100.0), torch.full((2, 1), -30.0)
    for estimator in ESTIMATORS:
        draws = fastvae.IWAE(GAUSSIAN, 4, estimator).sample(mu, logvar, seed=torch.tensor([1, 2]))
        eps, _ = functional.reparameterize_kl(0 * mu, 0 * mu, samples=4, seed=torch.tensor([1, 2]))
        want = -0.5 * (eps.square() + logvar + math.log(2 * math.pi)).sum(-1)
        torch.testing.assert_close(draws.log_q, want)


def test_compiled_bounds_give_the_same() -> None:
    for estimator in ESTIMATORS:
        model = Model(estimator)

        def loss(x: Tensor, seed: Tensor, model: Model = model) -> Tensor:
            draws = model.iwae.sample(model.mu, model.logvar, seed=seed)
            return model.iwae(model.decoder(draws.z.flatten(0, 1)), x, draws=draws).loss

        seed = torch.tensor([3, 4])
        parameters = list(model.parameters())
        want = torch.autograd.grad(loss(X, seed), parameters)
        got = torch.autograd.grad(
            torch.compile(loss, fullgraph=True, backend="aot_eager")(X, seed), parameters
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


# For each case the likelihood, how many outputs of the decoder it takes for a value, and the data.
FUSED = {
    "bernoulli": (lambda: likelihoods.Bernoulli(), 1, lambda: X),
    "bytes": (lambda: likelihoods.Bernoulli(), 1, lambda: torch.randint(0, 256, (4, 5), dtype=torch.uint8)),
    "head": (lambda: likelihoods.Gaussian("per_element"), 2, lambda: X),
    "learned scale": (lambda: likelihoods.Gaussian("learned"), 1, lambda: X),
    "learned scale of StudentT": (lambda: likelihoods.StudentT(3.0, "learned"), 1, lambda: X),
    "poisson": (lambda: likelihoods.Poisson(), 1, lambda: torch.randint(0, 9, (4, 5)).float()),
}
WEIGHTS = {
    "no weight": None,
    "mask": torch.rand(4, 1) > 0.3,
    "weight": torch.rand(4, 5) * (torch.rand(4, 5) > 0.3),
}


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, compute bounds with torch's ops, which follow the nll's kernel."""
    return lambda: monkeypatch.setattr(fastvae.IWAE, "_fused", lambda *_: None)


def all_results(out: fastvae.IWAEOutput, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of a loss for which each row counts differently."""
    factor = torch.arange(1, out.loss.numel() + 1, dtype=out.loss.dtype).view(out.loss.shape)
    return [*out, *torch.autograd.grad((factor * out.loss).sum(), tensors)]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kernel_of_the_bound_agrees_with_torchs_ops(
    native: None,
    unfused: Callable[[], None],
    name: str,
    weight: str,
    reduction: str,
    dtype: torch.dtype,
    estimator: str,
) -> None:
    make, outputs, data = FUSED[name]
    likelihood, x = make().to(dtype), data()
    iwae = fastvae.IWAE(likelihood, 6, estimator, beta=0.7, reduction=reduction)
    decoder = nn.Linear(2, 5 * outputs).to(dtype)
    mu, logvar = (torch.randn(4, 2).to(dtype).requires_grad_() for _ in range(2))
    tensors = [mu, logvar, *decoder.parameters(), *likelihood.parameters()]
    found = []
    for _ in range(2):
        draws = iwae.sample(mu, logvar, seed=torch.tensor([3, 4]))
        recon = decoder(draws.z.flatten(0, 1))
        is_served = iwae._fused(recon, x, draws, WEIGHTS[weight]) is not None
        assert is_served == (not found)
        found.append(all_results(iwae(recon, x, draws=draws, weight=WEIGHTS[weight]), tensors))
        unfused()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.detach().abs().max()))
        )


def test_the_kernel_of_the_bound_agrees_where_weights_are_zero_or_not_finite(
    native: None, unfused: Callable[[], None]
) -> None:
    """Columns: a draw that is impossible, all of them impossible, one that is certain to infinity, and a NaN."""
    recon = torch.randn(6, 4, 5)
    recon[2, 0], recon[:, 1], recon[3, 3, 1] = math.inf, math.inf, math.nan
    log_q, log_p = torch.randn(6, 4), torch.randn(6, 4)
    log_p[4, 2] = math.inf
    found = []
    for _ in range(2):
        tensors = [t.clone().requires_grad_() for t in (recon, log_q, log_p)]
        draws = PosteriorDraws(torch.zeros(6, 4, 2), *tensors[1:])
        iwae = fastvae.IWAE("bernoulli", 6, reduction="none")
        out = iwae(tensors[0].flatten(0, 1), torch.zeros(4, 5), draws=draws)
        found.append(all_results(out, tensors))
        unfused()
    loss, bound = found[0][:2]
    assert loss.isfinite().tolist() == [True, False, False, False]
    assert torch.equal(bound[1:3], torch.tensor([-math.inf, math.inf]))
    torch.testing.assert_close(loss, -bound, equal_nan=True)
    # Among torch's ops, the surrogate of the gradient makes a NaN of the third row's loss.
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_kernel_of_the_bound_gives_the_same_bits_with_any_number_of_threads(
    native: None, threads: None, rows: int
) -> None:
    recon, x = torch.randn(50, rows, 1500, requires_grad=True), torch.rand(rows, 1500)
    draws = PosteriorDraws(torch.zeros(50, rows, 2), torch.randn(50, rows), torch.randn(50, rows))
    iwae = fastvae.IWAE("bernoulli", 50)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(all_results(iwae(recon.flatten(0, 1), x, draws=draws), [recon]))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_only_the_loss_of_a_bound_has_a_gradient(unfused: Callable[[], None]) -> None:
    for _ in range(2):
        loss, *rest = Model("iwae")(X)
        assert loss.requires_grad
        assert not any(t.requires_grad for t in rest)
        with torch.no_grad():
            assert not Model("iwae")(X).loss.requires_grad
        unfused()


def test_a_kept_graph_gives_the_gradient_again_and_no_second_derivative(native: None) -> None:
    model = Model("dreg")
    parameters, loss = list(model.parameters()), model(X).loss
    first = torch.autograd.grad(3 * loss, parameters, retain_graph=True)
    again = torch.autograd.grad(3 * loss, parameters, retain_graph=True)
    assert all(map(torch.equal, first, again))
    of_bias = torch.autograd.grad(loss, model.decoder[2].bias, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(of_bias.sum(), parameters)


MU_2 = torch.zeros(4, 2)
WRONG = {
    "estimator": (
        lambda: fastvae.IWAE("bernoulli", 5, "vimco"),
        ValueError,
        "fastvae.IWAE: `estimator` must be one of 'iwae', 'stl', 'dreg', got 'vimco'",
    ),
    "no samples": (lambda: fastvae.IWAE("bernoulli", 0), ValueError, "`samples` must be at least 1, got 0"),
    "no chunk": (
        lambda: fastvae.IWAE("bernoulli", 5, chunk=0),
        ValueError,
        "`chunk` must be at least 1, got 0",
    ),
    "neither": (
        lambda: fastvae.IWAE("bernoulli", 5)(nn.Identity(), X),
        TypeError,
        "the posterior or its draws",
    ),
    "half": (
        lambda: fastvae.IWAE("bernoulli", 5)(nn.Identity(), X, logvar=MU_2),
        TypeError,
        "the posterior or its draws",
    ),
    "output": (
        lambda: fastvae.IWAE("bernoulli", 5)(torch.zeros(20, 5), X, MU_2, MU_2),
        TypeError,
        "`decoder` must be a function of z .*, got Tensor; sample first",
    ),
    "output in chunks": (
        lambda: (iwae := fastvae.IWAE("bernoulli", 5, chunk=2))(
            torch.zeros(20, 5), X, draws=iwae.sample(MU_2, MU_2)
        ),
        TypeError,
        "`chunk` needs the decoder as a function of z, got Tensor",
    ),
    "other draws": (
        lambda: fastvae.IWAE("bernoulli", 5)(
            torch.zeros(20, 5), X, draws=fastvae.IWAE("bernoulli", 4).sample(MU_2, MU_2)
        ),
        ValueError,
        "K = `samples` = 5, got \\(4, 4, 2\\)",
    ),
    "rows": (
        lambda: fastvae.IWAE("bernoulli", 5)(lambda z: torch.zeros(7, 5), X, MU_2, MU_2),
        ValueError,
        "must return K \\* B rows, 5 times those of `x`, got 7",
    ),
    "data": (
        lambda: fastvae.IWAE("bernoulli", 5)(lambda z: torch.zeros(20, 5), X[:, :3], MU_2, MU_2),
        ValueError,
        "fastvae.IWAE: `x` must have the shape of `recon` \\(4, 5\\), got \\(4, 3\\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_refused(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


class WithPrior(Model):
    """A model whose prior is a mixture of three Gaussians, in float64."""

    def __init__(self, estimator: str) -> None:
        super().__init__(estimator)
        torch.manual_seed(4)
        prior = fastvae.priors.GaussianMixture(3, 2)
        nn.init.normal_(prior.logvar)
        nn.init.normal_(prior.logits)  # type: ignore[arg-type]
        self.iwae = fastvae.IWAE("bernoulli", 6, estimator, prior=prior)
        self.double()

    def log_prior(self, z: Tensor) -> Tensor:
        d = torch.distributions
        prior = self.iwae.prior
        parts = d.Independent(d.Normal(prior.mu, torch.exp(prior.logvar / 2)), 1)
        return d.MixtureSameFamily(d.Categorical(logits=prior.logits), parts).log_prob(z)

    def log_weights(self, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        d = torch.distributions
        nll = d.Bernoulli(logits=self.decoder(z)).log_prob(X.double()).sum(-1)
        return nll + self.log_prior(z) - d.Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(-1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_prior_takes_the_place_of_the_standard_normal(backend: str, estimator: str) -> None:
    """The value is the bound under the prior. The gradients are those of the definitions: the whole gradient of the
    bound; without the score of q (Roeder et al. 2017); and, for what reaches z, weighted by w and not by 1 (Tucker et
    al. 2019, equation 8). The prior, like the decoder, gets the gradient of the bound."""
    model = WithPrior(estimator)
    out = model(X.double())
    torch.manual_seed(5)
    z, _ = functional.reparameterize_kl(model.mu, model.logvar, samples=6)
    fixed = (model.mu, model.logvar) if estimator == "iwae" else (model.mu.detach(), model.logvar.detach())
    log_w = model.log_weights(z, *fixed)
    want = torch.logsumexp(log_w, 0) - math.log(6)
    torch.testing.assert_close(out.bound, want)
    posterior = [model.mu, model.logvar]
    rest = [*model.decoder.parameters(), *model.iwae.prior.parameters()]
    weights = torch.softmax(log_w.detach(), 0)
    surrogate = (weights * log_w).sum(0).mean()
    if estimator == "dreg":
        surrogate = (weights.square() * log_w).sum(0).mean()
    expected = [
        *torch.autograd.grad(-surrogate, posterior, retain_graph=True),
        *torch.autograd.grad(-want.mean(), rest),
    ]
    for a, b in zip(torch.autograd.grad(out.loss, [*posterior, *rest]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bound_with_a_vamp_prior_trains_its_pseudo_inputs_and_its_encoder() -> None:
    encoder = nn.Linear(5, 4)
    prior = fastvae.priors.VampPrior(3, lambda u: encoder(u).chunk(2, 1), 2, 5)
    iwae = fastvae.IWAE("bernoulli", 4, "dreg", prior=prior)
    mu, logvar = (t.detach().requires_grad_() for t in encoder(X).chunk(2, 1))
    iwae(nn.Linear(2, 5), X, mu, logvar).loss.backward()
    for tensor in (prior.pseudo_inputs, encoder.weight, mu, logvar):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prior_of_a_half_precision_posterior_has_the_density_of_the_exact_z(
    backend: str, dtype: torch.dtype
) -> None:
    prior = fastvae.priors.GaussianMixture(3, 2)
    iwae, seed = fastvae.IWAE("bernoulli", 4, "dreg", prior=prior), torch.tensor([1, 0])
    mu, logvar = (torch.randn(4, 2).to(dtype).requires_grad_() for _ in range(2))
    draws = iwae.sample(mu, logvar, seed=seed)
    assert (draws.z.dtype, draws.log_p.dtype) == (dtype, torch.float32)
    exact = iwae.sample(mu.float(), logvar.float(), seed=seed)
    torch.testing.assert_close(draws.log_p, exact.log_p)
    (at_z,) = torch.autograd.grad(draws.log_p.sum(), draws.z, retain_graph=True)
    (expected,) = torch.autograd.grad(exact.log_p.sum(), exact.z)
    torch.testing.assert_close(at_z.float(), expected, rtol=1e-2, atol=1e-2)
