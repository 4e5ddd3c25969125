"""The modules of the discretised likelihoods: samples, means, training, products and compilation."""

import itertools

import mpmath
import pytest
import torch
from test_discretized import check, make, nll, planes
from torch import Tensor

import fastvae
from fastvae import functional, reference
from fastvae.likelihoods import DiscretizedLogistic, DiscretizedLogisticMixture, Product


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """The p-value of a chi-squared test. Cells of fewer than 10 expected samples are merged."""
    rare = expected < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    return float(mpmath.gammainc((int(kept.sum()) - 1) / 2, statistic / 2, regularized=True))


@pytest.mark.parametrize("draws", [1_000_000])
@pytest.mark.parametrize(("components", "channels", "bits"), [(0, 1, 8), (3, 1, 8), (4, 3, 2)])
def test_samples_have_the_probabilities(
    native: None, components: int, channels: int, bits: int, draws: int
) -> None:
    likelihood = DiscretizedLogisticMixture(components, bits) if components else DiscretizedLogistic(bits)
    assert likelihood.channels(channels) == planes(components, channels)
    params = torch.randn(1, planes(components, channels)) - (0.5 if bits == 2 else 1)
    generator = torch.Generator().manual_seed(1)
    samples = likelihood.sample(params.expand(draws, -1), generator)
    assert samples.dtype == torch.uint8
    assert samples.shape == (draws, channels)
    code = sum(samples[:, c].long() * 2 ** (bits * c) for c in range(channels))
    counts = torch.bincount(code, minlength=2 ** (bits * channels))
    cells = torch.arange(2 ** (bits * channels))
    levels = torch.stack([cells >> bits * c & 2**bits - 1 for c in range(channels)], 1).to(torch.uint8)
    masses = torch.exp(-likelihood.nll(params.double().expand(len(cells), -1), levels))
    assert chi_square(counts, draws * masses) > 1e-3
    # A check that the test can fail: the parameters are off by 2 %.
    wrong = 1.02 * params.double()
    assert chi_square(counts, draws * torch.exp(-likelihood.nll(wrong.expand(len(cells), -1), levels))) < 1e-3


