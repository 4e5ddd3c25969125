"""`fastvae.ELBO` and the likelihood modules, as users call them."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvae
from fastvae import functional
from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood

B, D, L = 6, 12, 5


@pytest.fixture
def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "recon": torch.randn(B, D, generator=generator),
        "x": torch.rand(B, D, generator=generator),
        "mu": torch.randn(B, L, generator=generator),
        "logvar": torch.randn(B, L, generator=generator),
    }


@pytest.fixture(autouse=True)
def _warn_again(range_warnings: None) -> None:
    """Reset the warnings, so that those of other tests are given again."""


def textbook_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)


# --- The loss ---------------------------------------------------------------------------------------------------------

REDUCE = {"mean": Tensor.mean, "batchmean": Tensor.mean, "sum": Tensor.sum, "none": lambda rows: rows}


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("beta", [1.0, 0.25, 0.0])
def test_both_call_forms_equal_the_loss_of_tutorials(
    backend: str, data: dict[str, Tensor], reduction: str, beta: float
) -> None:
    elbo = fastvae.ELBO("bernoulli", beta=beta, reduction=reduction)
    classic = elbo(**data)
    _, kl = elbo.reparameterize(data["mu"], data["logvar"])
    modern = elbo(data["recon"], data["x"], kl=kl)

    bce = F.binary_cross_entropy_with_logits(data["recon"], data["x"], reduction="none").sum(1)
    wanted_kl = textbook_kl(data["mu"], data["logvar"])
    for out in (classic, modern):
        assert isinstance(out, fastvae.ELBOOutput)
        torch.testing.assert_close(out.nll, bce)
        torch.testing.assert_close(out.kl, wanted_kl)
        torch.testing.assert_close(out.loss, REDUCE[reduction](bce + beta * wanted_kl))
        torch.testing.assert_close(out.elbo, -(bce + wanted_kl))  # independent of beta
    assert all(torch.equal(a, b) for a, b in zip(classic, modern, strict=True))


def test_reduction_sum_equals_the_loss_of_tutorials(backend: str, data: dict[str, Tensor]) -> None:
    """The classic loss function, which includes a sigmoid, can be replaced by changing one line."""
    recon, x, mu, logvar = data.values()

    def loss_function(recon_x: Tensor) -> Tensor:
        bce = F.binary_cross_entropy(recon_x, x, reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return bce + kld

    expected = loss_function(torch.sigmoid(recon))
    from_logits = fastvae.ELBO("bernoulli", reduction="sum")(recon, x, mu, logvar).loss
    from_probs = fastvae.ELBO(Bernoulli(from_probs=True), reduction="sum")(
        torch.sigmoid(recon), x, mu, logvar
    ).loss
    torch.testing.assert_close(from_logits, expected)
    torch.testing.assert_close(from_probs, expected)


def test_rows_are_summed_over_all_other_dimensions(backend: str) -> None:
    """Dimension 0 is the batch; all other dimensions are summed, for any rank."""
    recon, x = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    out = fastvae.ELBO("bernoulli")(recon, x, torch.zeros(2, 7, 1), torch.zeros(2, 7, 1))
    torch.testing.assert_close(out.nll, torch.full((2,), 60 * math.log(2)))
    assert torch.equal(out.kl, torch.zeros(2))


def test_reparameterize_passes_all_arguments_on(backend: str, data: dict[str, Tensor]) -> None:
    mu, logvar = data["mu"], data["logvar"]
    options = {"samples": 3, "seed": torch.tensor([5, 6]), "row_offset": 2}
    ours = fastvae.ELBO("gaussian").reparameterize(mu, logvar, logvar, mu, **options)
    function = fastvae.functional.reparameterize_kl(mu, logvar, logvar, mu, **options)
    assert ours[0].shape == (3, B, L)
    assert all(torch.equal(a, b) for a, b in zip(ours, function, strict=True))


@pytest.mark.parametrize("free_bits", [0.0, 0.25])
def test_samples_flattened_to_rows_average_the_loss(
    backend: str, data: dict[str, Tensor], free_bits: float
) -> None:
    """As `ELBO.reparameterize` documents, the loss of K samples is the mean of their losses."""
    x = data["x"].view(B, 3, 4)
    elbo = fastvae.ELBO("bernoulli", free_bits=free_bits)
    z, kl = elbo.reparameterize(data["mu"], data["logvar"], samples=3)
    weight = torch.randn(L, 12)

    def decoder(z: Tensor) -> Tensor:
        return (z @ weight).view(-1, 3, 4)

    repeated = kl.repeat(3, *[1] * (kl.dim() - 1))
    out = elbo(decoder(z.flatten(0, 1)), x.repeat(3, *[1] * (x.dim() - 1)), kl=repeated)
    each = torch.stack([elbo(decoder(sample), x, kl=kl).loss for sample in z])
    torch.testing.assert_close(out.loss, each.mean())


def test_reparameterize_in_evaluation_mode_draws_noise(data: dict[str, Tensor]) -> None:
    elbo = fastvae.ELBO("bernoulli").eval()
    first, second = (elbo.reparameterize(data["mu"], data["logvar"])[0] for _ in range(2))
    assert not torch.equal(first, second)


# --- beta -------------------------------------------------------------------------------------------------------------


def assign_number(elbo: fastvae.ELBO) -> None:
    elbo.beta = 0.25


def assign_tensor(elbo: fastvae.ELBO) -> None:
    elbo.beta = torch.tensor(0.25, dtype=torch.float64)


@pytest.mark.parametrize("change", [assign_number, assign_tensor, lambda elbo: elbo.beta.fill_(0.25)])
def test_beta_changes_in_place(backend: str, data: dict[str, Tensor], change) -> None:  # type: ignore[no-untyped-def]
    elbo = fastvae.ELBO("bernoulli", beta=torch.tensor(1.0))
    buffer = elbo.beta
    change(elbo)
    assert elbo.beta is buffer  # compiled code and CUDA graphs hold a reference to it
    assert dict(elbo.named_buffers())["beta"] is buffer
    out = elbo(**data)
    torch.testing.assert_close(out.loss, (out.nll + 0.25 * out.kl).mean())


def test_beta_is_not_in_the_state_dict() -> None:
    elbo = fastvae.ELBO("bernoulli", beta=0.5)
    assert elbo.state_dict() == {}
    assert list(elbo.parameters()) == []
    elbo.load_state_dict(fastvae.ELBO("bernoulli", beta=2.0).state_dict())
    assert elbo.beta.item() == 0.5


def test_beta_does_not_move_for_meta_tensors() -> None:
    """A call on a GPU moves beta (test_cuda.py); a call that only computes shapes must not."""
    elbo = fastvae.ELBO("gaussian", beta=0.5)
    buffer = elbo.beta
    shapes = ((4, 9), (4, 9), (4, 3), (4, 3))
    assert elbo(*(torch.empty(shape, device="meta") for shape in shapes)).loss.is_meta
    with FakeTensorMode(allow_non_fake_inputs=True), fastvae.use_backend("reference"):
        assert elbo(*(torch.empty(shape, device="cuda") for shape in shapes)).loss.is_cuda
    assert elbo.beta is buffer
    assert buffer.device.type == "cpu"
    assert buffer.item() == 0.5


def test_moved_beta_is_still_the_same_tensor() -> None:
    elbo = fastvae.ELBO("gaussian")
    moved_buffer = elbo.beta
    with torch.inference_mode():
        fastvae.elbo._move_setting(elbo.beta, torch.zeros(3))
    assert elbo.beta is moved_buffer
    moved_buffer.fill_(0.25)
    assert copy.deepcopy(elbo).beta.item() == 0.25


@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.half])
def test_beta_after_to_empty_is_reset(cast: Callable[[nn.Module], nn.Module]) -> None:
    with torch.device("meta"):
        elbo = cast(fastvae.ELBO("bernoulli", beta=0.1))
    elbo.to_empty(device="cpu").beta.fill_(float("nan"))  # uninitialised memory
    elbo.reset_parameters()
    torch.testing.assert_close(elbo.beta, torch.tensor(0.1), rtol=0, atol=0)
    elbo.beta = 0.25
    elbo.to_empty(device="cpu").reset_parameters()
    assert elbo.beta.item() == 0.25


def test_invalid_reduction_changes_nothing() -> None:
    elbo = fastvae.ELBO("bernoulli", reduction="sum")
    with pytest.raises(ValueError, match=r"fastvae\.ELBO: `reduction` must be one of .*, got 'bogus'"):
        elbo.reduction = "bogus"
    assert elbo.reduction == "sum"


@pytest.mark.parametrize("given", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda model: model.to("cpu", torch.bfloat16),
        lambda model: copy.deepcopy(model.half()).float(),
        lambda model: pickle.loads(pickle.dumps(model.half())),
    ],
    ids=["half", "bfloat16", "double", "to", "deepcopy", "pickle"],
)
def test_casting_the_module_keeps_beta_in_float32(
    backend: str, data: dict[str, Tensor], cast: Callable[[nn.Module], nn.Module], given: float | Tensor
) -> None:
    """Casting the whole model does cast its other buffers."""
    model = nn.Sequential(nn.Linear(3, 3), fastvae.ELBO("bernoulli"))
    model[1].beta = given
    elbo = cast(model)[1]
    assert elbo.beta.dtype == torch.float32
    out = elbo(**data)
    torch.testing.assert_close(out.loss, (out.nll + torch.tensor(0.1) * out.kl).mean(), rtol=1e-6, atol=0)


def test_beta_of_another_dtype_is_accepted(backend: str, data: dict[str, Tensor]) -> None:
    elbo = fastvae.ELBO("bernoulli")
    elbo.register_buffer("beta", torch.tensor(0.5, dtype=torch.float16), persistent=False)
    out = elbo(**data)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, (out.nll + 0.5 * out.kl).mean())


def test_repr_shows_the_settings() -> None:
    text = repr(fastvae.ELBO(Gaussian("learned"), beta=0.5, reduction="sum"))
    assert "beta=0.5, reduction='sum'" in text
    assert "Gaussian(scale='learned')" in text


# --- Likelihoods ------------------------------------------------------------------------------------------------------


def test_likelihood_is_a_submodule() -> None:
    elbo = fastvae.ELBO(Gaussian("learned"))
    assert isinstance(elbo.likelihood, Gaussian)
    assert [name for name, _ in elbo.named_parameters()] == ["likelihood.logvar"]
    assert list(elbo.state_dict()) == ["likelihood.logvar"]


def test_learned_scale_converges_to_the_variance(backend: str) -> None:
    """Trained with elbo.parameters(), log sigma^2 converges to the logarithm of the mean squared error, the optimum."""
    elbo = fastvae.ELBO(Gaussian("learned"))
    optimiser = torch.optim.Adam(elbo.parameters(), lr=0.1)
    x = 0.3 * torch.randn(50, D)
    for _ in range(200):
        optimiser.zero_grad()
        elbo(torch.zeros_like(x), x, kl=torch.zeros(50)).loss.backward()
        optimiser.step()
    torch.testing.assert_close(elbo.likelihood.logvar.detach().exp(), x.square().mean(), rtol=1e-2, atol=0)


PACKED = torch.randn(B, 2 * D, generator=torch.Generator().manual_seed(2))
MODULES = {
    "bernoulli": (Bernoulli(), PACKED[:, :D], PACKED[:, :D].sigmoid(), 1),
    "from_probs": (Bernoulli(from_probs=True), PACKED[:, :D].sigmoid(), PACKED[:, :D].sigmoid(), 1),
    "gaussian": (Gaussian(0.5), PACKED[:, :D], PACKED[:, :D], 1),
    "learned": (Gaussian("learned"), PACKED[:, :D], PACKED[:, :D], 1),
    "per_element": (Gaussian("per_element"), PACKED, PACKED[:, :D], 2),
    "pair": (Gaussian("per_element"), (PACKED[:, :D], PACKED[:, D:]), PACKED[:, :D], 2),
}


@pytest.mark.parametrize("name", MODULES)
def test_likelihood_modules_have_nll_mean_and_sample(
    backend: str, name: str, data: dict[str, Tensor]
) -> None:
    likelihood, params, mean, factor = MODULES[name]
    assert likelihood.channels(3) == 3 * factor
    torch.testing.assert_close(likelihood.mean(params), mean)
    nll = likelihood.nll(params, data["x"])
    assert nll.shape == (B,)
    assert torch.equal(nll, fastvae.ELBO(likelihood)(params, data["x"], kl=torch.zeros(B)).nll)

    draws = [likelihood.sample(params, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape == mean.shape
    assert not draws[0].requires_grad
    many = torch.stack([likelihood.sample(params) for _ in range(2000)])
    spread = many.std(0) / 2000**0.5
    assert ((many.mean(0) - mean).abs() < 6 * spread + 1e-3).all()


SCALES = {
    "fixed": (Gaussian(0.5), PACKED[:, :D], torch.tensor(0.5)),
    "learned": (Gaussian("learned"), PACKED[:, :D], torch.tensor(1.0)),
    "packed": (Gaussian("per_element"), PACKED, (PACKED[:, D:] / 2).exp()),
    "pair": (Gaussian("per_element"), (PACKED[:, :D], PACKED[:, D:]), (PACKED[:, D:] / 2).exp()),
}


@pytest.mark.parametrize("name", SCALES)
def test_gaussian_nll_equals_torch_distributions(backend: str, name: str, data: dict[str, Tensor]) -> None:
    """-log p equals torch.distributions', and samples have the stated spread."""
    likelihood, params, std = SCALES[name]
    expected = -torch.distributions.Normal(PACKED[:, :D], std).log_prob(data["x"]).sum(1)
    torch.testing.assert_close(likelihood.nll(params, data["x"]), expected.detach(), check_stride=False)
    spread = torch.stack([likelihood.sample(params) for _ in range(4000)]).std(0)
    torch.testing.assert_close(spread, std.expand_as(spread), rtol=0.08, atol=0)


