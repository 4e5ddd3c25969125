"""The forms of a posterior's scale, packed heads, and `fastvae.posteriors`."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import posterior_forms
import pytest
import torch
from posterior_forms import FORMS, formula
from torch import Tensor

import fastvae
from fastvae import functional as fv
from fastvae import posteriors, reference
from fastvae.posteriors import DiagonalGaussian, LogStd, LogVar, Softplus, Variance

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def posterior(
    shape: tuple[int, ...], dtype: torch.dtype, prior: bool, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """mu, v and those of the prior, with values where the forms bend."""
    tensors = [torch.randn(shape) * scale for scale in (1, 2, 1, 1)][: 4 if prior else 2]
    return [t.to(device, dtype) for t in tensors]


def check_against_the_formula(
    name: str, tensors: list[Tensor], *, packed: bool, balance: float | None = None, reduction: str = "event"
) -> None:
    """Compare z, the KL and all gradients with the formula in float64."""
    form, dtype = FORMS[name], tensors[0].dtype
    eps = torch.randn(tensors[0].shape).to(tensors[0])
    leaves = [t.clone().requires_grad_() for t in tensors]
    heads = (torch.cat(leaves[i : i + 2], 1).detach().requires_grad_() for i in range(0, len(leaves), 2))
    args: list[Any] = [arg for head in heads for arg in (head, None)] if packed else leaves
    z, kl = fv.reparameterize_kl(*args, form=form.form, eps=eps, balance=balance, reduction=reduction)
    alone = fv.gaussian_kl(*args, form=form.form, balance=balance, reduction=reduction)
    torch.testing.assert_close(kl, alone, rtol=1e-6, atol=1e-6)

    exact = [t.double().detach().requires_grad_() for t in tensors]
    want_z, elements = formula(form, exact[0], exact[1], exact[2:], eps.double(), balance)
    sums = {
        "event": lambda x: x.flatten(1).sum(1),
        "channel": lambda x: x.flatten(2).sum(2),
        "none": lambda x: x,
    }
    want_kl = sums[reduction](elements) if elements.dim() > 1 else elements
    size = form.mean(exact[0]).abs() + torch.exp(form.log_std(exact[1])) * eps.double().abs()
    assert (z.dtype, z.shape) == (dtype, tensors[0].shape)
    assert ((z.double() - want_z).abs() <= TOLERANCE[dtype] * (size + 1)).all()
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(kl.double(), want_kl, rtol=near, atol=near)

    weights = torch.rand(z.shape).to(z), cases.cotangent(kl).to(kl.dtype)
    inputs = [arg for arg in args if arg is not None]
    got = torch.autograd.grad((z, kl), inputs, weights)
    want = torch.autograd.grad((want_z, want_kl), exact, [w.double() for w in weights])
    if packed:
        for gradient, head in zip(got, inputs, strict=True):
            assert gradient.shape == head.shape
            assert gradient.is_contiguous()
        got = tuple(half for gradient in got for half in gradient.chunk(2, 1))
    tolerance = 4 * TOLERANCE[dtype]
    for g, w in zip(got, want, strict=True):
        fits = w.abs() <= torch.finfo(g.dtype).max  # float16 cannot hold every gradient
        assert (fits | g.isinf()).all(), name
        g, w = (torch.where(fits, x.double(), 0.0) for x in (g, w))
        most = w.abs().max() if w.numel() else 0.0
        assert ((g - w).abs() <= tolerance * (w.abs() + 1 + most * 1e-3)).all(), name


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 1030), (2, 3, 4, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_equals_its_formula(
    backend: str, name: str, prior: bool, packed: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if shape[0] == 0:
        tensors = posterior(shape, dtype, prior)
        z, kl = fv.reparameterize_kl(*tensors, form=FORMS[name].form)
        assert (z.shape, kl.shape) == (shape, (0,))
        return
    check_against_the_formula(name, posterior(shape, dtype, prior), packed=packed)


@pytest.mark.parametrize("name", ["logvar", "softplus", "nvae"])
@pytest.mark.parametrize("balance", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("reduction", ["event", "channel", "none"])
def test_balance_and_reduction_equal_the_formula(
    backend: str, reduction: str, balance: float, name: str
) -> None:
    """DreamerV2's balance of two stop-gradient sides."""
    tensors = posterior((2, 3, 5), torch.float64, True)
    for packed in (False, True):
        check_against_the_formula(name, tensors, packed=packed, balance=balance, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_forms_at_their_ends_equal_the_formula(backend: str, name: str, dtype: torch.dtype) -> None:
    check_ends(name, dtype, "cpu")


def _kl_and_gradient(name: str, mu: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    leaf = v.clone().requires_grad_()
    kl = fv.gaussian_kl(mu, leaf, form=FORMS[name].form)
    return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]


def check_ends(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str,
    call: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """v of +-100, the edges of clamps, where scales underflow, and a scale of 1, where the KL vanishes."""
    form = FORMS[name]
    values = [100.0, -100.0, 50.0, -50.0, 40.0, -30.0, 20.0, -20.0, -1.0, 0.5, -1.0001, 0.5001]
    values += [math.log(math.e - 1), 1e-3, -1e-3, 1e-6, 0.0, 2.0, -6.0, 88.0]
    v = torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)
    mu = torch.zeros_like(v)
    exact = v.double().requires_grad_()
    h = form.log_std(exact)
    want = posterior_forms.expm1_minus(2 * h) / 2
    (want_grad,) = torch.autograd.grad(want.sum(), exact)
    kl, grad = (call or partial(_kl_and_gradient, name))(mu, v)
    near, unit = (1e-12, 4e-16) if dtype == torch.float64 else (1e-5, 3e-7)
    most = torch.finfo(dtype).max
    for i, value in enumerate(values):
        # sigma is a number in `dtype`; its rounding changes the KL little where the KL is small.
        rounding = unit * (1 + h[i, 0].abs())
        of_kl = near * want[i, 0] + rounding * (torch.exp(2 * h[i, 0]) - 1).abs() + rounding**2
        of_grad = (near + 4 * rounding) * want_grad[i, 0].abs() + rounding
        for got, truth, error in ((kl[i], want[i, 0], of_kl), (grad[i, 0], want_grad[i, 0], of_grad)):
            if truth.abs() > 0.9 * most:
                assert got.isinf()
            else:
                assert abs(got.double() - truth) <= error, (value, got, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_draws_of_forms_at_their_ends_equal_the_formula(backend: str, name: str, dtype: torch.dtype) -> None:
    """z and its gradients for v of +-100, and for mu of +-100, where NVAE's soft clamp of the mean is saturated."""
    form, most = FORMS[name], torch.finfo(dtype).max
    v = torch.tensor([[100.0], [-100.0], [0.5], [100.0], [-100.0], [-0.5]], dtype=dtype, requires_grad=True)
    mu = torch.tensor([[0.3], [-0.3], [100.0], [-100.0], [100.0], [-100.0]], dtype=dtype, requires_grad=True)
    eps = torch.tensor([[0.5], [-1.5], [2.0], [-0.7], [1.1], [0.2]], dtype=dtype)
    z, _ = fv.reparameterize_kl(mu, v, form=form.form, eps=eps)
    exact = mu.detach().double().requires_grad_(), v.detach().double().requires_grad_()
    std = torch.exp(form.log_std(exact[1]))
    want = form.mean(exact[0]) + std * eps.double()
    # What is below the normal numbers, or vanishes beside the standard deviation, may be 0.
    near, least = 1e-12 if dtype == torch.float64 else 1e-5, torch.finfo(dtype).tiny + 1e-30 * std.detach()
    pairs = [
        (z, want),
        *zip(torch.autograd.grad(z.sum(), (mu, v)), torch.autograd.grad(want.sum(), exact), strict=True),
    ]
    for got, truth in pairs:
        held = truth.abs() <= most  # what the dtype cannot hold is infinite, with its sign
        assert torch.equal(got[~held].double(), truth[~held].sign() * math.inf)
        assert ((got.double() - truth).abs() <= near * truth.abs() + least)[held].all(), (got, truth)


def test_kl_of_audio_models_is_twice_ours_over_time(backend: str) -> None:
    """stable-audio-tools and RAVE leave out the 1/2, and average over the time steps of the latent."""
    mean, scale = torch.randn(3, 8, 7).double().chunk(2, 1)
    var = (torch.nn.functional.softplus(scale) + 1e-4) ** 2
    theirs = (mean * mean + var - torch.log(var) - 1).sum(1).mean()
    torch.testing.assert_close(2 * fv.gaussian_kl(mean, scale, form="softplus").mean() / 7, theirs)


@pytest.mark.parametrize("name", FORMS)
def test_infinite_and_nan_numbers_stay_in_their_element(backend: str, name: str) -> None:
    v = torch.tensor([[0.1, math.inf], [0.1, -math.inf], [0.1, math.nan], [0.1, 0.2]], requires_grad=True)
    mu = torch.zeros_like(v)
    kl = fv.gaussian_kl(mu, v, form=FORMS[name].form, reduction="none")
    exact = posterior_forms.expm1_minus(2 * FORMS[name].log_std(v.detach().double())) / 2
    if FORMS[name].log_std(torch.tensor([math.inf, -math.inf]).double()).isfinite().all():
        torch.testing.assert_close(kl.double()[:2], exact[:2], rtol=1e-5, atol=1e-6)
    assert kl[2, 1].isnan()
    assert kl[:, 0].isfinite().all()
    assert kl[3].isfinite().all()


@pytest.mark.parametrize("name", ["diffusers", "clamp"])
def test_hard_clamp_has_no_gradient_outside(backend: str, name: str) -> None:
    lo, hi = FORMS[name].kernel[1]
    v = torch.tensor([[lo - 0.1, lo, hi, hi + 0.1, -1e30, 1e30]], requires_grad=True)
    z, kl = fv.reparameterize_kl(torch.zeros_like(v), v, form=FORMS[name].form, eps=torch.ones_like(v))
    (grad,) = torch.autograd.grad(z.sum() + kl.sum(), v)
    assert (grad[0, [0, 3, 4, 5]] == 0).all()
    assert (grad[0, 1:3] != 0).all()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
def test_reference_passes_gradcheck(name: str, prior: bool) -> None:
    tensors = [t.requires_grad_() for t in posterior((2, 3), torch.float64, prior)]
    eps = torch.randn(2, 3).double()
    kernel, constants = FORMS[name].kernel

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        return reference.reparameterize_kl(*args, form=kernel, constants=constants, eps=eps)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_posterior_equal_to_its_prior_has_no_kl(backend: str) -> None:
    for form in FORMS.values():
        mu, v = torch.randn(2, 3, 9)
        assert (fv.gaussian_kl(mu, v, mu, v, form=form.form) == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Packed heads
# ---------------------------------------------------------------------------------------------------------------------


def test_packed_head_equals_its_halves(backend: str) -> None:
    """Also one that is a slice of a larger tensor, in channels_last, or beside a prior whose tensors are apart."""
    wide = torch.randn(4, 14, 3, 2)
    for head in (wide, wide[:, 2:12], wide.to(memory_format=torch.channels_last), wide[::2]):
        mu, logvar = head.chunk(2, 1)
        seed = torch.tensor([3, 4])
        leaf = head.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        z, kl = fv.reparameterize_kl(leaf, seed=seed, samples=2)
        want_z, want_kl = fv.reparameterize_kl(mu, logvar, seed=seed, samples=2)
        assert torch.equal(z, want_z)
        assert torch.equal(kl, want_kl)
        prior = torch.randn_like(mu), torch.randn_like(mu)
        torch.testing.assert_close(fv.gaussian_kl(leaf, None, *prior), fv.gaussian_kl(mu, logvar, *prior))
        (grad,) = torch.autograd.grad(z.sum() + kl.sum(), leaf)
        assert grad.shape == head.shape


def test_head_has_one_gradient(native: None) -> None:
    """No op of autograd joins two halves."""
    head = torch.randn(4, 6, requires_grad=True)
    z, _ = fv.reparameterize_kl(head, form="softplus")
    node = z.grad_fn
    assert node is not None
    assert [type(edge).__name__ for edge, _ in node.next_functions if edge] == ["AccumulateGrad"]


def test_compiled_forms_are_one_graph(native: None) -> None:
    form = FORMS["nvae"].form

    def loss(head: Tensor, eps: Tensor) -> Tensor:
        z, kl = fv.reparameterize_kl(head, form=form, eps=eps)
        return z.square().sum() + kl.sum() + fv.gaussian_kl(head, form=form, reduction="channel").sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    head, eps = torch.randn(5, 8, 2, requires_grad=True), torch.randn(5, 4, 2)
    want = torch.autograd.grad(loss(head, eps), head)
    torch.testing.assert_close(torch.autograd.grad(compiled(head, eps), head), want)


# ---------------------------------------------------------------------------------------------------------------------
# DiagonalGaussian
# ---------------------------------------------------------------------------------------------------------------------


class Theirs:
    """DiagonalGaussianDistribution of diffusers 0.35 and of latent diffusion, but for the dimensions of the sum, which
    they have for images only."""

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(logvar, -30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)
        self.dims = list(range(1, parameters.dim()))

    def sample(self, generator: Any = None) -> Tensor:
        """With `randn_tensor`: a list of several generators draws row by row."""
        shape, dtype = self.mean.shape, self.mean.dtype
        if isinstance(generator, list) and len(generator) == 1:
            (generator,) = generator
        if isinstance(generator, list):
            rows = [torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generator]
            return self.mean + self.std * torch.cat(rows)
        return self.mean + self.std * torch.randn(shape, generator=generator, dtype=dtype)

    def kl(self, other: "Theirs | None" = None) -> Tensor:
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            return 0.5 * torch.sum(self.mean**2 + self.var - 1.0 - self.logvar, dim=self.dims)
        return 0.5 * torch.sum(
            (self.mean - other.mean) ** 2 / other.var
            + self.var / other.var
            - 1.0
            - self.logvar
            + other.logvar,
            dim=self.dims,
        )

    def nll(self, sample: Tensor, dims: list[int] | None = None) -> Tensor:
        if self.deterministic:
            return torch.zeros(1)
        return 0.5 * torch.sum(
            math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var,
            dim=self.dims if dims is None else dims,
        )


# In float32, rounding the inputs' differences alone changes a KL from another posterior by more than 1e-7.
@pytest.mark.parametrize(
    ("dtype", "of_kl", "of_rest"), [(torch.float32, 1e-7, 2e-7), (torch.float64, 1e-12, 1e-12)], ids=str
)
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (2, 8, 3, 4, 4), (3, 8)], ids=str)
def test_diagonal_gaussian_equals_that_of_diffusers(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, of_kl: float, of_rest: float
) -> None:
    head, other = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x = torch.randn(shape).to(dtype).chunk(2, 1)[0]
    ours, theirs, exact = DiagonalGaussian(head), Theirs(head), Theirs(head.double())
    assert ours.parameters is head
    assert ours.deterministic is False
    for name in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=0)
    assert torch.equal(ours.mode(), theirs.mean)

    def generators(n: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(7 + i) for i in range(n)]

    for make in (
        lambda: None,
        lambda: generators(1)[0],
        lambda: generators(1),
        lambda: generators(shape[0]),
    ):
        torch.manual_seed(5)
        z = ours.sample(make())
        torch.manual_seed(5)
        torch.testing.assert_close(z, theirs.sample(make()), rtol=5e-7, atol=5e-7)
    torch.testing.assert_close(ours.kl().double(), exact.kl(), rtol=of_kl, atol=0)
    torch.testing.assert_close(
        ours.kl(DiagonalGaussian(other)).double(), exact.kl(Theirs(other.double())), rtol=of_rest, atol=0
    )
    torch.testing.assert_close(ours.nll(x).double(), exact.nll(x.double()), rtol=of_rest, atol=0)


