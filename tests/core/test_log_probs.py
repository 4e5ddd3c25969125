"""Draws with their log-densities: `sample_log_probs`."""

import math
import re
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from posterior_forms import FORMS
from test_posteriors import TOLERANCE, posterior
from torch import Tensor

import fastvae
from fastvae import functional as fv
from fastvae import reference

SEED = torch.tensor([2**40 + 17, 2**33 + 5])


def formula(
    name: str, tensors: list[Tensor], eps: Tensor, stl: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z, log q and log p, and the sums of the absolute values of the summands of both densities."""
    form = FORMS[name]
    mean, h = form.mean(tensors[0]), form.log_std(tensors[1])
    z = mean + torch.exp(h) * eps

    def terms(mean: Tensor, h: Tensor) -> Tensor:
        return -(((z - mean) * torch.exp(-h)) ** 2) / 2 - h - math.log(2 * math.pi) / 2

    log_q = terms(mean.detach(), h.detach()) if stl else terms(mean, h)
    prior = (form.mean(tensors[2]), form.log_std(tensors[3])) if tensors[2:] else (mean * 0, h * 0)
    log_p = terms(*prior)
    q, p, sizes = (
        x.flatten(2).sum(2) if x.dim() > 2 else x for x in (log_q, log_p, log_q.abs() + log_p.abs())
    )
    return z, q, p, sizes, sizes


def check_log_probs(
    name: str,
    tensors: list[Tensor],
    *,
    packed: bool,
    stl: bool,
    given: bool,
    samples: int = 3,
    only: tuple[bool, ...] = (True, True, True),
) -> None:
    """Compare z, the densities and all gradients with the formula in float64."""
    dtype, device, shape = tensors[0].dtype, tensors[0].device, tensors[0].shape
    seed = SEED.to(device)
    eps = torch.randn(samples, *shape).to(device, dtype)
    source: dict[str, Any] = {"eps": eps} if given else {"seed": seed, "row_offset": 9}
    if not given:
        rows, dims = shape[0], math.prod(shape[1:])
        eps = reference.normal_noise(seed, 9, rows, dims, samples, torch.float64).reshape(samples, *shape)
    leaves = [t.clone().requires_grad_() for t in tensors]
    heads = (torch.cat(leaves[i : i + 2], 1).detach().requires_grad_() for i in range(0, len(leaves), 2))
    args: list[Any] = [arg for head in heads for arg in (head, None)] if packed else leaves
    outputs = fv.sample_log_probs(*args, samples=samples, form=FORMS[name].form, stl=stl, **source)
    exact = [t.double().detach().requires_grad_() for t in tensors]
    z, q, p, size, _ = formula(name, exact, eps.double(), stl)
    assert (outputs[0].dtype, outputs[0].shape) == (dtype, z.shape)
    scale = FORMS[name].mean(exact[0]).abs() + torch.exp(FORMS[name].log_std(exact[1])) * eps.double().abs()
    assert ((outputs[0].double() - z).abs() <= TOLERANCE[dtype] * (scale + 1)).all()
    near = 1e-11 if dtype == torch.float64 else 1e-5
    for got, want in zip(outputs[1:], (q, p), strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((got.double() - want).abs() <= near * (size + 1)).all()

    weights = [torch.rand(out.shape).to(out) for out in outputs]
    chosen = [i for i, wanted in enumerate(only) if wanted]
    inputs = [arg for arg in args if arg is not None]
    got = torch.autograd.grad(
        [outputs[i] for i in chosen], inputs, [weights[i] for i in chosen], allow_unused=True
    )
    want = torch.autograd.grad(
        [(z, q, p)[i] for i in chosen], exact, [weights[i].double() for i in chosen], allow_unused=True
    )
    got = tuple(torch.zeros_like(x) if g is None else g for g, x in zip(got, inputs, strict=True))
    want = tuple(torch.zeros_like(x) if w is None else w for w, x in zip(want, exact, strict=True))
    if packed:
        got = tuple(half for gradient in got for half in gradient.chunk(2, 1))
    tolerance = 10 * TOLERANCE[dtype]
    for g, w in zip(got, want, strict=True):
        assert ((g.double() - w).abs() <= tolerance * (w.abs() + 1 + 1e-3 * w.abs().max())).all(), name


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (40, 5), (2, 2100), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["seed", "eps"])
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("stl", [False, True], ids=["full", "stl"])
@pytest.mark.parametrize("name", ["logvar", "diffusers", "softplus", "nvae", "variance", "log_std"])
def test_log_probs_equal_the_formula(
    backend: str,
    name: str,
    stl: bool,
    prior: bool,
    packed: bool,
    given: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    # In half precision, the gradients of a prior with a small scale would overflow.
    tensors = [t * 0.4 for t in posterior(shape, dtype, prior)]
    check_log_probs(name, tensors, packed=packed, stl=stl, given=given)


@pytest.mark.parametrize("only", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("stl", [False, True], ids=["full", "stl"])
def test_backward_accepts_missing_gradients(
    backend: str, stl: bool, prior: bool, only: tuple[bool, ...]
) -> None:
    tensors = posterior((3, 7), torch.float64, prior)
    check_log_probs("logvar", tensors, packed=False, stl=stl, given=True, only=only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stl", [False, True], ids=["full", "stl"])
@pytest.mark.parametrize("name", FORMS)
def test_log_q_at_the_ends_equals_the_formula(backend: str, name: str, stl: bool, dtype: torch.dtype) -> None:
    check_ends(name, stl, dtype, "cpu")


def check_ends(name: str, stl: bool, dtype: torch.dtype, device: torch.device | str) -> None:
    """log q and its gradients where the scale under- and overflows, for a mean that is large beside the scale."""
    form = FORMS[name]
    v = torch.tensor([[100.0], [-100.0], [88.0], [-50.0], [20.0], [-30.0], [0.3]], dtype=dtype, device=device)
    noise = torch.full_like(v, 0.7)
    noise[-1] = 0
    mu = torch.full_like(v, 3).requires_grad_()
    leaf = v.clone().requires_grad_()
    _, log_q, _ = fv.sample_log_probs(mu, leaf, samples=1, form=form.form, stl=stl, eps=noise.unsqueeze(0))
    grads = torch.autograd.grad(log_q.sum(), (mu, leaf), materialize_grads=True)
    got = log_q[0], *(grad.squeeze(1) for grad in grads)

    exact_mu, exact_v = (t.detach().double().requires_grad_() for t in (mu, leaf))
    mean, h, eps = form.mean(exact_mu), form.log_std(exact_v), noise.double()
    # With `stl`, the gradient of log q is -eps / sigma times that of z = mean + sigma eps.
    # Otherwise it is that of -log sigma.
    fixed = h.detach()
    through_z = -eps * (mean * torch.exp(-fixed) + eps * (h - fixed))
    want_q = -(eps.square() / 2 + h + math.log(2 * math.pi) / 2)
    want_grads = torch.autograd.grad((through_z if stl else want_q + 0 * mean).sum(), (exact_mu, exact_v))
    near = 1e-11 if dtype == torch.float64 else 2e-5
    for result, want in zip(got, (want_q, *want_grads), strict=True):
        truth = want.detach().squeeze(1)
        # sigma is a number in `dtype`, so an error of its logarithm is one of the gradient.
        error = near * (1 + fixed.abs().squeeze(1)) * (truth.abs() + 1e-3)
        overflows = truth.abs() > 0.2 * torch.finfo(dtype).max
        is_close = torch.where(
            overflows, result.double() == truth.sign() * math.inf, (result.double() - truth).abs() <= error
        )
        assert is_close.all(), (result, truth)


@pytest.mark.parametrize("stl", [False, True], ids=["full", "stl"])
def test_reference_passes_gradcheck(stl: bool) -> None:
    tensors = [t.requires_grad_() for t in posterior((2, 3), torch.float64, True)]
    eps = torch.randn(2, 2, 3).double()

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        z, log_q, log_p = reference.sample_log_probs(*args, samples=2, eps=eps)
        return (z, log_q, log_p)

    assert torch.autograd.gradcheck(run, tensors)


def test_score_vanishes_in_expectation(backend: str) -> None:
    """For one draw, the gradients with and without it agree in the mean over many rows."""
    torch.manual_seed(3)
    n = 20_000
    gradients = []
    for stl in (False, True):
        mu = torch.full((n, 1), 0.4, dtype=torch.float64, requires_grad=True)
        v = torch.full((n, 1), -0.6, dtype=torch.float64, requires_grad=True)
        _, log_q, log_p = fv.sample_log_probs(mu, v, samples=1, stl=stl)
        gradients.append(torch.cat(torch.autograd.grad((log_q - log_p).sum(), (mu, v)), 1))
    a, b = gradients
    errors = (a.var(0) / n + b.var(0) / n).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * errors).all()
    assert (a - b).abs().max() > 0.1


def test_draws_are_those_of_reparameterize_kl(backend: str) -> None:
    mu, v = torch.randn(2, 5, 9)
    z = fv.sample_log_probs(mu, v, samples=4, seed=SEED, row_offset=2)[0]
    torch.testing.assert_close(z, fv.reparameterize_kl(mu, v, samples=4, seed=SEED, row_offset=2)[0])
    torch.manual_seed(1)
    first = fv.sample_log_probs(mu, v, samples=4)[0]
    torch.manual_seed(1)
    assert torch.equal(first, fv.sample_log_probs(mu, v, samples=4)[0])


def test_empty_batches_and_rows(backend: str) -> None:
    for shape in ((0, 4), (3, 0)):
        mu = torch.zeros(shape, requires_grad=True)
        z, log_q, log_p = fv.sample_log_probs(mu, torch.zeros(shape), samples=2)
        assert (z.shape, log_q.shape, log_p.shape) == ((2, *shape), (2, shape[0]), (2, shape[0]))
        assert (log_q == 0).all()
        assert torch.autograd.grad(z.sum() + log_q.sum() + log_p.sum(), mu)[0].shape == shape


def test_compiled_draws_are_one_graph(native: None) -> None:
    def loss(mu: Tensor, v: Tensor, eps: Tensor) -> Tensor:
        z, log_q, log_p = fv.sample_log_probs(mu, v, samples=3, eps=eps, stl=True, form="softplus")
        return z.square().sum() + (log_q - log_p).logsumexp(0).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    eps = torch.randn(3, 5, 4)
    want = torch.autograd.grad(loss(*inputs, eps), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs, eps), inputs), want)


def test_iwae_takes_the_form_and_a_head(backend: str) -> None:
    head, x = torch.randn(4, 6, requires_grad=True), torch.rand(4, 3)
    results = []
    for args in ((head,), tuple(head.chunk(2, 1))):
        torch.manual_seed(4)
        iwae = fastvae.IWAE("gaussian", 5, "dreg", posterior="softplus")
        loss = iwae(lambda z: z, x, *args).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, head)))
    torch.testing.assert_close(results[0], results[1])


FLAT = torch.zeros(4, 12)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no draws": (
        lambda: fv.sample_log_probs(FLAT, FLAT, samples=0),
        ValueError,
        "fastvae.sample_log_probs: `samples` must be at least 1, got 0",
    ),
    "draws that are no number": (
        lambda: fv.sample_log_probs(FLAT, FLAT, samples=2.0),  # type: ignore[arg-type]
        TypeError,
        "fastvae.sample_log_probs: `samples` must be an int, got 2.0",
    ),
    "noise for other draws": (
        lambda: fv.sample_log_probs(FLAT, FLAT, samples=3, eps=FLAT),
        ValueError,
        "fastvae.sample_log_probs: `eps` must have shape (samples, *mu.shape) = (3, 4, 12), got (4, 12)",
    ),
    "noise with a gradient": (
        lambda: fv.sample_log_probs(FLAT, FLAT, samples=1, eps=torch.zeros(1, 4, 12, requires_grad=True)),
        ValueError,
        "fastvae.sample_log_probs: `eps` requires a gradient, which it does not get; pass eps.detach()",
    ),
    "unknown form": (
        lambda: fv.sample_log_probs(FLAT, FLAT, samples=1, form="std"),
        ValueError,
        "fastvae.sample_log_probs: `form` must be one of 'logvar', 'log_std', 'softplus', 'variance', got 'std'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_raises_before_any_work(backend: str, name: str) -> None:
    call, kind, message = WRONG[name]
    state = torch.get_rng_state()
    with pytest.raises(kind, match=re.escape(message)):
        call()
    assert torch.equal(torch.get_rng_state(), state)
