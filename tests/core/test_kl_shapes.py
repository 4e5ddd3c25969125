"""What objectives make of the KL: free bits, a capacity, Dreamer's balance and NVAE's coefficients of groups."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import functional as fv

SHAPE = (6, 3, 2, 4)
EPS = torch.linspace(-2, 2, 6 * 3 * 2 * 4, dtype=torch.float64).view(SHAPE)


def posterior(prior: bool) -> list[Tensor]:
    """Dimensions with more and with less KL than the thresholds."""
    scale = torch.linspace(0.1, 1.6, 24, dtype=torch.float64).view(1, *SHAPE[1:])
    tensors = [torch.randn(SHAPE).double() * scale, -0.3 * scale * torch.rand(SHAPE).double()]
    tensors += [0.1 * torch.randn(SHAPE).double(), 0.1 * torch.randn(SHAPE).double()] if prior else []
    return [t.requires_grad_() for t in tensors]


def elements(mu: Tensor, v: Tensor, *prior: Tensor) -> Tensor:
    pm, pv = prior or (torch.zeros_like(mu), torch.zeros_like(v))
    return 0.5 * ((mu - pm) ** 2 * torch.exp(-pv) + torch.exp(v - pv) - 1 - (v - pv))


def grouped(kl: Tensor, per: str) -> Tensor:
    return {"dimension": kl, "channel": kl.flatten(2).sum(2), "row": kl.flatten(1).sum(1)}[per]


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("mean", [False, True], ids=["each", "mean"])
@pytest.mark.parametrize(("per", "nats"), [("dimension", 0.2), ("channel", 2.0), ("row", 8.0)])
def test_free_bits_equal_the_formula(backend: str, per: str, nats: float, mean: bool, prior: bool) -> None:
    tensors = posterior(prior)
    elbo = fastvae.ELBO("gaussian", free_bits=nats, free_bits_mean=mean, free_bits_per=per, beta=0.7)
    z, kl = elbo.reparameterize(*tensors, eps=EPS)
    out = elbo(z, torch.zeros(SHAPE).double(), kl=kl)
    mine = grouped(elements(*tensors), per)
    floor = (mine.mean(0).clamp(min=nats) if mean else mine.clamp(min=nats)).sum() / (
        1 if mean else len(mine)
    )
    want = out.nll.mean() + 0.7 * floor
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.kl, grouped(elements(*tensors), "row"))
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, tensors, retain_graph=True), torch.autograd.grad(want, tensors)
    )
    assert 0 < (mine.mean(0) > nats).double().mean() <= 1


def test_free_bits_take_one_pass(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fv, "gaussian_kl")
    z, kl = fastvae.ELBO("gaussian", free_bits=0.1).reparameterize(*posterior(False)[:2])
    assert kl.shape == z.shape


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("capacity", [2.0, 50.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_capacity_equals_the_formula(backend: str, reduction: str, capacity: float, prior: bool) -> None:
    """Burgess et al. 2018, below and above C."""
    tensors = posterior(prior)
    elbo = fastvae.ELBO("gaussian", capacity=capacity, beta=3.0, reduction=reduction)
    z, kl = elbo.reparameterize(*tensors, eps=EPS)
    out = elbo(z, torch.zeros(SHAPE).double(), kl=kl)
    true = elements(*tensors).flatten(1).sum(1)
    mean = out.loss if reduction == "mean" else out.loss.sum() / len(true)
    want = out.nll.mean() + 3.0 * (true.mean() - capacity).abs()
    torch.testing.assert_close(mean, want)
    torch.testing.assert_close(out.kl, true)
    torch.testing.assert_close(
        torch.autograd.grad(mean, tensors, retain_graph=True), torch.autograd.grad(want, tensors)
    )


def test_capacity_is_a_setting(backend: str) -> None:
    """It changes between steps, under torch.compile too, and is neither rounded nor saved."""
    recon, x, kl = torch.randn(4, 5), torch.rand(4, 5), torch.full((4,), 3.0)
    elbo = fastvae.ELBO("bernoulli", capacity=1.0)
    compiled = torch.compile(elbo, fullgraph=True, backend="aot_eager")
    nll = elbo(recon, x, kl=kl).nll.mean()
    torch.testing.assert_close(compiled(recon, x, kl=kl).loss, nll + 2.0)
    elbo.capacity = 0.3
    torch.testing.assert_close(compiled(recon, x, kl=kl).loss, nll + 2.7)
    elbo.capacity = torch.tensor(5.0)
    torch.testing.assert_close(compiled(recon, x, kl=kl).loss, nll + 2.0)
    assert "capacity=5" in repr(elbo)
    assert not elbo.state_dict()
    assert copy.deepcopy(elbo).half().capacity.dtype == torch.float32
    elbo.reset_parameters()
    torch.testing.assert_close(elbo(recon, x, kl=kl).loss, nll + 2.7)
    elbo.capacity = None
    elbo.reset_parameters()
    torch.testing.assert_close(elbo(recon, x, kl=kl).loss, nll + 3.0)
    elbo.capacity = 1.0
    torch.testing.assert_close(elbo(recon, x, kl=kl).loss, nll + 2.0)


def test_balance_and_free_nats_equal_dreamer(backend: str) -> None:
    """DreamerV2: alpha KL(sg(q) || p) + (1 - alpha) KL(q || sg(p)), at least the free nats in the mean. DreamerV3: dyn
    and rep, each at least one nat in every row."""
    tensors = posterior(True)
    sg = [t.detach() for t in tensors]

    def rows(*args: Tensor) -> Tensor:
        return elements(*args).flatten(1).sum(1)

    dyn, rep = rows(*sg[:2], *tensors[2:]), rows(*tensors[:2], *sg[2:])
    kl = fv.reparameterize_kl(*tensors, balance=0.8)[1]
    for free in (3.0, 1e3):
        ours, v2 = (
            kl.mean().clamp(min=free),
            0.8 * dyn.mean().clamp(min=free) + 0.2 * rep.mean().clamp(min=free),
        )
        torch.testing.assert_close(ours, v2)
        torch.testing.assert_close(
            torch.autograd.grad(ours, tensors, retain_graph=True),
            torch.autograd.grad(v2, tensors, retain_graph=True),
        )
    free = 1.001 * dyn.median().item()
    weights = 0.5, 0.1
    kl = sum(weights) * fv.gaussian_kl(*tensors, balance=weights[0] / sum(weights)).clamp(min=free)
    v3 = weights[0] * dyn.clamp(min=free) + weights[1] * rep.clamp(min=free)
    torch.testing.assert_close(kl, v3)
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), tensors), torch.autograd.grad(v3.sum(), tensors))


def kl_balancer(kl_all: Tensor, alpha_i: Tensor) -> Tensor:
    """kl_balancer of github.com/NVlabs/NVAE during the warm-up, without its kl_coeff."""
    kl_coeff_i = torch.mean(torch.abs(kl_all), dim=0, keepdim=True) + 0.01
    total_kl = torch.sum(kl_coeff_i)
    kl_coeff_i = kl_coeff_i / alpha_i.unsqueeze(0) * total_kl
    kl_coeff_i = kl_coeff_i / torch.mean(kl_coeff_i, dim=1, keepdim=True)
    return torch.sum(kl_all * kl_coeff_i.detach(), dim=1)


@pytest.mark.parametrize("with_alpha", [False, True])
def test_group_coefficients_equal_those_of_nvae(backend: str, with_alpha: bool) -> None:
    mu, v = posterior(False)
    alpha = torch.tensor([1.0, 2.0, 4.0]).double()
    kl = fv.gaussian_kl(mu, v, reduction="channel")
    ours = (kl * fv.group_coefficients(kl, alpha if with_alpha else None)).sum(1)
    theirs = kl_balancer(grouped(elements(mu, v), "channel"), alpha if with_alpha else torch.ones(3).double())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), (mu, v)), torch.autograd.grad(theirs.sum(), (mu, v))
    )


def test_kl_by_group_of_a_vector(backend: str) -> None:
    mu, v = torch.randn(2, 5, 12).double()
    groups = fv.gaussian_kl(mu.unflatten(1, (3, 4)), v.unflatten(1, (3, 4)), reduction="channel")
    torch.testing.assert_close(groups, elements(mu, v).unflatten(1, (3, 4)).sum(2))


FLAT, ROWS = torch.zeros(4, 12), torch.zeros(4)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "what has free bits": (
        lambda: fastvae.ELBO("bernoulli", free_bits=1.0, free_bits_per="pixel"),
        ValueError,
        "fastvae.ELBO: `free_bits_per` must be one of 'dimension', 'channel', 'row', got 'pixel'",
    ),
    "rows where channels belong": (
        lambda: fastvae.ELBO("bernoulli", free_bits=1.0, free_bits_per="channel")(FLAT, FLAT, kl=ROWS),
        ValueError,
        "fastvae.ELBO: with `free_bits`, `kl` must be the KL of every channel",
    ),
    "dimensions where rows belong": (
        lambda: fastvae.ELBO("bernoulli", free_bits=1.0, free_bits_per="row")(FLAT, FLAT, kl=FLAT),
        ValueError,
        "fastvae.ELBO: with `free_bits_per` 'row', `kl` must be the KL of every row, (B,), got shape (4, 12)",
    ),
    "negative capacity": (
        lambda: fastvae.ELBO("bernoulli", capacity=-1.0),
        ValueError,
        "fastvae.ELBO: `capacity` must be finite and at least 0, got -1.0",
    ),
    "capacity per row": (
        lambda: fastvae.ELBO("bernoulli", capacity=ROWS),
        ValueError,
        "fastvae.ELBO: `capacity` must be a float or a 0-dim tensor, got shape (4,)",
    ),
    "capacity and free bits": (
        lambda: fastvae.ELBO("bernoulli", capacity=5.0, free_bits=0.1),
        ValueError,
        "fastvae.ELBO: `capacity` and `free_bits` exclude each other, got 5.0 and 0.1",
    ),
    "groups of a vector": (
        lambda: fv.group_coefficients(ROWS),
        ValueError,
        "fastvae.group_coefficients: `kl` must have shape (B, G), got (4,)",
    ),
    "sizes of other groups": (
        lambda: fv.group_coefficients(FLAT, torch.ones(3)),
        ValueError,
        "fastvae.group_coefficients: `alpha` must have one value per group of `kl`, shape (12,), got (3,)",
    ),
    "group without a size": (
        lambda: fv.group_coefficients(FLAT, torch.arange(12.0)),
        ValueError,
        "fastvae.group_coefficients: `alpha` must be positive and finite, got 0.0 for group 0",
    ),
    "negative size of a group": (
        lambda: fv.group_coefficients(FLAT, torch.full((12,), -1.0)),
        ValueError,
        "fastvae.group_coefficients: `alpha` must be positive and finite, got -1.0 for group 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_raises_before_any_work(backend: str, name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(message)):
        call()