@pytest.mark.parametrize("dims", [[1, 2, 3], [1], [2, 3], [-1, 0], [3, -1], [0, 1, 2, 3]], ids=str)
def test_nll_sums_the_dimensions_that_diffusers_sums(backend: str, dims: list[int]) -> None:
    head, x = torch.randn(2, 8, 3, 5).double(), torch.randn(2, 4, 3, 5).double()
    theirs = Theirs(head).nll(x, sorted({d % 4 for d in dims}))
    torch.testing.assert_close(DiagonalGaussian(head).nll(x, dims=dims), theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(DiagonalGaussian(head).nll(x, 1), Theirs(head).nll(x, [1]), rtol=1e-12, atol=0)


def test_deterministic_gaussian_is_its_mean(backend: str) -> None:
    head, x = torch.randn(2, 8, 3), torch.randn(2, 4, 3)
    ours, theirs = DiagonalGaussian(head, deterministic=True), Theirs(head, deterministic=True)
    for name in ("mean", "logvar", "std", "var", "deterministic"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    state = torch.get_rng_state()
    z = ours.sample()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z, theirs.sample())
    z.zero_()
    assert torch.equal(ours.mode(), theirs.mean)
    # Theirs have one element, ours one for every row.
    for got, want in ((ours.kl(), theirs.kl()), (ours.nll(x), theirs.nll(x))):
        assert torch.equal(got, want.expand(2))
    assert ours.nll(x, dims=[1]).shape == (2, 3)
    z, kl = ours.reparameterize_kl(samples=5, reduction="channel")
    assert torch.equal(z, theirs.mean.expand(5, 2, 4, 3))
    assert torch.equal(kl, torch.zeros(2, 4))
    assert (DiagonalGaussian(head).kl(ours) == math.inf).all()
    assert (Theirs(head + 1).kl(theirs) == math.inf).all()


def test_generator_of_the_cpu_draws_for_other_devices() -> None:
    generator = torch.Generator().manual_seed(3)
    z = DiagonalGaussian(torch.randn(2, 8, device="meta")).sample(generator)
    assert (z.shape, z.device.type) == ((2, 4), "meta")
    after = torch.Generator().manual_seed(3)
    torch.randn(2, 4, generator=after)
    assert torch.equal(generator.get_state(), after.get_state())


def test_a_first_look_without_gradients_takes_none_from_later(backend: str) -> None:
    head = torch.randn(2, 8, requires_grad=True)
    posterior = DiagonalGaussian(head)
    with torch.no_grad():
        assert not posterior.std.requires_grad
    (gradient,) = torch.autograd.grad(posterior.nll(torch.randn(2, 4)).sum(), head)
    assert gradient.all()


@pytest.mark.parametrize("form", [None, "softplus", LogStd(soft_clamp=5, eps=1e-2)], ids=str)
def test_moments_follow_a_head_that_changes(form: str | posteriors.ScaleForm | None) -> None:
    head = torch.randn(2, 8)
    posterior = DiagonalGaussian(head, form)
    moments = "mean", "logvar", "std", "var"
    for change in (lambda: None, lambda: head.mul_(2), lambda: head.requires_grad_()):
        change()
        fresh = DiagonalGaussian(head, form)
        for name in moments:
            assert torch.equal(getattr(posterior, name), getattr(fresh, name))
            assert getattr(posterior, name).requires_grad == head.requires_grad
    with torch.inference_mode():
        inferred = DiagonalGaussian(torch.randn(2, 8), form)
        assert torch.equal(inferred.std, torch.exp(0.5 * inferred.logvar))


def test_mean_and_logvar_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def log_variance(*args: Any) -> Tensor:
        calls.append(args)
        return reference.latents.log_variance(*args)

    monkeypatch.setattr(posteriors, "log_variance", log_variance)
    head = torch.randn(2, 8)
    posterior = DiagonalGaussian(head, "softplus")
    assert posterior.mode().data_ptr() == head.data_ptr()
    assert calls == []
    for _ in range(2):
        assert posterior.std.shape == posterior.var.shape == posterior.logvar.shape
    posterior.nll(torch.randn(2, 4))
    assert len(calls) == 1


@pytest.mark.parametrize("form", [None, "softplus", LogStd(soft_clamp=5, eps=1e-2)], ids=str)
def test_compiled_diagonal_gaussian_is_one_graph(
    native: None, form: str | posteriors.ScaleForm | None
) -> None:
    def all_of_it(head: Tensor, other: Tensor, x: Tensor, eps: Tensor) -> list[Tensor]:
        posterior = DiagonalGaussian(head) if form is None else DiagonalGaussian(head, form)
        z, kl = posterior.reparameterize_kl(eps=eps)
        prior = DiagonalGaussian(other) if form is None else DiagonalGaussian(other, form)
        of_prior = posterior.kl(prior), posterior.kl(DiagonalGaussian(other, "variance"))
        moments = posterior.mode(), posterior.std, posterior.var, posterior.logvar
        return [z, kl, posterior.kl(), *of_prior, posterior.nll(x), posterior.nll(x, [1]), *moments]

    compiled = torch.compile(all_of_it, fullgraph=True, backend="aot_eager")
    head, other = torch.randn(3, 8, 2, requires_grad=True), torch.randn(3, 8, 2)
    x, eps = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    got, want = compiled(head, other, x, eps), all_of_it(head, other, x, eps)
    torch.testing.assert_close(got, want)
    (a,), (b,) = (torch.autograd.grad(sum(t.sum() for t in tensors), head) for tensors in (got, want))
    torch.testing.assert_close(a, b)
    # The noise of a compiled draw is torch's own.
    draw = torch.compile(lambda head: DiagonalGaussian(head).sample(), fullgraph=True, backend="eager")
    torch.manual_seed(2)
    z = draw(head)
    torch.manual_seed(2)
    torch.testing.assert_close(z, DiagonalGaussian(head).sample())


def test_gradients_of_diagonal_gaussian_equal_those_of_diffusers(backend: str) -> None:
    wide = torch.randn(2, 8, 3, 3) * 20
    x = torch.randn(2, 4, 3, 3)

    def gradient(kind: Any, dtype: torch.dtype) -> Tensor:
        head = wide.to(dtype).requires_grad_()
        posterior = kind(head)
        loss = posterior.sample(torch.Generator().manual_seed(1)).sum() + 1e-3 * posterior.kl().sum()
        loss = loss + 1e-3 * posterior.nll(x.to(dtype)).sum() + posterior.mean.sum()
        return torch.autograd.grad(loss, head)[0]

    got, want = gradient(DiagonalGaussian, torch.float64), gradient(Theirs, torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_diagonal_gaussian_has_other_forms(backend: str) -> None:
    head, other = torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    mean, h = head[:, :4], torch.log(torch.nn.functional.softplus(head[:, 4:]) + 1e-4)
    ours = DiagonalGaussian(head, "softplus")
    torch.testing.assert_close(ours.std, torch.exp(h))
    p = DiagonalGaussian(other, LogStd(soft_clamp=5, eps=1e-2))
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, torch.exp(h)), normal(p.mean, p.std))
    torch.testing.assert_close(ours.kl(p), want.flatten(1).sum(1))
    z, kl = ours.reparameterize_kl(seed=torch.tensor([1, 2]), reduction="channel")
    assert (z.shape, kl.shape) == ((2, 4, 5), (2, 4))