def test_samples_with_one_generator_state_repeat(native: None) -> None:
    likelihood, params = DiscretizedLogisticMixture(3), torch.randn(2, 30, 4, 5)
    first, second = (likelihood.sample(params, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, likelihood.sample(params, torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(("components", "channels"), [(0, 3), (4, 1), (4, 3)])
def test_mean_equals_that_of_many_samples(native: None, components: int, channels: int, bits: int) -> None:
    """Compared with the mean of many samples, for scales that seldom leave the range."""
    likelihood = DiscretizedLogisticMixture(components, bits) if components else DiscretizedLogistic(bits)
    params = 0.2 * torch.randn(5, planes(components, channels))
    k = max(1, components)
    for c in range(channels):
        log_scales = slice(3 + c, 4 + c) if not components else None
        if components:
            start = k + c * (3 if channels == 3 else 2) * k + k
            log_scales = slice(start, start + k)
        params[:, log_scales] -= 2.5
    draws = likelihood.sample(params.repeat(40_000, 1), torch.Generator().manual_seed(1)).double()
    average = draws.view(40_000, 5, channels).mean(0) / (2**bits - 1)
    mean = likelihood.mean(params)
    # With 3 bits, a bin is wider than these scales.
    assert ((mean - average).abs() < (2e-2 if bits == 3 else 2e-3)).all()
    assert mean.dtype == params.dtype
    assert likelihood.mean(params.bfloat16()).dtype == torch.bfloat16
    leaf = params.requires_grad_()
    assert torch.autograd.grad(likelihood.mean(leaf).sum(), leaf)[0].abs().sum() > 0


def test_mean_stays_in_0_1() -> None:
    params = torch.tensor(
        [[-50.0, 2.0], [50.0, 2.0], [0.0, -7.0], [-1.0, -30.0], [0.3, 15.0], [0.0, 20.0], [1.0, 20.0]]
    )
    mean = DiscretizedLogistic().mean(params)
    assert ((mean >= 0) & (mean <= 1)).all()
    torch.testing.assert_close(mean[:3, 0], torch.tensor([0.0, 1.0, 0.5]), atol=2e-3, rtol=0)
    torch.testing.assert_close(mean[4:, 0], torch.full((3,), 0.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_of_any_scale_is_accurate(dtype: torch.dtype) -> None:
    """Compared with 50 digits. The wider the scale, the more the two ends of the integral cancel."""
    points = list(
        itertools.product((-3.0, -1.0, 0.0, 0.25, 8.0), (-5.0, -0.5, 0.0, 0.5, 4.0, 15.0, 20.0, 60.0))
    )
    want = []
    with mpmath.workdps(50):
        for mean, log_scale in points:
            scale = mpmath.exp(log_scale)
            ends = [scale * mpmath.log1p(mpmath.exp((mean + end) / scale)) for end in (1, -1)]
            want.append(float((ends[0] - ends[1]) / 2))
    params = torch.tensor(points, dtype=dtype, requires_grad=True)
    mean = DiscretizedLogistic().mean(params)
    expected = torch.tensor(want, dtype=dtype)[:, None]
    torch.testing.assert_close(mean, expected, atol=4 * torch.finfo(dtype).eps, rtol=0)
    (gradient,) = torch.autograd.grad(mean.sum(), params)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_elbo_equals_the_formula(backend: str, reduction: str, dtype: torch.dtype) -> None:
    params, target = make(3, 3, (4, 6, 5))
    elbo = fastvae.ELBO(DiscretizedLogisticMixture(3, min_mass=0.0), beta=0.5, reduction=reduction)
    leaf, kl = params.to(dtype).requires_grad_(), torch.rand(4).requires_grad_()
    out = elbo(leaf, target, kl=kl)
    (3 * out.loss.sum() + out.nll.square().mean() / 100).backward()

    exact_leaf, exact_kl = params.to(dtype).double().requires_grad_(), kl.detach().double().requires_grad_()
    rows = nll(reference, exact_leaf, target, 3, min_mass=0.0)
    loss = rows + 0.5 * exact_kl
    loss = loss if reduction == "none" else getattr(loss, reduction)()
    (3 * loss.sum() + rows.square().mean() / 100).backward()
    torch.testing.assert_close(out.loss.double(), loss, rtol=5e-6, atol=0)
    check((out.nll.detach(), leaf.grad), (rows.detach(), exact_leaf.grad), dtype)
    torch.testing.assert_close(kl.grad.double(), exact_kl.grad, rtol=1e-5, atol=0)


def test_small_gradients_survive_float16(backend: str) -> None:
    """Weighted by 1/B before they are scaled up, the gradients would round to zero in float16."""
    params, target = make(2, 3, (512, 3))
    leaf = (params / 4).half().requires_grad_()
    loss = fastvae.ELBO(DiscretizedLogisticMixture(2))(leaf, target, kl=torch.zeros(512)).loss
    (gradient,) = torch.autograd.grad(loss * 2**15, leaf)
    exact_leaf = leaf.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(nll(reference, exact_leaf, target, 2).mean() * 2**15, exact_leaf)
    assert ((gradient.double() - exact).abs() <= 1e-3 * exact.abs() + 2e-3).all()
    lost = leaf.detach().requires_grad_()
    early = torch.autograd.grad(nll(functional, lost, target, 2).mean(), lost)[0]
    assert (early == 0).sum() > (gradient == 0).sum()


def test_product_adds_its_parts(backend: str) -> None:
    likelihood = Product({"image": DiscretizedLogisticMixture(2), "label": "bernoulli", "size": "gaussian"})
    assert likelihood.channels({"image": 3, "label": 10, "size": 1}) == {"image": 20, "label": 10, "size": 1}
    params, image = make(2, 3, (4, 5, 6))
    recon = {"image": params.float(), "label": torch.randn(4, 10), "size": torch.randn(4, 1)}
    leaves = {name: x.requires_grad_() for name, x in recon.items()}
    data = {"label": torch.rand(4, 10), "size": torch.randn(4, 1), "image": image}
    kl = torch.rand(4)
    out = fastvae.ELBO(likelihood, beta=2.0)(leaves, data, kl=kl)
    alone = {name: part.nll(leaves[name], data[name]) for name, part in likelihood.parts.items()}
    torch.testing.assert_close(out.nll, sum(alone.values()))
    torch.testing.assert_close(out.loss, (sum(alone.values()) + 2 * kl).mean())
    assert likelihood.nll_of_parts(leaves, data).keys() == alone.keys()
    got = torch.autograd.grad(out.loss, list(leaves.values()))
    want = torch.autograd.grad(sum(alone.values()).mean(), list(leaves.values()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    means = likelihood.mean(recon)
    assert {name: x.shape for name, x in means.items()} == {name: x.shape for name, x in data.items()}
    draws = [likelihood.sample(recon, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in data)


def test_product_trains_the_parameters_of_its_parts() -> None:
    learned = fastvae.likelihoods.Gaussian("learned")
    likelihood = Product({"a": learned, "b": fastvae.likelihoods.Gaussian("per_element")})
    assert list(fastvae.ELBO(likelihood).parameters()) == [learned.logvar]
    rows = likelihood.nll(
        {"a": torch.zeros(3, 2), "b": torch.zeros(3, 4)}, {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}
    )
    rows.sum().backward()
    assert learned.logvar.grad is not None


def test_product_accepts_names_of_module_attributes(backend: str) -> None:
    names = ["type", "type_", "values", "float", "training", "parameters", "image"]
    likelihood = Product({name: fastvae.likelihoods.Gaussian("learned") for name in names})
    params = {name: torch.randn(3, 2 + i) for i, name in enumerate(names)}
    data = {name: torch.randn_like(x) for name, x in params.items()}
    nlls = likelihood.nll_of_parts(params, data)
    assert list(nlls) == list(likelihood.mean(params)) == names
    for name in names:
        torch.testing.assert_close(nlls[name], fastvae.likelihoods.Gaussian().nll(params[name], data[name]))
    state = likelihood.state_dict()
    assert "parts.image.logvar" in state
    assert "parts.type_.logvar" in state  # the part "type_"; the key of "type" has one more underscore
    assert "parts.type__.logvar" in state
    likelihood.double().load_state_dict(state)
    assert len(list(likelihood.parameters())) == len(names)


def test_product_compiles(native: None) -> None:
    likelihood = Product({"type": "bernoulli", "image": DiscretizedLogistic()})
    params = {"type": torch.randn(4, 5), "image": torch.randn(4, 6, 7)}
    data = {"type": torch.rand(4, 5), "image": torch.randint(0, 256, (4, 3, 7), dtype=torch.uint8)}
    compiled = torch.compile(fastvae.ELBO(likelihood), fullgraph=True, backend="aot_eager")
    got, want = (elbo(params, data, kl=torch.ones(4)).loss for elbo in (compiled, fastvae.ELBO(likelihood)))
    torch.testing.assert_close(got, want)


def test_compiled_nll_equals_eager(native: None) -> None:
    """One graph for all batch sizes, with the results of eager."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    elbo = fastvae.ELBO(DiscretizedLogisticMixture(2))
    compiled = torch.compile(elbo, fullgraph=True, dynamic=True, backend=counter)
    for rows in (
        7,
        8,
        5,
    ):  # torch would identify a first batch size of 3 with the 3 channels, and compile it separately
        params, target = make(2, 3, (rows, 4, 6))
        results = []
        for step in (elbo, compiled):
            leaf = params.float().requires_grad_()
            out = step(leaf, target, kl=torch.ones(rows))
            (2 * out.loss + out.nll.mean()).backward()
            results.append((out.loss.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])
    # torch.compile restarts, and leaves an empty graph, when it finds that a float is a constant.
    graphs = [g for g in counter.graphs if any(node.op == "call_function" for node in g.graph.nodes)]
    assert len(graphs) == 1


def test_validate_of_an_invalid_level_raises(backend: str) -> None:
    params, target = make(2, 3, (2, 4))
    nll(functional, params, target.clamp(max=31), 2, bits=5, validate=True)
    message = r"`target` must hold levels from 0 to 31 with `bits` 5, got \d+ at \("
    with pytest.raises(ValueError, match=message):
        nll(functional, params, target, 2, bits=5, validate=True)
    with pytest.raises(ValueError, match=message):
        nll(functional, params[:, :6], target, 0, bits=5, validate=True)
