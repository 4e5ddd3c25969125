"""Priors: their densities, samples and KLs, alone and in an ELBO."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import fastvae
from fastvae import functional
from fastvae.posteriors import DiagonalGaussian, LogStd, LogVar, ScaleForm, Softplus
from fastvae.priors import GaussianMixture, Prior, StandardNormal, VampPrior

D, X = 3, 5


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(X, 2 * D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.linear(x).chunk(2, 1)
        return mu, logvar


def mixture(components: int = 4) -> GaussianMixture:
    prior = GaussianMixture(components, D)
    with torch.no_grad():
        prior.logvar.normal_()
        if prior.logits is not None:
            prior.logits.normal_()
    return prior


def as_distribution(mu: Tensor, logvar: Tensor, logits: Tensor) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mu, torch.exp(logvar / 2)), 1))


def priors(form: str = "logvar") -> dict[str, Prior]:
    return {
        "standard": StandardNormal(D),
        "mixture": mixture(),
        "one gaussian": mixture(1),
        "vamp": VampPrior(4, Encoder(), D, X, form=form),
    }


NAMES = tuple(priors())


def test_mixture_log_prob_equals_torch_distributions(backend: str) -> None:
    prior, z = mixture().double(), torch.randn(6, D, dtype=torch.float64)
    want = as_distribution(prior.mu, prior.logvar, prior.logits).log_prob(z)
    torch.testing.assert_close(prior.log_prob(z), want)


def test_vamp_log_prob_is_the_mean_of_the_posteriors_of_the_pseudo_inputs(backend: str) -> None:
    encoder, z = Encoder().double(), torch.randn(6, D, dtype=torch.float64)
    prior = VampPrior(4, encoder, D, X, init=torch.randn(4, X), bounds=(-0.5, 0.5)).double()
    mu, logvar = encoder(prior.pseudo_inputs.clamp(-0.5, 0.5))
    want = as_distribution(mu, logvar, torch.zeros(4, dtype=torch.float64)).log_prob(z)
    got = prior.log_prob(z)
    torch.testing.assert_close(got, want)
    parameters = [prior.pseudo_inputs, *encoder.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(want.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_standard_normal_log_prob_equals_torch_distributions() -> None:
    z = torch.randn(6, D)
    torch.testing.assert_close(StandardNormal(D).log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(1))


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_density(name: str) -> None:
    """The mean of -log p over samples is the entropy, which an integral over a grid gives for one dimension at a time;
    here, moments are compared with those of the components."""
    prior = priors()[name]
    z = prior.sample(40_000, generator=torch.Generator().manual_seed(0))
    assert z.shape == (40_000, D)
    assert not z.requires_grad
    if isinstance(prior, (GaussianMixture, VampPrior)):
        mu, logvar, log_weight = prior.components()
        weight = torch.full((len(mu),), 1 / len(mu)) if log_weight is None else log_weight.exp()
        mean = (weight[:, None] * mu).sum(0)
        variance = (weight[:, None] * (logvar.exp() + mu**2)).sum(0) - mean**2
    else:
        mean, variance = torch.zeros(D), torch.ones(D)
    error = (z.var(0) / len(z)).sqrt()
    assert ((z.mean(0) - mean).abs() < 5 * error).all()
    torch.testing.assert_close(z.var(0), variance.detach(), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_sampled_kl_is_log_q_minus_log_p(backend: str, name: str) -> None:
    prior = priors()[name].double()
    if isinstance(prior, VampPrior):
        prior._encoder[0].double()
    mu, logvar, eps = torch.randn(3, 6, D, dtype=torch.float64)
    z, kl = Prior.reparameterize_kl(_Sampled(prior), mu, logvar, eps=eps)
    torch.testing.assert_close(z, mu + torch.exp(logvar / 2) * eps)
    want = Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(1) - prior.log_prob(z)
    torch.testing.assert_close(kl, want)


class _Sampled(Prior):
    """A prior of the user's own, with no analytic KL."""

    def __init__(self, prior: Prior) -> None:
        super().__init__(prior.dim)
        self.prior = prior

    def log_prob(self, z: Tensor) -> Tensor:
        return self.prior.log_prob(z)