def test_elbo_takes_the_form_and_a_head(backend: str) -> None:
    head, x = torch.randn(4, 6), torch.rand(4, 5)
    elbo = fastvae.ELBO("bernoulli", posterior="softplus")
    seed = torch.tensor([1, 2])
    z, kl = elbo.reparameterize(head, seed=seed)
    want_z, want_kl = fv.reparameterize_kl(*head.chunk(2, 1), form=Softplus(1e-4), seed=seed)
    torch.testing.assert_close((z, kl), (want_z, want_kl))
    recon = torch.randn(4, 5)
    torch.testing.assert_close(elbo(recon, x, head).loss, elbo(recon, x, kl=kl).loss)
    torch.testing.assert_close(elbo(recon, x, *head.chunk(2, 1)).loss, elbo(recon, x, kl=kl).loss)
    free = fastvae.ELBO("bernoulli", posterior="softplus", free_bits=0.2)
    torch.testing.assert_close(free.reparameterize(head)[1].sum(1), kl)
    assert "Softplus" in repr(elbo)


def test_forms_are_values() -> None:
    assert LogVar(clamp=(-1, 1)) == LogVar(clamp=(-1, 1)) != LogVar(bounds=(-1, 1))
    for name in ("clamp", "bounds"):
        pair: Any = {name: [-30, 20]}
        assert LogVar(**pair) == LogVar(**{name: (-30.0, 20.0)})  # type: ignore[arg-type]
        assert hash(LogVar(**pair)) == hash(LogVar(**{name: (-30.0, 20.0)}))  # type: ignore[arg-type]
    for form in FORMS.values():
        made = form.form if isinstance(form.form, posteriors.ScaleForm) else None
        if made is not None:
            assert copy.deepcopy(made) == made == pickle.loads(pickle.dumps(made))
            assert made.kernel == (form.kernel[0], list(form.kernel[1]))
    elbo = fastvae.ELBO("bernoulli", posterior=LogStd(soft_clamp=5, eps=1e-2))
    assert copy.deepcopy(elbo).posterior == elbo.posterior


