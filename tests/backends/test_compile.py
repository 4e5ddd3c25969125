"""torch.compile: one graph for all batch sizes, the results of eager, noise that stays random; and `opcheck`."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastvae
import fastvae.functional as fv
from fastvae.likelihoods import Gaussian

L, D = 5, 12
SEED = torch.tensor([7, 8])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def make_elbo(likelihood: str) -> fastvae.ELBO:
    """`likelihood` is "bernoulli", or the scale of a Gaussian; "bounded ..." has bounds."""
    if likelihood == "bernoulli":
        return fastvae.ELBO(likelihood, beta=0.5)
    bounds = (-3.0, 1.0) if likelihood.startswith("bounded ") else None
    return fastvae.ELBO(Gaussian(likelihood.removeprefix("bounded "), logvar_bounds=bounds), beta=0.5)


class Model(nn.Module):
    """Encoder, ELBO and decoder: the part of a training step that is compiled."""

    def __init__(self, likelihood: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.elbo = make_elbo(likelihood)
        self.encoder = nn.Linear(D, 2 * L)
        self.decoder = nn.Linear(L, self.elbo.likelihood.channels(D))

    def forward(self, x: Tensor, seed: Tensor | None = None) -> fastvae.ELBOOutput:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = self.elbo.reparameterize(mu, logvar, seed=seed)
        return self.elbo(self.decoder(z), x, kl=kl)


@pytest.mark.parametrize(
    ("compiler", "likelihood"),
    [
        ("aot_eager", "bernoulli"),
        ("aot_eager", "learned"),
        ("aot_eager", "per_element"),
        ("aot_eager", "bounded learned"),
        ("aot_eager", "bounded per_element"),
        pytest.param("inductor", "learned", marks=pytest.mark.slow),
    ],
)
def test_compiled_op_is_one_graph_and_equals_eager(native: None, compiler: str, likelihood: str) -> None:
    model, counter = Model(likelihood), CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 8, 17, 5):
        x = torch.rand(rows, D)

        def run(step: Callable[..., fastvae.ELBOOutput], x: Tensor = x) -> list[Tensor]:
            model.zero_grad()
            out = step(x, SEED)
            (3 * out.loss + out.nll.square().mean()).backward()
            return [*(t.detach() for t in out), *(p.grad.clone() for p in model.parameters())]

        for actual, expected in zip(run(compiled), run(model), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_compiled_reference_equals_eager(native: None) -> None:
    """The setting "reference" also compiles to one graph, and a change of the setting has an effect."""
    model, counter = Model("bernoulli"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    x = torch.rand(4, D)
    from_native = compiled(x, SEED)
    with fastvae.use_backend("reference"):
        from_reference = compiled(x, SEED)
    assert counter.frame_count == 2
    ours = [[n for n in g.graph.nodes if str(n.target).startswith("fastvae.")] for g in counter.graphs]
    assert [len(nodes) for nodes in ours] == [2, 0]
    for actual, expected in zip(from_reference, from_native, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# This backend uses Inductor's partitioner, which merges equal calls.
PARTITIONED = "aot_eager_decomp_partition"


@pytest.mark.parametrize(
    ("chosen", "compiler"),
    [
        ("native", PARTITIONED),
        ("reference", PARTITIONED),
        pytest.param("native", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_draws_are_not_merged(chosen: str, compiler: str) -> None:
    """Two equal calls differ, within one compiled function and between calls. A seeded run repeats itself."""
    elbo, mu, logvar = make_elbo("bernoulli"), torch.zeros(4, L, requires_grad=True), torch.zeros(4, L)

    @torch.compile(fullgraph=True, backend=compiler)
    def twice(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        return elbo.reparameterize(mu, logvar)[0], elbo.reparameterize(mu, logvar)[0]

    with fastvae.use_backend(chosen):
        torch.manual_seed(1)
        first, second = twice(mu, logvar)
        third, _ = twice(mu, logvar)
        torch.manual_seed(1)
        again, _ = twice(mu, logvar)
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(again, first)


def test_compiled_backward_uses_the_noise_of_the_forward(native: None) -> None:
    """z = mu + e^(logvar/2) eps, so the gradient of logvar shows which eps the backward generated."""
    mu, logvar = torch.zeros(4, L), torch.zeros(4, L, requires_grad=True)

    @torch.compile(fullgraph=True, backend=PARTITIONED)
    def draw(mu: Tensor, logvar: Tensor) -> Tensor:
        return fv.reparameterize_kl(mu, logvar)[0]

    z = draw(mu, logvar)
    z.sum().backward()
    torch.testing.assert_close(logvar.grad, z.detach() / 2)


def test_changing_beta_does_not_recompile(backend: str) -> None:
    model, counter = Model("bernoulli"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.rand(4, D)
    for beta in (0.0, 0.25, 1.0):
        model.elbo.beta = beta
        out = compiled(x, SEED)
        torch.testing.assert_close(out.loss, (out.nll + beta * out.kl).mean())
    assert counter.frame_count == 1


def test_compiled_call_with_generator_raises(backend: str) -> None:
    elbo, generator = make_elbo("bernoulli"), torch.Generator()

    @torch.compile(fullgraph=True, backend="eager")
    def draw(mu: Tensor) -> Tensor:
        return elbo.reparameterize(mu, mu, generator=generator)[0]

    with pytest.raises(Exception, match=r"`generator` cannot be traced by torch\.compile; pass `seed`"):
        draw(torch.zeros(4, L))


def test_compiled_call_with_a_wrong_shape_raises_the_same_message(backend: str) -> None:
    elbo = torch.compile(make_elbo("bernoulli"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=re.escape("did you mean x.flatten(1)?")):
        elbo(torch.zeros(4, D), torch.zeros(4, 3, 4), kl=torch.zeros(4))


def test_compiled_call_gives_no_range_warnings(backend: str) -> None:
    """Probabilities in place of logits warn in eager. Compiled code neither breaks the graph nor reads the data."""
    elbo = make_elbo("bernoulli")
    compiled = torch.compile(elbo, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastvae")
        compiled(torch.rand(4, D), torch.rand(4, D), kl=torch.zeros(4))
    assert not elbo._first_batch_checked


# --- opcheck: schema, autograd registration, fake kernels, tracing ----------------------------------------------------


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def plain(*shape: int) -> Tensor:
    return leaf(*shape).detach()


def positive(*shape: int) -> Tensor:
    return plain(*shape).abs().requires_grad_()


X, M, HEAD, ROWS, BETA, NONE = (3, D), (3, L), (3, 2 * L), torch.ones(3), torch.tensor(0.5), None
IMAGE = plain(2, 3, 4, 4).to(memory_format=torch.channels_last)

LEVELS = torch.arange(18, dtype=torch.uint8).view(2, 3, 3)

# The form of a posterior's scale, its constants and the balance.
PLAIN_FORM = "logvar", [], NONE
NVAE_FORM = "log_std", [5.0, 1e-2], 0.8
ROW_2, EPS_2 = plain(2, 3), plain(2, *M)
LOG_PROBS = "logvar", [], True, 2  # form, constants, stl, samples
CSR = torch.tensor([2.0, 1.0, 3.0]), torch.tensor([0, 1, 3]), torch.tensor([1, 0, 2])  # a matrix (2, 3)

# The ops themselves, then the forward and backward ops that they call.
OPS = {
    "reparameterize_kl": [
        (leaf(*M), leaf(*M), NONE, NONE, *PLAIN_FORM, False, NONE, SEED, 0, NONE, NONE),
        (leaf(*M), leaf(*M), leaf(*M), leaf(*M), *PLAIN_FORM, False, 2, SEED, 3, NONE, NONE),
        (leaf(*M), plain(*M), NONE, NONE, *PLAIN_FORM, False, 2, NONE, 0, leaf(2, *M), NONE),
        (leaf(*HEAD), NONE, leaf(*HEAD), NONE, *NVAE_FORM, True, 2, SEED, 3, NONE, NONE),
    ],
    "gaussian_kl": [
        (leaf(*M), leaf(*M), NONE, NONE, *PLAIN_FORM, False),
        (leaf(*M).half(), leaf(*M).half(), plain(*M).half(), plain(*M).half(), *PLAIN_FORM, True),
        (leaf(*HEAD), NONE, NONE, NONE, "softplus", [1e-4], NONE, False),
    ],
    "sample_log_probs": [
        (leaf(*M), leaf(*M), NONE, NONE, "logvar", [], True, 2, SEED, 3, NONE, NONE),
        (leaf(*HEAD), NONE, leaf(*HEAD), NONE, "softplus", [1e-4], False, 2, NONE, 0, plain(2, *M), NONE),
    ],
    "nll": [
        ("bernoulli", [leaf(*X)], plain(*X).sigmoid(), [], ROWS.clone().requires_grad_(), BETA, 2),
        ("bernoulli", [IMAGE.clone().requires_grad_()], IMAGE.byte(), [], NONE, NONE, 0),
        ("gaussian", [leaf(*X)], leaf(*X), [0.5], ROWS, BETA, 1),
        ("bernoulli", [leaf(*X)], plain(*X).sigmoid(), [], ROWS, BETA, 2, plain(3, 1) > 0),
        (
            "gaussian_learned",
            [leaf(*X).detach().half().requires_grad_(), leaf()],
            plain(*X),
            [],
            NONE,
            NONE,
            0,
            plain(*X).abs(),
        ),
        (
            "gaussian_head",
            [leaf(2, 4, 3)],
            leaf(2, 2, 3),
            [],
            NONE,
            NONE,
            1,
            torch.ones(1, 2, 1, dtype=torch.uint8),
        ),
        ("gaussian_learned", [leaf(*X), leaf()], plain(*X), [], ROWS, BETA, 2),
        ("gaussian_per_element", [plain(*X), leaf(*X)], leaf(*X), [], ROWS, NONE, 2),
        ("gaussian_head", [leaf(2, 4, 3)], leaf(2, 2, 3), [], NONE, NONE, 0),
        ("gaussian_bounded_per_element", [plain(*X), leaf(*X)], leaf(*X), [-1.0, 2.0], ROWS, BETA, 2),
        ("gaussian_bounded_head", [leaf(2, 4, 3)], leaf(2, 2, 3), [-1.0, 2.0], NONE, NONE, 0),
        ("laplace", [leaf(*X)], leaf(*X), [0.5], ROWS, BETA, 1),
        ("continuous_bernoulli", [leaf(*X)], plain(*X).sigmoid(), [], ROWS, BETA, 2),
        ("gamma", [leaf(*X)], plain(*X).exp(), [2.5], ROWS, BETA, 1),
        ("poisson", [leaf(*X)], plain(*X).abs().int(), [], ROWS, BETA, 2),
        ("poisson_rate", [positive(*X)], plain(*X).abs().int(), [0.5], ROWS, BETA, 2),
        ("student_t_learned", [leaf(*X), leaf()], leaf(*X), [2.5], ROWS, BETA, 0),
        ("discretized_logistic", [leaf(2, 4, 3)], LEVELS[:, :2], [8, -7.0, 1e-5], NONE, NONE, 0),
        ("discretized_logistic_mixture", [leaf(2, 20, 3)], LEVELS, [2, 8, -7.0, 1e-5], ROWS[:2], BETA, 2),
        (
            "discretized_logistic_mixture",
            [leaf(2, 6, 3).detach().half().requires_grad_()],
            LEVELS[:, :1],
            [2, 5, -7.0, 0.0],
            NONE,
            NONE,
            1,
        ),
        (
            "gaussian_learned",
            [leaf(*X).detach().half().requires_grad_(), leaf()],
            leaf(*X),
            [],
            ROWS,
            BETA,
            2,
        ),
    ],
    "reparameterize_kl_forward": [
        (plain(*M), plain(*M), NONE, NONE, *PLAIN_FORM, False, NONE, SEED, 0, NONE, NONE),
        (plain(*M), plain(*M), plain(*M), plain(*M), *PLAIN_FORM, False, 2, NONE, 0, plain(2, *M), NONE),
        (plain(*HEAD), NONE, NONE, NONE, "variance", [1e-6], NONE, True, NONE, SEED, 0, NONE, NONE),
    ],
    "reparameterize_kl_backward": [
        (plain(*M), ROWS, plain(*M), plain(*M), NONE, NONE, *PLAIN_FORM, NONE, SEED, 0, NONE, 0b00011),
        (
            plain(*M),
            plain(*M),
            plain(*HEAD),
            NONE,
            plain(*M),
            plain(*M),
            *NVAE_FORM,
            NONE,
            SEED,
            0,
            NONE,
            0b01101,
        ),
        (
            plain(2, *M),
            NONE,
            plain(*M),
            plain(*M),
            plain(*M),
            plain(*M),
            *PLAIN_FORM,
            2,
            SEED[:0],
            0,
            plain(2, *M),
            0b11111,
        ),
    ],
    "gaussian_kl_forward": [(plain(*M), plain(*M), NONE, NONE, *PLAIN_FORM, True)],
    "gaussian_kl_backward": [
        (ROWS, plain(*M), plain(*M), plain(*M), plain(*M), *PLAIN_FORM, 0b1111),
        (ROWS, plain(*HEAD), NONE, plain(*HEAD), NONE, *NVAE_FORM, 0b0101),
    ],
    "sample_log_probs_forward": [
        (plain(*M), plain(*M), plain(*M), plain(*M), "log_std", [5.0, 1e-2], True, 2, SEED, 3, NONE, NONE),
        (plain(*HEAD), NONE, NONE, NONE, "logvar", [], False, 2, NONE, 0, plain(2, *M), NONE),
    ],
    "sample_log_probs_backward": [
        (plain(2, *M), plain(2, 3), NONE, plain(*M), plain(*M), NONE, NONE, *LOG_PROBS, SEED, 3, NONE, 0b11),
        (NONE, NONE, ROW_2, plain(*HEAD), NONE, plain(*HEAD), NONE, *LOG_PROBS, SEED[:0], 0, EPS_2, 0b0101),
    ],
    "nll_forward": [
        ("bernoulli", [plain(*X)], plain(*X), [], ROWS, BETA, 2, 1),
        ("laplace", [plain(*X)], plain(*X), [0.5], ROWS, BETA, 2, 1, plain(*X).abs()),
        ("gaussian_learned", [IMAGE, torch.tensor(0.1)], IMAGE, [], NONE, NONE, 0, 0b11),
        ("gaussian_per_element", [plain(*X), plain(*X)], plain(*X), [], ROWS.double(), BETA, 1, 0b10),
        ("gaussian_bounded_head", [plain(2, 4, 3)], plain(2, 2, 3), [-1.0, 2.0], NONE, NONE, 0, 1),
        ("student_t", [plain(*X)], plain(*X), [2.5, 0.7], ROWS, BETA, 2, 1),
        ("discretized_logistic_mixture", [plain(2, 20, 3)], LEVELS, [2, 8, -7.0, 1e-5], NONE, NONE, 0, 1),
    ],
    "nll_gradient": [
        ("bernoulli", [plain(*X).half()], plain(*X).sigmoid(), [], torch.tensor(2.0), NONE, 2, 1),
        ("bernoulli", [plain(*X).half()], plain(*X).sigmoid(), [], NONE, ROWS, 0, 1, plain(1, D) > 0),
        ("gaussian_per_element", [plain(*X), plain(*X)], plain(*X), [], NONE, ROWS, 0, 0b10),
        (
            "discretized_logistic",
            [plain(2, 6, 3).half()],
            LEVELS,
            [8, -7.0, 1e-5],
            torch.tensor(2.0),
            NONE,
            2,
            1,
        ),
    ],
    "nll_backward": [
        (torch.tensor(2.0), NONE, [plain(*X)], NONE, ROWS, BETA, 3, 2, True, True),
        (NONE, ROWS, [plain(*X)], ROWS, NONE, NONE, 3, 0, False, False),
    ],
    "nll_backward_": [(torch.tensor(2.0), ROWS, [plain(*X)], NONE, ROWS, BETA, 3, 2, True, True)],
    "nll_elements": [
        ("poisson_rate", [positive(*IMAGE.shape)], IMAGE.abs().int(), [1e-8], 1.0),
        ("negative_binomial", [positive(*X), positive(X[1])], plain(*X).abs(), [0.0], 1.0, plain(1, D) > 0),
        ("negative_binomial", [positive(*X), positive(X[1])], plain(*X).abs(), [1e-8], -1.0),
        (
            "zero_inflated_negative_binomial",
            [positive(*X), positive(*X).detach(), leaf(*X)],
            plain(*X).abs(),
            [0.0],
            1.0,
        ),
        (
            "negative_binomial",
            [plain(*X).abs().half().requires_grad_(), positive(X[1])],
            plain(*X).abs(),
            [1e-8],
            1.0,
        ),
    ],
    "nll_elements_forward": [
        ("poisson_rate", [plain(*X).abs()], plain(*X).abs().int(), [1e-8], 1.0, 1),
        ("negative_binomial", [plain(*X).abs(), plain(X[1]).abs()], plain(*X).abs(), [1e-8], -1.0, 0b10),
        ("zero_inflated_negative_binomial", [plain(*X).abs().half()] * 3, plain(*X).abs(), [0.0], 1.0, 0b111),
    ],
    "nll_elements_backward": [
        (plain(*X), [plain(*X), plain(*X)], 1, torch.float32),
        (plain(X[0], 1).expand(*X), [plain(*X)], -1, torch.bfloat16),
    ],
    "gaussian_mixture_log_prob": [
        (leaf(*M), leaf(4, L), leaf(4, L), NONE, True, False),
        (leaf(*M), leaf(4, L), plain(4, L), leaf(4), True, True),
        (plain(*M), leaf(4, L), leaf(4, L), leaf(3, 4), False, True),
        (
            leaf(*M).detach().half().requires_grad_(),
            plain(4, L).half(),
            plain(4, L).half(),
            plain(4),
            True,
            True,
        ),
    ],
    "gaussian_mixture_log_prob_forward": [(plain(*M), plain(4, L), plain(4, L), plain(3, 4), True, True)],
    "gaussian_mixture_log_prob_backward": [
        (ROWS, plain(*M), plain(*M), plain(4, L), plain(4, L), plain(4), ROWS, plain(*M), 0b1111),
        (NONE, plain(*M), plain(*M), plain(4, L), plain(4, L), NONE, plain(0), plain(*M), 0b110),
    ],
    "sparse_linear": [(*CSR, leaf(3, 5).t(), leaf(5)), (*CSR, leaf(5, 3), NONE)],
    "sparse_linear_forward": [(*CSR, plain(5, 3), plain(5)), (*CSR, plain(3, 5).t(), NONE)],
    "sparse_linear_backward": [
        (plain(2, 5), *CSR, plain(5, 3), 0b11),
        (plain(2, 5), *CSR, plain(5, 3), 0b01),
    ],
    "nll_elements_backward_": [(plain(*X), [plain(*X), plain(*X), plain(*X)], 1)],
}


# The op, the number of the call, and the checks of `opcheck`.
CALLS = [
    pytest.param(name, i, id=f"{name}-{call[0] if isinstance(call[0], str) else ''}{i}")
    for name, calls in OPS.items()
    for i, call in enumerate(calls)
]
CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


def skip_what_cannot_be_traced(name: str, check: str) -> None:
    """An exception for an op that writes to a list of tensors, because traces use the op without `_` instead."""
    if name.endswith("backward_") and check == "test_aot_dispatch_dynamic":
        pytest.skip("it is never traced")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "number"), CALLS)
def test_opcheck(name: str, number: int, check: str) -> None:
    skip_what_cannot_be_traced(name, check)
    torch.library.opcheck(getattr(torch.ops.fastvae, name).default, OPS[name][number], test_utils=check)


def test_every_op_has_a_check() -> None:
    names = {
        name.removeprefix("fastvae::")
        for name in torch._C._dispatch_get_all_op_names()
        if "fastvae::" in name
    }
    assert names == set(OPS)