def test_from_probs_equals_binary_cross_entropy(backend: str) -> None:
    """Value and gradient, including the ends, where F.binary_cross_entropy counts log 0 as -100."""
    probs = torch.tensor([[0.0, 1.0, 0.5, 1e-6, 1 - 1e-6, 0.3], [1.0, 0.0, 0.0, 1.0, 0.9, 0.1]])
    x = torch.tensor([[0.0, 1.0, 0.2, 1.0, 0.0, 0.0], [0.0, 1.0, 0.5, 0.5, 1.0, 0.0]])
    ours, torchs = (probs.clone().requires_grad_() for _ in range(2))
    nll = Bernoulli(from_probs=True).nll(ours, x)
    expected = F.binary_cross_entropy(torchs, x, reduction="none").sum(1)
    torch.testing.assert_close(nll, expected)
    nll.sum().backward()
    expected.sum().backward()
    inside = (probs > 0) & (probs < 1)
    torch.testing.assert_close(ours.grad[inside], torchs.grad[inside], rtol=1e-4, atol=1e-5)
    assert not ours.grad[~inside].any()  # none where the value is clamped


class Laplace(nn.Module):
    """A user's own likelihood, of which only `nll` is required."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.2))

    def nll(self, params: Tensor, target: Tensor) -> Tensor:
        return ((params - target).abs() / self.log_scale.exp() + self.log_scale + math.log(2)).sum(1)


@pytest.mark.parametrize("reduction", REDUCE)
def test_module_with_nll_is_accepted(backend: str, data: dict[str, Tensor], reduction: str) -> None:
    elbo = fastvae.ELBO(Laplace(), beta=0.5, reduction=reduction)
    out = elbo(**data)
    kl = textbook_kl(data["mu"], data["logvar"])
    torch.testing.assert_close(out.nll, Laplace().nll(data["recon"], data["x"]))
    torch.testing.assert_close(out.loss, REDUCE[reduction](out.nll + 0.5 * kl))
    out.loss.sum().backward()
    assert elbo.likelihood.log_scale.grad.abs() > 0


def test_subclass_with_kernel_call_uses_the_kernel(backend: str, data: dict[str, Tensor]) -> None:
    class Halved(Likelihood):
        def kernel_call(self, params: Tensor) -> tuple[str, list[Tensor], list[float]]:
            return "gaussian", [params / 2], [0.5]

    out = fastvae.ELBO(Halved())(**data)
    torch.testing.assert_close(out.nll, Gaussian(0.5).nll(data["recon"] / 2, data["x"]))


def test_subclass_may_override_nll(backend: str, data: dict[str, Tensor]) -> None:
    class Doubled(Bernoulli):
        def nll(self, params: Tensor, target: Tensor) -> Tensor:
            return 2 * super().nll(params, target)

    torch.testing.assert_close(fastvae.ELBO(Doubled())(**data).nll, 2 * fastvae.ELBO("bernoulli")(**data).nll)


def test_uint8_data_equal_scaled_floats(backend: str, data: dict[str, Tensor]) -> None:
    """uint8 images are accepted without conversion."""
    pixels = (data["x"] * 255).round().to(torch.uint8)
    for name in ("bernoulli", "gaussian"):
        elbo = fastvae.ELBO(name)
        as_float = elbo(data["recon"], pixels / 255, kl=torch.zeros(B))
        torch.testing.assert_close(elbo(data["recon"], pixels, kl=torch.zeros(B)).nll, as_float.nll)


# --- Warnings ---------------------------------------------------------------------------------------------------------

PROBS, LOGITS, UNIT = torch.rand(B, D), torch.linspace(-3, 3, B * D).view(B, D), torch.rand(B, D)
BITS = torch.arange(B * D, dtype=torch.uint8).view(B, D) % 2
SUSPECT = {
    "probabilities": ("bernoulli", PROBS, UNIT, r"all values of `recon` lie in \[0, 1\]"),
    "logits": (
        Bernoulli(from_probs=True),
        LOGITS,
        UNIT,
        r"`recon` has values outside \[0, 1\], so they look like logits",
    ),
    "target": ("bernoulli", LOGITS, LOGITS, r"`x` has values outside \[0, 1\] \(from -3 to 3\)"),
    "binary": ("bernoulli", LOGITS, BITS, r"`x` is uint8 with no value above 1, .* pass x\.bool\(\)"),
}


@pytest.mark.parametrize("name", SUSPECT)
def test_suspicious_data_warns_once(backend: str, name: str) -> None:
    likelihood, recon, x, message = SUSPECT[name]

    def use(elbo: fastvae.ELBO) -> None:
        elbo(recon, x, kl=torch.zeros(B))
        elbo(recon, x, kl=torch.zeros(B))

    with pytest.warns(UserWarning, match=message) as caught:
        any(use(fastvae.ELBO(likelihood)) for _ in range(2))  # the same ELBO twice, then another one
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the user's line


SILENT = {
    "logits": ("bernoulli", LOGITS, UNIT),
    "zeros": ("bernoulli", torch.zeros(B, D), UNIT),  # the logits of a decoder that starts at zero
    "probabilities": (Bernoulli(from_probs=True), PROBS, UNIT),
    "few logits": ("bernoulli", torch.full((1, 63), 0.5), torch.rand(1, 63)),
    "pixels": ("bernoulli", LOGITS, torch.full((B, D), 200, dtype=torch.uint8)),
    "black pixels": ("bernoulli", LOGITS, torch.zeros(B, D, dtype=torch.uint8)),
    "bits": ("bernoulli", LOGITS, BITS.bool()),
    "gaussian": ("gaussian", PROBS, LOGITS),
    "empty": ("bernoulli", torch.zeros(0, D), torch.zeros(0, D)),
}


@pytest.mark.parametrize("name", SILENT)
def test_valid_data_does_not_warn(name: str) -> None:
    likelihood, recon, x = SILENT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastvae.ELBO(likelihood)(recon, x, kl=torch.zeros(len(x)))


def test_elbo_checks_only_its_first_batch() -> None:
    elbo = fastvae.ELBO("bernoulli")
    elbo(LOGITS, UNIT, kl=torch.zeros(B))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo(PROBS, LOGITS, kl=torch.zeros(B))


# ---------------------------------------------------------------------------------------------------------------------
# Free bits
# ---------------------------------------------------------------------------------------------------------------------


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch_mean", [True, False])
@pytest.mark.parametrize("given", ["kl", "posterior"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "own"])
def test_free_bits_equal_the_formula(
    backend: str, likelihood: str, given: str, batch_mean: bool, reduction: str
) -> None:
    """Kingma et al. 2016, appendix C.8, written out: the loss, its gradient, and a KL that is still the true one."""

    class Own(nn.Module):
        def nll(self, params: Tensor, target: Tensor) -> Tensor:
            return functional.bernoulli_nll(params, target)

    chosen = Own() if likelihood == "own" else likelihood
    elbo = fastvae.ELBO(chosen, beta=0.7, reduction=reduction, free_bits=0.4, free_bits_mean=batch_mean)
    scales = torch.tensor([0.1, 0.5, 1.0, 2.0])  # the dimensions are below, above and around the 0.4 nats
    mu, logvar = (scales * torch.randn(6, 4)).requires_grad_(), (scales * torch.randn(6, 4)).requires_grad_()
    logits, x = torch.randn(6, 5), torch.rand(6, 5)
    if given == "kl":
        _, kl = elbo.reparameterize(mu, logvar)
        assert kl.shape == mu.shape
        out = elbo(logits, x, kl=kl)
    else:
        out = elbo(logits, x, mu, logvar)

    wide_mu, wide_logvar = (t.detach().double().requires_grad_() for t in (mu, logvar))
    each = kl_per_dimension(wide_mu, wide_logvar)
    nll = functional.bernoulli_nll(logits.double(), x.double())
    bits = each.mean(0).clamp(min=0.4).sum() if batch_mean else each.clamp(min=0.4).sum(1).mean()
    want = nll.mean() + 0.7 * bits
    loss = {"mean": out.loss, "sum": out.loss / 6, "none": out.loss.mean()}[reduction]
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    if reduction == "none":
        free = torch.where((each.mean(0) if batch_mean else each) > 0.4, each, 0.4)
        torch.testing.assert_close(out.loss.double(), nll + 0.7 * free.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.kl.double(), each.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.elbo, -(out.nll + out.kl))
    got = torch.autograd.grad(loss, (mu, logvar))
    for a, b in zip(got, torch.autograd.grad(want, (wide_mu, wide_logvar)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    assert not got[0][:, 0].any()  # the free one


def test_free_bits_below_every_kl_change_nothing() -> None:
    """A threshold below the KL of every dimension changes nothing."""
    mu, logvar = 3 + torch.rand(4, 3), torch.zeros(4, 3)
    logits, x = torch.randn(4, 5), torch.rand(4, 5)
    plain, free = (fastvae.ELBO("bernoulli", free_bits=b)(logits, x, mu, logvar) for b in (0.0, 0.1))
    for a, b in zip(plain, free, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_free_bits_accept_a_prior_and_latents_of_any_rank(backend: str) -> None:
    elbo = fastvae.ELBO("gaussian", free_bits=0.2)
    mu, logvar, prior_mu, prior_logvar = (torch.randn(3, 2, 4, 4) for _ in range(4))
    z, kl = elbo.reparameterize(mu, logvar, prior_mu, prior_logvar, samples=2)
    assert z.shape == (2, 3, 2, 4, 4)
    each = functional.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction="none")
    out = elbo(torch.zeros(3, 5), torch.zeros(3, 5), kl=kl)
    torch.testing.assert_close(out.kl, each.flatten(1).sum(1))
    torch.testing.assert_close(out.loss - out.nll.mean(), each.mean(0).clamp(min=0.2).sum())


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: fastvae.ELBO("bernoulli", free_bits=-1.0), ValueError, "`free_bits` must be .* at least 0, got -1"),
        (lambda: fastvae.ELBO("bernoulli", free_bits=math.inf), ValueError, "`free_bits` must be finite"),
        (lambda: fastvae.ELBO("bernoulli", free_bits="much"), TypeError, "`free_bits` must be a float, got 'much'"),
        (
            lambda: fastvae.ELBO("bernoulli", free_bits=0.1)(torch.zeros(3, 2), torch.zeros(3, 2), kl=torch.zeros(3)),
            ValueError,
            r"`kl` must be the KL of every dimension, \(B, \.\.\.\).*got shape \(3,\)",
        ),
        (
            lambda: fastvae.ELBO("bernoulli", free_bits=0.1)(torch.zeros(3, 2), torch.zeros(3, 2), kl=2.0),
            TypeError,
            "`kl` must be a Tensor, got float",
        ),
        (
            lambda: fastvae.ELBO("bernoulli", free_bits=0.1)(
                torch.zeros(3, 2), torch.zeros(3, 2), kl=torch.zeros(4, 2)
            ),
            ValueError,
            "one value per row of `recon`",
        ),
    ],
)  # fmt: skip
def test_free_bits_with_wrong_arguments_raise(
    make: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_repr_shows_free_bits() -> None:
    assert "free_bits=0.25" in repr(fastvae.ELBO("bernoulli", free_bits=0.25))
    assert "free_bits" not in repr(fastvae.ELBO("bernoulli"))