FLAT, ODD = torch.zeros(4, 12), torch.zeros(4, 5)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "unknown form": (
        lambda: fv.reparameterize_kl(FLAT, FLAT, form="std"),
        ValueError,
        "fastvae.reparameterize_kl: `form` must be one of 'logvar', 'log_std', 'softplus', 'variance', got 'std'",
    ),
    "form of a wrong type": (
        lambda: fv.gaussian_kl(FLAT, FLAT, form=Softplus),  # type: ignore[arg-type]
        TypeError,
        "fastvae.gaussian_kl: `form` must be a form of fastvae.posteriors or the name of one",
    ),
    "unknown form of an ELBO": (
        lambda: fastvae.ELBO("bernoulli", posterior="std"),
        ValueError,
        "fastvae.ELBO: `posterior` must be one of 'logvar', 'log_std', 'softplus', 'variance', got 'std'",
    ),
    "clamp the wrong way round": (
        lambda: LogVar(clamp=(20.0, -30.0)),
        ValueError,
        "fastvae.posteriors.LogVar: `clamp` must be finite with lo < hi, got (20.0, -30.0)",
    ),
    "bounds that are no pair": (
        lambda: LogVar(bounds=3.0),  # type: ignore[arg-type]
        TypeError,
        "fastvae.posteriors.LogVar: `bounds` must be a pair of floats (lo, hi), got 3.0",
    ),
    "two clamps": (
        lambda: LogVar(clamp=(-1, 1), bounds=(-1, 1)),
        ValueError,
        "fastvae.posteriors.LogVar: `clamp` and `bounds` exclude each other",
    ),
    "negative eps": (
        lambda: Softplus(eps=-1e-4),
        ValueError,
        "fastvae.posteriors.Softplus: `eps` must be finite and at least 0, got -0.0001",
    ),
    "eps that float32 cannot use": (
        lambda: Variance(eps=1e-40),
        ValueError,
        "fastvae.posteriors.Variance: `eps` must be 0 or at least 1e-30, got 1e-40",
    ),
    "soft clamp of 0": (
        lambda: LogStd(soft_clamp=0.0),
        ValueError,
        "fastvae.posteriors.LogStd: `soft_clamp` must be positive and finite, got 0.0",
    ),
    "option of another form": (
        lambda: Softplus(clamp=(-1, 1)),  # type: ignore[call-arg]
        TypeError,
        "unexpected keyword argument 'clamp'",
    ),
    "odd head": (
        lambda: fv.reparameterize_kl(ODD),
        ValueError,
        "fastvae.reparameterize_kl: without `logvar`, `mu` must be a packed head (B, 2 L, ...), mean and scale along "
        "dimension 1, got (4, 5)",
    ),
    "odd head of a distribution": (
        lambda: DiagonalGaussian(ODD),
        ValueError,
        "fastvae.posteriors.DiagonalGaussian: `head` must have shape (B, 2 L, ...)",
    ),
    "other distribution of another shape": (
        lambda: DiagonalGaussian(FLAT).kl(DiagonalGaussian(torch.zeros(4, 6))),
        ValueError,
        "fastvae.posteriors.DiagonalGaussian.kl: `other.head` must have the shape of `head` (4, 12), got (4, 6)",
    ),
    "other distribution on another device": (
        lambda: DiagonalGaussian(FLAT).kl(DiagonalGaussian(FLAT.to("meta"), "log_std")),
        ValueError,
        "fastvae.posteriors.DiagonalGaussian.kl: `other.head` must be on the device of `head`, cpu, got meta; did you "
        "mean other.head.to(head.device)?",
    ),
    "too few generators": (
        lambda: DiagonalGaussian(FLAT).sample([torch.Generator()] * 3),
        ValueError,
        "fastvae.posteriors.DiagonalGaussian.sample: a list as `generator` must have one generator for each of the 4 "
        "rows of `head`, or one for all of them, got 3",
    ),
    "no generators": (
        lambda: DiagonalGaussian(FLAT).sample([]),
        ValueError,
        "for each of the 4 rows of `head`, or one for all of them, got 0",
    ),
    "seeds as generators": (
        lambda: DiagonalGaussian(FLAT).sample([1, 2, 3, 4]),  # type: ignore[list-item]
        TypeError,
        "fastvae.posteriors.DiagonalGaussian.sample: `generator` must be a torch.Generator or a list of them, got int",
    ),
    "dimension that x does not have": (
        lambda: DiagonalGaussian(FLAT).nll(FLAT[:, :6], dims=[1, 2, 3]),
        ValueError,
        "fastvae.posteriors.DiagonalGaussian.nll: `dims` must be from -2 to 1 for `x` (4, 6), got [1, 2, 3]",
    ),
    "prior head of another shape": (
        lambda: fv.gaussian_kl(FLAT, None, torch.zeros(4, 6)),
        ValueError,
        "fastvae.gaussian_kl: `prior_mu` must have the shape of `mu` (4, 12), got (4, 6)",
    ),
    "balance without a prior": (
        lambda: fv.gaussian_kl(FLAT, FLAT, balance=0.5),
        ValueError,
        "fastvae.gaussian_kl: `balance` 0.5 needs `prior_mu` and `prior_logvar`",
    ),
    "balance above 1": (
        lambda: fv.gaussian_kl(FLAT, FLAT, FLAT, FLAT, balance=1.5),
        ValueError,
        "fastvae.gaussian_kl: `balance` must be from 0 to 1, got 1.5",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_raises_before_any_work(backend: str, name: str) -> None:
    call, kind, message = WRONG[name]
    state = torch.get_rng_state()
    with pytest.raises(kind, match=re.escape(message)):
        call()
    assert torch.equal(torch.get_rng_state(), state)