@pytest.mark.parametrize("name", ["standard", "one gaussian"])
def test_analytic_kl_is_the_mean_of_the_sampled_one(name: str) -> None:
    prior = priors()[name]
    mu, logvar = torch.randn(2, 2, D)
    z, kl = prior.reparameterize_kl(mu, logvar, samples=50_000)
    log_q = Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(2)
    sampled = log_q - prior.log_prob(z.flatten(0, 1)).unflatten(0, (50_000, 2))
    assert ((sampled.mean(0) - kl).abs() < 5 * sampled.std(0) / math.sqrt(50_000)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [None, 3])
def test_elbo_with_a_prior_equals_the_formula(backend: str, name: str, samples: int | None) -> None:
    prior = priors()[name]
    elbo = fastvae.ELBO("bernoulli", prior=prior, beta=0.5)
    mu, logvar = (torch.randn(6, D, requires_grad=True) for _ in range(2))
    z, kl = elbo.reparameterize(mu, logvar, samples=samples, seed=torch.tensor([1, 0]))
    assert z.shape == ((6, D) if samples is None else (samples, 6, D))
    assert kl.shape == (6,)
    analytic = prior.analytic_kl(mu, logvar)
    if analytic is None:
        draws = z.reshape(-1, 6, D)
        log_q = Normal(mu, torch.exp(logvar / 2)).log_prob(draws).sum(2)
        analytic = (log_q - prior.log_prob(draws.flatten(0, 1)).unflatten(0, (-1, 6))).mean(0)
    torch.testing.assert_close(kl, analytic, rtol=1e-5, atol=1e-5)
    x = torch.rand(6, X)
    out = elbo(torch.zeros(6, X), x, kl=kl)
    torch.testing.assert_close(out.loss, (X * math.log(2) + 0.5 * kl).mean())
    out.loss.backward()
    assert all(p.grad is not None for p in elbo.parameters())
    assert mu.grad is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["log_std", "softplus"])
def test_posterior_of_another_form_and_a_packed_head_give_the_kl_of_the_log_variance(
    backend: str, name: str, form: str
) -> None:
    def logvar_of(v: Tensor) -> Tensor:
        return 2 * (v if form == "log_std" else torch.log(nn.functional.softplus(v) + 1e-4))

    prior = other = priors(form)[name]
    if isinstance(prior, VampPrior):
        encoder = prior._encoder[0]

        def encode(u: Tensor) -> tuple[Tensor, Tensor]:
            mu, v = encoder(u)
            return mu, logvar_of(v)

        other = VampPrior(4, encode, D, X, init=prior.pseudo_inputs.detach())
    head, eps = torch.randn(6, 2 * D), torch.randn(6, D)
    mu, v = head.chunk(2, 1)
    z, kl = prior.reparameterize_kl(head, form=form, eps=eps)
    other_z, other_kl = other.reparameterize_kl(mu, logvar_of(v), eps=eps)
    torch.testing.assert_close(z, other_z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kl, other_kl, rtol=1e-4, atol=1e-4)


FORMS = ("logvar", "log_std", "softplus", "variance", LogStd(soft_clamp=1.5, eps=1e-2))


@pytest.mark.parametrize("is_packed", [False, True], ids=["pair", "packed"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_datum_that_is_the_only_pseudo_input_has_no_kl(form: str | ScaleForm, is_packed: bool) -> None:
    linear, x = nn.Linear(X, 2 * D), torch.rand(1, X)
    encoder = linear if is_packed else lambda u: linear(u).chunk(2, 1)
    prior = VampPrior(1, encoder, D, X, init=x, form=form)
    _, kl = fastvae.ELBO("bernoulli", prior=prior, posterior=form).reparameterize(linear(x))
    torch.testing.assert_close(kl, torch.zeros(1), rtol=0, atol=1e-5)
    draws = fastvae.IWAE("bernoulli", 3, prior=prior, posterior=form).sample(linear(x))
    torch.testing.assert_close(draws.log_q, draws.log_p, rtol=0, atol=1e-5)


def test_datum_of_another_form_in_half_precision_has_no_kl() -> None:
    linear, x = nn.Linear(X, 2 * D).bfloat16(), torch.rand(1, X).bfloat16()
    prior = VampPrior(1, linear, D, X, init=x, form="softplus").bfloat16()
    _, kl = fastvae.ELBO("bernoulli", prior=prior, posterior="softplus").reparameterize(linear(x))
    torch.testing.assert_close(kl, torch.zeros(1), rtol=0, atol=1e-5)


def test_vamp_prior_reads_a_packed_latent_image() -> None:
    head = torch.randn(4, 6, 2, 2)
    mu, logvar, _ = VampPrior(4, lambda u: head, 12, X, form="log_std").components()
    assert torch.equal(mu, head[:, :3].flatten(1))
    assert torch.equal(logvar, 2 * head[:, 3:].flatten(1))


@pytest.mark.parametrize("objective", ["ELBO", "IWAE"])
def test_vamp_prior_must_be_given_its_form_beside_a_posterior_that_is_no_log_variance(objective: str) -> None:
    make: dict[str, Callable[..., fastvae.ELBO]] = {
        "ELBO": partial(fastvae.ELBO, "bernoulli"),
        "IWAE": partial(fastvae.IWAE, "bernoulli", 2),
    }
    prior = VampPrior(4, Encoder(), D, X)
    for posterior, form in (
        ("softplus", "'softplus'"),
        (Softplus(), "'softplus'"),
        (Softplus(eps=0.01), "fastvae.posteriors.Softplus(eps=0.01)"),
        (LogVar(clamp=[-30, 20]), "fastvae.posteriors.LogVar(clamp=(-30.0, 20.0), bounds=None)"),  # type: ignore[arg-type]
    ):
        message = (
            f"fastvae.{objective}: `form` of the VampPrior must be given where `posterior` is {form}, got None; write "
            f"VampPrior(..., form={form}) if its encoder returns what the posterior reads, or VampPrior(..., "
            "form='logvar') if it returns log-variances"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            make[objective](prior=prior, posterior=posterior)
    make[objective](prior=prior, posterior=LogVar())


def test_encoder_of_a_prior_may_return_log_variances_of_a_posterior_of_another_form() -> None:
    linear, x = nn.Linear(X, 2 * D), torch.rand(1, X)

    def encode(u: Tensor) -> tuple[Tensor, Tensor]:
        posterior = DiagonalGaussian(linear(u), "softplus")
        return posterior.mean, posterior.logvar

    prior = VampPrior(1, encode, D, X, init=x, form="logvar")
    _, kl = fastvae.ELBO("bernoulli", prior=prior, posterior="softplus").reparameterize(linear(x))
    torch.testing.assert_close(kl, torch.zeros(1), rtol=0, atol=1e-5)


def test_elbo_that_averages_over_draws_with_a_prior_equals_the_formula(backend: str) -> None:
    elbo = fastvae.ELBO("bernoulli", prior=mixture(), samples=3)
    mu, logvar = torch.randn(2, 6, D)
    z, kl = elbo.reparameterize(mu, logvar)
    assert (z.shape, kl.shape) == ((3, 6, D), (6,))
    out = elbo(torch.zeros(18, X), torch.rand(6, X), kl=kl)
    torch.testing.assert_close(out.loss, (X * math.log(2) + kl).mean())


def test_default_elbo_has_no_prior_and_the_same_kl_as_the_standard_normal() -> None:
    mu, logvar = torch.randn(2, 4, D)
    seed = torch.tensor([1, 0])
    for a, b in zip(
        fastvae.ELBO("bernoulli").reparameterize(mu, logvar, seed=seed),
        fastvae.ELBO("bernoulli", prior=StandardNormal(D)).reparameterize(mu, logvar, seed=seed),
        strict=True,
    ):
        assert torch.equal(a, b)
    recon, x = torch.zeros(4, X), torch.rand(4, X)
    one = fastvae.ELBO("bernoulli", prior=StandardNormal(D))(recon, x, mu, logvar)
    assert torch.equal(one.loss, fastvae.ELBO("bernoulli")(recon, x, mu, logvar).loss)


def test_free_bits_use_the_analytic_kl_of_every_dimension() -> None:
    prior = mixture(1)
    elbo = fastvae.ELBO("bernoulli", prior=prior, free_bits=0.5)
    mu, logvar = torch.randn(2, 4, D)
    _, kl = elbo.reparameterize(mu, logvar)
    torch.testing.assert_close(kl, prior.analytic_kl(mu, logvar, reduction="none"))
    assert kl.shape == (4, D)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_posteriors_with_float32_priors(backend: str, dtype: torch.dtype) -> None:
    elbo = fastvae.ELBO("bernoulli", prior=mixture())
    mu, logvar = (torch.randn(4, D).to(dtype).requires_grad_() for _ in range(2))
    z, kl = elbo.reparameterize(mu, logvar)
    assert (z.dtype, kl.dtype) == (dtype, torch.float32)
    kl.sum().backward()
    assert mu.grad is not None
    assert mu.grad.dtype == dtype


def test_image_shaped_latents_are_flattened(backend: str) -> None:
    prior = GaussianMixture(4, 12)
    elbo = fastvae.ELBO("bernoulli", prior=prior)
    mu, logvar = torch.randn(2, 5, 3, 2, 2)
    z, kl = elbo.reparameterize(mu, logvar)
    assert z.shape == mu.shape
    want = Normal(mu, torch.exp(logvar / 2)).log_prob(z).flatten(1).sum(1) - prior.log_prob(z.flatten(1))
    torch.testing.assert_close(kl, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_prior_keeps_the_density_when_the_parameters_change(name: str) -> None:
    prior, z = priors()[name], torch.randn(6, D)
    frozen, before = prior.frozen(), prior.log_prob(z).detach()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(frozen.log_prob(z), before)
    assert list(frozen.parameters()) == []
    if name != "standard":
        assert not torch.allclose(prior.log_prob(z), before)


def test_frozen_vamp_prior_encodes_its_pseudo_inputs_once() -> None:
    calls = []

    def encode(u: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(u))
        return u[:, :D], u[:, :D]

    frozen = VampPrior(4, encode, D, X).frozen()
    for _ in range(3):
        frozen.log_prob(torch.zeros(2, D))
        frozen.sample(5)
    assert calls == [4]


@pytest.mark.parametrize("name", NAMES)
def test_temperature_scales_the_standard_deviations_of_samples(name: str) -> None:
    """With the temperature 0, samples are the means of components, and otherwise as far away as it says."""
    prior = priors()[name]
    at = [
        prior.sample(50, generator=torch.Generator().manual_seed(0), temperature=t) for t in (0.0, 0.5, 1.0)
    ]
    torch.testing.assert_close(at[1] - at[0], (at[2] - at[0]) / 2)
    assert (at[2] - at[0]).abs().min() > 0
    if isinstance(prior, (GaussianMixture, VampPrior)):
        distance = (at[0].unsqueeze(1) - prior.components()[0]).abs().amax(2)
        assert not distance.amin(1).any()
    else:
        assert not at[0].any()


def test_learned_prior_fits_the_aggregate_posterior(native: None) -> None:
    torch.manual_seed(0)
    mu = torch.cat([torch.full((64, 1), -3.0), torch.full((64, 1), 3.0)])
    elbo = fastvae.ELBO("bernoulli", prior=GaussianMixture(2, 1))
    optimizer = torch.optim.Adam(elbo.parameters(), 0.05)
    for _ in range(200):
        _, kl = elbo.reparameterize(mu, torch.full_like(mu, -1.0))
        optimizer.zero_grad()
        kl.mean().backward()
        optimizer.step()
    assert abs(kl.mean() - math.log(2)) < 0.1  # which of the two it is; the standard normal's is above 4


def test_encoder_is_neither_saved_nor_owned_by_the_vamp_prior() -> None:
    encoder = Encoder()
    prior = VampPrior(4, encoder, D, X)
    assert list(prior.state_dict()) == ["pseudo_inputs"]
    assert [name for name, _ in prior.named_parameters()] == ["pseudo_inputs"]
    model = nn.ModuleDict({"encoder": encoder, "elbo": fastvae.ELBO("bernoulli", prior=prior)})
    copied = copy.deepcopy(model)
    assert copied["elbo"].prior._encoder[0] is copied["encoder"]
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded["elbo"].prior._encoder[0] is loaded["encoder"]


def test_vamp_prior_starts_at_given_inputs_or_within_the_bounds() -> None:
    images = torch.rand(4, 1, 2, 2)
    prior = VampPrior(4, lambda x: x.flatten(1)[:, :4].chunk(2, 1), 2, (1, 2, 2), init=images)
    assert torch.equal(prior.pseudo_inputs, images)
    torch.testing.assert_close(prior.components()[0], images.flatten(1)[:, :2])
    inputs = VampPrior(100, Encoder(), D, X, bounds=(2.0, 3.0)).pseudo_inputs
    assert inputs.min() >= 2
    assert inputs.max() <= 3


def test_compiled_elbo_with_priors_is_one_graph(native: None) -> None:
    for name, form in (
        ("standard", "logvar"),
        ("mixture", "logvar"),
        ("vamp", "logvar"),
        ("vamp", "softplus"),
    ):
        torch._dynamo.reset()
        elbo = fastvae.ELBO("bernoulli", prior=priors(form)[name], posterior=form)
        seed = torch.tensor([1, 0])

        def kl(mu: Tensor, logvar: Tensor, elbo: fastvae.ELBO = elbo, seed: Tensor = seed) -> Tensor:
            return elbo.reparameterize(mu, logvar, seed=seed)[1]

        mu, logvar = torch.randn(2, 4, D)
        compiled = torch.compile(kl, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(mu, logvar), kl(mu, logvar))


class _OfEachStep(Prior):
    """A prior of `dim` numbers for each step of a sequence, (B, steps, dim)."""

    def log_prob(self, z: Tensor) -> Tensor:
        return Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)


def test_prior_of_your_own_takes_z_of_its_own_shape() -> None:
    mu, logvar = torch.randn(2, 2, 5, D)
    _, kl = fastvae.ELBO("bernoulli", prior=_OfEachStep(D), samples=4).reparameterize(mu, logvar)
    assert kl.shape == (2,)
    draws = fastvae.IWAE("bernoulli", 4, prior=_OfEachStep(D)).sample(mu, logvar)
    torch.testing.assert_close(draws.log_p, Normal(0.0, 1.0).log_prob(draws.z).flatten(2).sum(2))


def test_prior_of_your_own_may_refuse_a_posterior_before_noise_is_drawn() -> None:
    class Strict(_OfEachStep):
        def check_posterior(self, mu: Tensor, logvar: Tensor | None = None) -> None:
            raise ValueError("too long")

    state = torch.get_rng_state()
    for call in (
        fastvae.ELBO("bernoulli", prior=Strict(D)).reparameterize,
        fastvae.IWAE("bernoulli", 2, prior=Strict(D)).sample,
    ):
        with pytest.raises(ValueError, match="too long"):
            call(Z, Z)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_samples_take_numpy_integers_and_a_temperature_for_each_dimension(name: str) -> None:
    def draw(n: int, temperature: float | Tensor) -> Tensor:
        return prior.sample(n, generator=torch.Generator().manual_seed(0), temperature=temperature)  # type: ignore[arg-type]

    prior, each = priors()[name], torch.tensor([0.0, 0.5, 1.0])
    got = draw(np.int64(4), each)  # type: ignore[arg-type]
    torch.testing.assert_close(got, torch.stack([draw(4, float(t))[:, i] for i, t in enumerate(each)], 1))


def test_shape_and_bounds_may_be_arrays() -> None:
    prior = VampPrior(4, Encoder(), D, np.array([X]), bounds=np.array([0, 1.0]))  # type: ignore[arg-type]
    assert prior.pseudo_inputs.shape == (4, X)
    assert prior.bounds == (0.0, 1.0)
    assert VampPrior(4, Encoder(), D, torch.Size([1, X])).pseudo_inputs.shape == (4, 1, X)


@pytest.mark.parametrize("name", NAMES)
def test_no_points_are_a_sample_of_none(name: str) -> None:
    assert priors()[name].sample(0).shape == (0, D)


Z = torch.zeros(4, D)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "dimensions": (
        lambda: mixture().log_prob(torch.zeros(4, 2)),
        ValueError,
        "priors.GaussianMixture: `z` must have 3 elements per row, shape (B, 3), got (4, 2)",
    ),
    "device": (
        lambda: mixture().to("meta").log_prob(Z),
        ValueError,
        "priors.GaussianMixture: the prior must be on the device of `z`, cpu, got meta; did you mean "
        "prior.to(z.device)?",
    ),
    "device of the encoder's output": (
        lambda: VampPrior(4, Encoder().to("meta"), D, X).to("meta").log_prob(Z),
        ValueError,
        "priors.VampPrior: the encoder must return tensors on the device of `z`, cpu, got meta; move both the encoder "
        "and the prior, encoder.to(z.device) and prior.to(z.device)",
    ),
    "device of the encoder": (
        lambda: VampPrior(4, Encoder().to("meta"), D, X).log_prob(Z),
        ValueError,
        "priors.VampPrior: the prior must be on the device of its encoder, meta, got cpu; did you mean "
        "prior.to('meta')? Moving the prior does not move the encoder",
    ),
    "size of a sample": (
        lambda: mixture().sample(-1),
        ValueError,
        "priors.GaussianMixture.sample: `n` must be at least 0, got -1",
    ),
    "negative temperature": (
        lambda: StandardNormal(D).sample(4, temperature=-1.0),
        ValueError,
        "priors.StandardNormal.sample: `temperature` must be finite and at least 0, got -1.0",
    ),
    "negative temperature of one dimension": (
        lambda: StandardNormal(D).sample(4, temperature=torch.tensor([0.5, -1.0, 1.0])),
        ValueError,
        "priors.StandardNormal.sample: `temperature` must be finite and at least 0, got -1.0",
    ),
    "size of a sample that is not an integer": (
        lambda: StandardNormal(D).sample(2.0),  # type: ignore[arg-type]
        TypeError,
        "priors.StandardNormal.sample: `n` must be an int, got 2.0",
    ),
    "temperature that is not a number": (
        lambda: mixture().sample(4, temperature=math.nan),
        ValueError,
        "priors.GaussianMixture.sample: `temperature` must be finite and at least 0, got nan",
    ),
    "spread": (
        lambda: GaussianMixture(4, D, spread=-1.0),
        ValueError,
        "priors.GaussianMixture: `spread` must be finite and at least 0, got -1.0",
    ),
    "form": (
        lambda: VampPrior(4, Encoder(), D, X, form="sigma"),
        ValueError,
        "priors.VampPrior: `form` must be one of 'logvar', 'log_std', 'softplus', 'variance', got 'sigma'",
    ),
    "input shape": (
        lambda: VampPrior(4, Encoder(), D, 5.0),  # type: ignore[arg-type]
        TypeError,
        "priors.VampPrior: `input_shape` must be an int or a sequence of ints, got 5.0",
    ),
    "empty input": (
        lambda: VampPrior(4, Encoder(), D, (1, 0)),
        ValueError,
        "priors.VampPrior: `input_shape` must be at least 1, got 0",
    ),
    "components": (
        lambda: GaussianMixture(0, D),
        ValueError,
        "priors.GaussianMixture: `components` must be at least 1, got 0",
    ),
    "encoder": (
        lambda: VampPrior(4, None, D, X),  # type: ignore[arg-type]
        TypeError,
        "priors.VampPrior: `encoder` must be a callable that returns (mu, logvar), got NoneType",
    ),
    "output of the encoder": (
        lambda: VampPrior(4, lambda u: {"mu": u}, D, X).log_prob(Z),
        TypeError,
        "priors.VampPrior: `encoder` must return the pair (mu, logvar), or both in one tensor, got dict",
    ),
    "size of a packed output of the encoder": (
        lambda: VampPrior(4, nn.Linear(X, D), D, X).log_prob(Z),
        ValueError,
        "priors.VampPrior: `encoder` must return the pair (mu, logvar), or both in one tensor of shape (4, 6), for 4 "
        "pseudo-inputs, got a tensor of shape (4, 3)",
    ),
    "size of the encoder": (
        lambda: VampPrior(4, Encoder(), D - 1, X).components(),
        ValueError,
        "priors.VampPrior: `mu` of the encoder must have shape (4, 2) for 4 pseudo-inputs, got (4, 3)",
    ),
    "init": (
        lambda: VampPrior(4, Encoder(), D, X, init=torch.zeros(3, X)),
        ValueError,
        "priors.VampPrior: `init` must have shape (4, 5), got (3, 5)",
    ),
    "bounds": (
        lambda: VampPrior(4, Encoder(), D, X, bounds=(1.0, 0.0)),
        ValueError,
        "priors.VampPrior: `bounds` must be finite with lo < hi, got (1.0, 0.0)",
    ),
    "one bound": (
        lambda: VampPrior(4, Encoder(), D, X, bounds=1.0),  # type: ignore[arg-type]
        TypeError,
        "priors.VampPrior: `bounds` must be a pair of floats (lo, hi), got 1.0",
    ),
    "posterior of a bound": (
        lambda: fastvae.IWAE("bernoulli", 2, posterior="sigma"),
        ValueError,
        "IWAE: `posterior` must be one of 'logvar', 'log_std', 'softplus', 'variance', got 'sigma'",
    ),
    "not a prior": (
        lambda: fastvae.ELBO("bernoulli", prior="vamp"),  # type: ignore[arg-type]
        TypeError,
        "ELBO: `prior` must be a module of fastvae.priors or None, got str",
    ),
    "free bits": (
        lambda: fastvae.ELBO("bernoulli", prior=mixture(), free_bits=0.1),
        ValueError,
        "ELBO: `free_bits` need the KL of every dimension, which has no closed form with the prior GaussianMixture; "
        "use free_bits=0",
    ),
    "no z": (
        lambda: fastvae.ELBO("bernoulli", prior=mixture())(torch.zeros(4, X), torch.zeros(4, X), Z, Z),
        TypeError,
        "ELBO: with the prior GaussianMixture, the KL depends on z: pass `kl`, as in z, kl = "
        "elbo.reparameterize(mu, logvar) and elbo(decoder(z), x, kl=kl)",
    ),
    "two priors of a bound": (
        lambda: fastvae.IWAE("bernoulli", 2, prior=mixture()).reparameterize(Z, Z, Z),
        ValueError,
        "IWAE: `prior_mu`, `prior_logvar` and `balance` exclude the IWAE's `prior`, got both",
    ),
    "two priors": (
        lambda: fastvae.ELBO("bernoulli", prior=mixture()).reparameterize(Z, Z, Z, Z),
        ValueError,
        "ELBO: `prior_mu`, `prior_logvar` and `balance` exclude the ELBO's `prior`, got both",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_raises(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(f"fastvae.{message}")):
        call()


TEN = torch.zeros(4, 10)
WRONG_POSTERIORS: dict[str, tuple[Prior, tuple[Tensor, ...], str]] = {
    "dimensions of the standard normal": (
        StandardNormal(10),
        (Z, Z),
        "priors.StandardNormal: `mu` must have 10 elements per row, shape (B, 10), got (4, 3)",
    ),
    "dimensions of a mixture": (
        GaussianMixture(5, 10),
        (Z, Z),
        "priors.GaussianMixture: `mu` must have 10 elements per row, shape (B, 10), got (4, 3)",
    ),
    "dimensions of one Gaussian": (
        GaussianMixture(1, 10),
        (Z, Z),
        "priors.GaussianMixture: `mu` must have 10 elements per row, shape (B, 10), got (4, 3)",
    ),
    "packed head": (
        StandardNormal(10),
        (TEN,),
        "priors.StandardNormal: without `logvar`, `mu` must have 20 elements per row, mean and scale of 10 dimensions, "
        "shape (B, 20), got (4, 10)",
    ),
    "device": (
        GaussianMixture(5, 10).to("meta"),
        (TEN, TEN),
        "priors.GaussianMixture: the prior must be on the device of `mu`, cpu, got meta; did you mean "
        "prior.to(mu.device)?",
    ),
}


@pytest.mark.parametrize("name", WRONG_POSTERIORS)
def test_posterior_that_does_not_fit_the_prior_raises_before_noise_is_drawn(name: str) -> None:
    prior, posterior, message = WRONG_POSTERIORS[name]
    state = torch.get_rng_state()
    calls = [
        fastvae.ELBO("bernoulli", prior=prior, samples=2).reparameterize,
        fastvae.IWAE("bernoulli", 2, prior=prior).sample,
    ]
    if prior.has_analytic_kl:
        calls.append(prior.analytic_kl)
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(f"fastvae.{message}")):
            call(*posterior)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_posterior_raises_the_usual_message() -> None:
    elbo = fastvae.ELBO("bernoulli", prior=mixture())
    with pytest.raises(ValueError, match="`logvar` must have the shape of `mu`"):
        elbo.reparameterize(Z, Z[:2])
    assert functional.gaussian_kl(Z, Z).sum() == 0
