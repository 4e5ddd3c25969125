"""The CUDA kernels of the native backend, and `graph_step`, on a GPU.

The tests of values, layouts, noise and autograd in test_triton.py and test_triton_counts.py run again on these kernels.
This file tests what only they guarantee. Tests that need no GPU are in test_cuda_kernels.py, test_cuda_code.py and
cuda_link.py.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cases
import pytest
import test_counts
import test_mixture
import test_multinomial
import test_nb_mixture
import test_sparse
import torch
from cases import CASES, Case
from conftest import INTERPRETED
from test_autograd import make_elbo
from test_compile import OPS
from test_triton import (
    move,
    moved,
    step,
    step_inputs,
    test_against_the_reference,
    test_backward_generates_the_same_noise,
    test_backward_returns_the_saved_gradient,
    test_categorical_nll_equals_cross_entropy,
    test_channels_last_equals_contiguous,
    test_chunks_of_a_head_equal_copies,
    test_compiled_draws_are_not_merged,
    test_compiled_elbo_is_one_graph,
    test_counts_nll_equals_the_formula,
    test_discretized_nll_equals_the_formula,
    test_elbo_objectives_equal_the_formula,
    test_empty_gene_with_a_large_mean_is_accurate,
    test_errors_have_the_same_messages_as_native,
    test_forms_of_the_scale_at_their_ends_equal_the_formula,
    test_forms_of_the_scale_equal_the_formula,
    test_gaussian_kl_near_collapse_is_accurate,
    test_gaussian_mixture_equals_the_formula,
    test_graph_replays_draw_fresh_noise,
    test_kl_on_the_grid_of_extremes_equals_the_limits,
    test_log_probs_equal_the_formula,
    test_log_q_at_the_ends_equals_the_formula,
    test_manual_seed_and_generator_determine_the_noise,
    test_mixture_nll_of_large_logits_is_accurate,
    test_multinomial_nll_equals_the_formula,
    test_nan_affects_only_its_row,
    test_nll_elements_of_counts_equal_the_formula,
    test_nll_of_extremes_is_finite,
    test_nll_of_long_and_many_rows_equals_the_formula,
    test_nll_of_more_than_2_31_elements_is_correct,
    test_nll_of_saturated_rows_is_accurate,
    test_nll_on_the_grid_of_extreme_counts_equals_the_limits,
    test_nll_on_the_grid_of_extremes_equals_the_limits,
    test_noise_depends_only_on_its_position,
    test_noise_equals_box_muller_by_hand,
    test_noise_equals_that_of_the_cpu,
    test_op_on_a_second_stream_runs_there,
    test_reparameterize_kl_equals_the_formula,
    test_reparameterize_kl_of_long_and_many_rows_equals_the_formula,
    test_second_derivative_raises,
    test_slices_and_expanded_data_equal_copies,
    test_target_of_any_dtype_equals_the_formula,
    test_training_step_does_not_synchronise,
    test_training_step_peak_memory_is_one_gradient,
    test_values_and_gradients_equal_the_formula,
    test_weighted_elements_equal_the_formula,
    test_weighted_families_equal_the_formula,
)
from test_triton_counts import (
    test_multinomial_of_many_parts_equals_the_formula,
    test_row_with_columns_out_of_order_or_range_is_nan,
    test_rows_of_many_parts_equal_the_formula,
)
from torch import Tensor

import fastvae
from fastvae import functional
from fastvae.backends import available, choose, for_tensor


def why_not() -> str | None:
    if INTERPRETED or not torch.cuda.is_available():
        return "the CUDA kernels need a GPU"
    if available.load("native") is None or not available.serves("native", "cuda"):
        return f"no CUDA kernels: {available.reason('native', 'cuda')}"
    return None


# This file is also imported without a GPU, by test_on_meta.py.
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SHARED = (
    test_op_on_a_second_stream_runs_there,
    test_against_the_reference,
    test_categorical_nll_equals_cross_entropy,
    test_channels_last_equals_contiguous,
    test_chunks_of_a_head_equal_copies,
    test_discretized_nll_equals_the_formula,
    test_compiled_draws_are_not_merged,
    test_errors_have_the_same_messages_as_native,
    test_nll_of_extremes_is_finite,
    test_nll_on_the_grid_of_extremes_equals_the_limits,
    test_kl_on_the_grid_of_extremes_equals_the_limits,
    test_log_probs_equal_the_formula,
    test_log_q_at_the_ends_equals_the_formula,
    test_graph_replays_draw_fresh_noise,
    test_mixture_nll_of_large_logits_is_accurate,
    test_multinomial_nll_equals_the_formula,
    test_nll_of_long_and_many_rows_equals_the_formula,
    test_reparameterize_kl_of_long_and_many_rows_equals_the_formula,
    test_nll_of_more_than_2_31_elements_is_correct,
    test_nan_affects_only_its_row,
    test_forms_of_the_scale_at_their_ends_equal_the_formula,
    test_forms_of_the_scale_equal_the_formula,
    test_gaussian_kl_near_collapse_is_accurate,
    test_gaussian_mixture_equals_the_formula,
    test_training_step_does_not_synchronise,
    test_noise_equals_box_muller_by_hand,
    test_elbo_objectives_equal_the_formula,
    test_compiled_elbo_is_one_graph,
    test_training_step_peak_memory_is_one_gradient,
    test_reparameterize_kl_equals_the_formula,
    test_nll_of_saturated_rows_is_accurate,
    test_second_derivative_raises,
    test_manual_seed_and_generator_determine_the_noise,
    test_slices_and_expanded_data_equal_copies,
    test_target_of_any_dtype_equals_the_formula,
    test_backward_generates_the_same_noise,
    test_noise_depends_only_on_its_position,
    test_noise_equals_that_of_the_cpu,
    test_backward_returns_the_saved_gradient,
    test_values_and_gradients_equal_the_formula,
    test_weighted_elements_equal_the_formula,
    test_weighted_families_equal_the_formula,
    test_counts_nll_equals_the_formula,
    test_empty_gene_with_a_large_mean_is_accurate,
    test_nll_elements_of_counts_equal_the_formula,
    test_nll_on_the_grid_of_extreme_counts_equals_the_limits,
    test_multinomial_of_many_parts_equals_the_formula,
    test_row_with_columns_out_of_order_or_range_is_nan,
    test_rows_of_many_parts_equal_the_formula,
)


@pytest.fixture
def device() -> Iterator[torch.device]:
    with fastvae.use_backend("native"):
        yield torch.device("cuda")


# ---------------------------------------------------------------------------------------------------------------------
# The ops
# ---------------------------------------------------------------------------------------------------------------------


def test_auto_selects_the_cuda_kernels() -> None:
    assert for_tensor(torch.empty(1, device="cuda")).name == "native"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (name, i)
        for name, rows in OPS.items()
        for i in range(len(rows))
        if not name.startswith("sparse_linear")  # torch's on a GPU
    ],
)
def test_opcheck(device: torch.device, name: str, row: int) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "nll_backward_":
        checks.remove("test_aot_dispatch_dynamic")  # see test_compile.py
    args = tuple(moved(argument, device) for argument in OPS[name][row])
    torch.library.opcheck(getattr(torch.ops.fastvae, name).default, args, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=cases.ids)
@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_other_backends_give_the_same_results(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    """The native kernels of the CPU and Triton's compute the same formulas, so only the last digits differ."""
    inputs = cases.cast(case.inputs((6, 3, 7, 5)), dtype)
    ours = cases.run(case, functional, move(inputs, device))
    others = [cases.run(case, functional, inputs)]
    if available.load("triton") is not None:
        with fastvae.use_backend("triton"):
            others.append(cases.run(case, functional, move(inputs, device)))
    close = {"rtol": cases.GRADIENT_TOLERANCE[dtype], "atol": 1e-6 if dtype != torch.float64 else 1e-13}
    for theirs in others:
        torch.testing.assert_close(ours.value.cpu(), theirs.value.cpu(), rtol=1e-5, atol=1e-5)
        for name, gradient in ours.gradients.items():
            torch.testing.assert_close(gradient.cpu(), theirs.gradients[name].cpu(), **close)


def test_op_with_a_tensor_on_another_device_raises(device: torch.device) -> None:
    """Also in the op itself, because a kernel that follows a CPU pointer makes the GPU unusable for the process."""
    recon, x = torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device)
    for kl, beta, name in (
        (torch.zeros(2), None, "kl"),
        (torch.zeros(2, device=device), torch.ones(()), "beta"),
    ):
        with pytest.raises(ValueError, match=f"fastvae: `{name}` must be on cuda:0, got cpu"):
            torch.ops.fastvae.nll("bernoulli", [recon], x, [], kl, beta, 2)
    with pytest.raises(ValueError, match="`seed` must be on cuda:0, got cpu"):
        torch.ops.fastvae.reparameterize_kl(
            recon, x, None, None, "logvar", [], None, False, None, torch.tensor([1, 2]), 0, None, None
        )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_op_on_another_than_the_current_device_runs_there(device: torch.device) -> None:
    elbo, leaves, x = step_inputs()
    torch.manual_seed(3)
    want = step(elbo, leaves, x)
    other = [leaf.detach().to("cuda:1").requires_grad_() for leaf in leaves]
    torch.manual_seed(3)
    got = step(elbo.to("cuda:1"), other, x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("likelihood", ["bernoulli", "learned", "poisson", "mine"])
def test_elbo_not_moved_to_the_gpu_moves_beta_once(device: torch.device, likelihood: str) -> None:
    """`beta` moves in the first step. Later steps copy nothing, do not wait, and can be captured."""

    class Mine(torch.nn.Module):
        def nll(self, params: Tensor, target: Tensor) -> Tensor:
            return (params - target).square().flatten(1).sum(1)

    if likelihood == "learned":  # moving its parameter is the user's task
        elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian("learned").to(device))
    else:
        elbo = fastvae.ELBO(Mine() if likelihood == "mine" else likelihood)
    moved_beta, moved = elbo.beta, copy.deepcopy(elbo).to(device)
    _, leaves, x = step_inputs()
    x = (5 * x).round() if likelihood == "poisson" else x

    def loss_of(elbo: fastvae.ELBO) -> Tensor:
        loss = elbo(leaves[0], x, leaves[1], leaves[2]).loss
        loss.backward()
        return loss.detach()

    loss_of(elbo)
    assert elbo.beta is moved_beta
    assert moved_beta.is_cuda
    with waiting_is_an_error():
        loss_of(elbo)
        moved_beta.fill_(0.5)
        loss = loss_of(elbo)
    moved.beta = 0.5
    torch.testing.assert_close(loss, loss_of(moved))
    names = kernels_of(lambda: loss_of(elbo))
    # A likelihood of the user may copy on the GPU, as this one's backward does.
    assert not [name for name in names if name.startswith("Memcpy") and "DtoD" not in name], names

    fresh = copy.deepcopy(elbo).cpu()
    fresh.likelihood.to(device)
    run = fastvae.graph_step(
        lambda x: fresh(leaves[0].detach(), x, leaves[1].detach(), leaves[2].detach()).loss, x, warmup=1
    )
    for beta in (1.0, 0.25, 4.0, 0.5):
        fresh.beta = moved.beta = beta
        torch.testing.assert_close(run(x), moved(leaves[0], x, leaves[1], leaves[2]).loss.detach())
    # A call on the CPU in between leaves beta where the graph reads it.
    fresh.likelihood.cpu()
    if likelihood != "mine":
        fresh(*(leaf.detach().cpu() for leaf in (leaves[0], x, leaves[1], leaves[2])))
    assert fresh.beta.is_cuda


def test_plain_tensors_use_the_fast_path(device: torch.device) -> None:
    """Calls that do not fit go to the checks, which have messages for them."""
    _, (recon, mu, logvar), x = step_inputs()
    assert choose.fast_path.reparameterize_kl(mu, logvar, "logvar", [], False) is not None
    assert choose.fast_path.nll("bernoulli", [recon], x, [], None, None, 0, None) is not None
    assert choose.fast_path.nll("bernoulli", [recon], x.cpu(), [], None, None, 0, None) is None
    assert (
        choose.fast_path.nll(
            "bernoulli", [recon], x, [], torch.ones(128, device=device), torch.ones(()), 2, None
        )
        is None
    )
    with pytest.raises(ValueError, match="`target` must be on the device of `logits`, cuda:0, got cpu"):
        functional.bernoulli_nll(recon, x.cpu())
    with fastvae.use_backend("reference"):
        assert choose.fast_path is None


def test_call_without_seed_draws_the_same_seed_on_every_backend(device: torch.device) -> None:
    """Triton and the reference draw the same seed, and each backend repeats itself."""
    zeros, z_of_backend = torch.zeros(4, 9, device=device), {}
    for name in ("native", "triton", "reference"):
        if available.load(name) is None:
            continue
        with fastvae.use_backend(name):
            for again in (False, True):
                torch.manual_seed(5)
                z = functional.reparameterize_kl(zeros, zeros)[0]
                assert not again or torch.equal(z, z_of_backend[name])
                z_of_backend[name] = z
    if "triton" in z_of_backend:
        torch.testing.assert_close(z_of_backend["triton"], z_of_backend["reference"], rtol=1e-5, atol=1e-5)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_concurrent_launches_on_many_streams_give_the_same_results(device: torch.device) -> None:
    """The blocks of one launch must not change the counter of another launch."""
    recon, x = torch.randn(64, 40_000, device=device), torch.rand(64, 40_000, device=device)
    kl, elbo = torch.rand(64, device=device), make_elbo("bernoulli").to(device)
    want = elbo(recon, x, kl=kl).loss
    streams = [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    losses = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                losses.append(elbo(recon, x, kl=kl).loss)
    torch.cuda.synchronize()
    assert all(torch.equal(loss, want) for loss in losses)


@pytest.mark.parametrize("weights", test_mixture.WEIGHTS)
def test_gaussian_mixture_gives_the_same_bits_every_time(device: torch.device, weights: str) -> None:
    """With more items than the device runs at a time."""
    inputs = [x.to(device) for x in test_mixture.make((1024, 1000, 64), weights, torch.float32)]
    first, *others = (
        test_mixture.results(functional.gaussian_mixture_log_prob, inputs, "both") for _ in range(5)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ids)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_nb_mixture_nll_equals_the_formula(
    device: torch.device, layout: str, weighted: bool, shared: bool, dtype: torch.dtype
) -> None:
    inputs, target = test_nb_mixture.make(3, 1300, dtype, shared)
    data = (target.to_sparse_csr() if layout == "csr" else target).to(device)
    inputs, target = {name: x.to(device) for name, x in inputs.items()}, target.to(device)
    weight = 0.5 + torch.rand(1, 1300, device=device) if weighted else None
    factors = torch.arange(1.0, 4.0, device=device)
    found = test_nb_mixture.evaluate(inputs, data, factors, weight=weight)
    test_nb_mixture.check(found, test_nb_mixture.wanted(inputs, target, factors, weight), dtype)
    if layout == "dense":
        elements = functional.negative_binomial_mixture_nll(
            **inputs, target=target, reduction="none", weight=weight
        )
        torch.testing.assert_close(elements.sum(1), found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["multinomial", "negative_binomial_mixture", *test_counts.FORMS])
@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("shape", [(3, 50_000), (400, 2500), (3000, 300)], ids=str)
def test_counts_give_the_same_bits_every_time(
    device: torch.device, form: str, layout: str, shape: tuple[int, int]
) -> None:
    """With rows in parts, one for each block, and one for each warp."""
    if form == "multinomial":
        logits, target = test_multinomial.make(*shape)
        inputs = {"logits": logits}
    elif form == "negative_binomial_mixture":
        inputs, target = test_nb_mixture.make(*shape)
    else:
        inputs = test_counts.make(form, *shape)
        target = inputs.pop("target")
    data = (target.to_sparse_csr() if layout == "csr" else target).to(device)
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}

    def run() -> list[Tensor]:
        nll = getattr(functional, f"{form}_nll")(**leaves, target=data)
        return [nll.detach(), *torch.autograd.grad(nll.sum(), list(leaves.values()))]

    first, *others = (run() for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=cases.ids)
@pytest.mark.parametrize("log1p", [False, True])
def test_sparse_linear_equals_the_formula(device: torch.device, log1p: bool, dtype: torch.dtype) -> None:
    """torch's own product, whose last bits may differ from run to run."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    module = test_sparse.layer(dtype=wide, log1p=log1p)
    counts, upstream = test_sparse.counts(40).clamp(max=255), torch.randn(40, 130, dtype=wide)
    truth, truth_gradient = test_sparse.exact(counts, module, upstream, log1p)
    csr = counts.to_sparse_csr().to(device)
    x = torch.sparse_csr_tensor(csr.crow_indices(), csr.col_indices(), csr.values().to(dtype), csr.shape)
    module, tolerance = module.to(device), 2e-6 if wide == torch.float32 else 1e-14
    for _ in range(3):
        module.zero_grad()
        y = module(x)
        y.backward(upstream.to(device))
        assert y.dtype == wide
        assert test_sparse.error(y.cpu(), truth) < tolerance
        assert test_sparse.error(module.weight.grad.cpu(), truth_gradient) < tolerance
        assert test_sparse.error(module.bias.grad.cpu(), upstream.double().sum(0)) < tolerance


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels, copies and memsets that the GPU runs."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("likelihood", ["bernoulli", "learned", "per_element"])
def test_training_step_launches_four_kernels(device: torch.device, likelihood: str) -> None:
    """Sample, nll and a backward of each. Autograd's fill of the root gradient is not ours."""
    _, leaves, x = step_inputs()
    elbo = make_elbo(likelihood).to(device)
    recon, mu, logvar = leaves
    if likelihood == "per_element":
        recon = torch.randn(128, 2 * 784, device=device, requires_grad=True)
    weight = torch.randn(128, 20, device=device)

    def call() -> None:
        z, kl = elbo.reparameterize(mu, logvar)
        loss = elbo(recon, x, kl=kl).loss
        torch.autograd.grad((loss, z), [recon, mu, logvar, *elbo.parameters()], (None, weight))

    names = kernels_of(call)
    ours = [name for name in names if "fastvae" in name]
    assert len(ours) == 4, names
    rest = [name for name in names if name not in ours]
    assert all("FillFunctor" in name for name in rest), names


def test_forward_without_gradient_launches_two_kernels(device: torch.device) -> None:
    elbo, leaves, x = step_inputs()
    with torch.no_grad():
        names = kernels_of(lambda: elbo(leaves[0], x, kl=elbo.reparameterize(leaves[1], leaves[2])[1]))
    assert len(names) == 2, names


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------

FIRST = """
import torch, fastvae
fastvae.set_backend("native")
elbo = fastvae.ELBO("bernoulli").cuda()
elbo._first_batch_checked = True
recon, x = torch.randn(64, 40_000, device="cuda"), torch.rand(64, 40_000, device="cuda")
kl = torch.rand(64, device="cuda")
with torch.no_grad():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = elbo(recon, x, kl=kl).loss
    for _ in range(3):
        recon.add_(1.0)
        graph.replay()
        seen = loss.clone()
        assert torch.equal(seen, elbo(recon, x, kl=kl).loss), (seen, elbo(recon, x, kl=kl).loss)
"""


def test_first_call_can_be_captured() -> None:
    """Memory that the kernels keep for later calls must not belong to the graph."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
def test_graph_replays_the_loss_of_counts(device: torch.device, sparse: bool) -> None:
    """With the current logits and counts."""
    elbo = fastvae.ELBO(fastvae.likelihoods.ZeroInflatedNegativeBinomial(600)).to(device)
    leaves = [torch.randn(64, 600, device=device, requires_grad=True) for _ in range(2)]
    counts = torch.poisson(torch.rand(64, 600, device=device))
    data, kl, library = (
        counts.to_sparse_csr() if sparse else counts,
        torch.rand(64, device=device),
        counts.sum(1),
    )

    def step() -> list[Tensor]:
        loss = elbo((leaves[0], library, leaves[1]), data, kl=kl).loss
        return [loss.detach(), *torch.autograd.grad(loss, [*leaves, *elbo.parameters()])]

    with fastvae.use_backend("native"):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            with torch.no_grad():
                leaves[0].add_(torch.randn_like(leaves[0]))
                (data.values() if sparse else data).add_(1.0)
            graph.replay()
            for replayed, eager in zip(captured, step(), strict=True):
                assert torch.equal(replayed, eager)


class Vae(torch.nn.Module):
    def __init__(self, likelihood: str = "bernoulli") -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(784, 40), torch.nn.Linear(20, 784)
        self.elbo = make_elbo(likelihood)

    def forward(self, x: Tensor) -> fastvae.ELBOOutput:
        z, kl = self.elbo.reparameterize(*self.encoder(x).chunk(2, 1))
        return self.elbo(self.decoder(z), x, kl=kl)


def trainer(device: torch.device, **options: Any) -> tuple[Vae, Callable[[Tensor], fastvae.ELBOOutput]]:
    torch.manual_seed(1)
    model = Vae(**options).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True, fused=True)

    def train_step(x: Tensor) -> fastvae.ELBOOutput:
        optimizer.zero_grad()
        out = model(x)
        out.loss.backward()
        optimizer.step()
        return out

    return model, train_step


def batches(device: torch.device, count: int, rows: int = 128) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(9)
    return [0.2 * torch.rand(rows, 784, device=device, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("likelihood", ["bernoulli", "learned"])
@pytest.mark.parametrize("name", ["native", "triton", "reference"])
def test_graph_step_replays_equal_eager_steps(device: torch.device, name: str, likelihood: str) -> None:
    """200 steps from one seed, including noise, and exactly as many steps as calls."""
    if name != "reference" and available.load(name) is None:
        pytest.skip(available.missing[name])
    losses = []
    with fastvae.use_backend(name):
        for graphed in (False, True):
            _, run = trainer(device, likelihood=likelihood)
            if graphed:
                run = fastvae.graph_step(run, torch.empty(128, 784, device=device))
            torch.manual_seed(2)
            losses.append(torch.stack([run(x).loss.detach().clone() for x in batches(device, 200)]))
    eager, replayed = losses
    assert eager[-1] < 0.9 * eager[0]
    torch.testing.assert_close(replayed, eager, rtol=2e-4, atol=0.05)
    torch.testing.assert_close(replayed[:20], eager[:20], rtol=1e-5, atol=1e-3)


def test_graph_step_replay_draws_fresh_noise_and_follows_beta(device: torch.device) -> None:
    elbo = fastvae.ELBO("gaussian").to(device)
    zeros = torch.zeros(64, 20, device=device)

    def draw(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, kl = elbo.reparameterize(zeros, x)
        out = elbo(zeros, zeros, kl=kl)
        return z, out.loss, (out.nll + elbo.beta * out.kl).mean()

    run = fastvae.graph_step(draw, zeros, warmup=1)
    x, seen = torch.ones_like(zeros), []
    for beta in (1.0, 1.0, 0.25, 4.0):
        elbo.beta = beta
        z, loss, want = run(x)
        seen.append(z.clone())
        torch.testing.assert_close(loss, want)
        assert torch.equal(elbo.beta.cpu(), torch.tensor(beta))
    assert len({tuple(z.flatten()[:4].tolist()) for z in seen}) == 4
    state = torch.cuda.get_rng_state()
    first = run(x)[0].clone()
    torch.cuda.set_rng_state(state)
    assert torch.equal(run(x)[0], first)


def test_graph_step_with_generators_draws_their_noise(device: torch.device) -> None:
    zeros = torch.zeros(8, 20, device=device)
    generator = torch.Generator(device).manual_seed(4)
    other = torch.Generator(device).manual_seed(4)
    run = fastvae.graph_step(
        lambda x: functional.reparameterize_kl(x, x, generator=generator)[0], zeros, generators=[generator]
    )
    for _ in range(6):
        want = functional.reparameterize_kl(zeros, zeros, generator=other)[0]
        assert torch.equal(run(zeros), want)


def test_graph_step_survives_the_graphs_of_torch_compile(device: torch.device) -> None:
    """torch.compile frees the workspaces of cuBLAS before and after each graph that it records, and the memory that it
    frees is unmapped."""
    results = []
    for graphed in (False, True):
        _, run = trainer(device)
        if graphed:
            run = fastvae.graph_step(run, torch.empty(128, 784, device=device))
        torch.manual_seed(2)
        for i, x in enumerate(batches(device, 12)):
            loss = run(x).loss.clone()
            if i == 5:
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()
        results.append(loss)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2)


def test_graph_step_accepts_cpu_batches_and_refuses_other_shapes(device: torch.device) -> None:
    """CPU batches are copied. A batch of another size is refused, but `step_fn` itself accepts it."""
    results = []
    for graphed in (False, True):
        model, eager = trainer(device)
        run = fastvae.graph_step(eager, torch.empty(128, 784, device=device)) if graphed else eager
        torch.manual_seed(2)
        for i, x in enumerate(batches(device, 12)):
            run(x.cpu().pin_memory() if graphed and i % 2 else x)
            if i == 8:
                odd = batches(device, 1, rows=37)[0]
                if graphed:
                    with pytest.raises(ValueError, match=r"\(128, 784\), float32, got \(37, 784\), float32"):
                        run(odd)
                eager(odd)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_graph_step_with_an_optimiser_that_is_not_capturable_raises(device: torch.device) -> None:
    weight = torch.ones(3, device=device, requires_grad=True)
    adam = torch.optim.Adam([weight])

    def train_step(x: Tensor) -> Tensor:
        loss = (weight * x).sum()
        loss.backward()
        adam.step()
        return loss

    with pytest.raises(RuntimeError, match=r"graph_step: `capturable` of Adam must be True"):
        fastvae.graph_step(train_step, torch.ones(3, device=device))(torch.ones(3, device=device))
    assert torch.equal(weight.detach().cpu(), torch.ones(3))


WAITS = """
import torch, fastvae
step = fastvae.graph_step(lambda x: x * x.sum().item(), torch.ones(3, device="cuda"), warmup=1)
x = torch.ones(3, device="cuda")
assert torch.equal(step(x), 3 * x)
try:
    step(x)
except RuntimeError as error:
    print(error)
"""


def test_graph_step_with_a_synchronisation_raises() -> None:
    """This runs in a separate process, because a broken capture could affect other tests."""
    done = subprocess.run(
        [sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fastvae.graph_step: the step cannot be captured as a CUDA graph: " in done.stdout
    assert ".item()" in done.stdout


def test_graph_step_under_autocast_gives_the_losses_of_eager(device: torch.device) -> None:
    """Weights that were cast once, before the capture, would not change any more."""
    losses = []
    for graphed in (False, True):
        _, run = trainer(device)
        if graphed:
            run = fastvae.graph_step(run, torch.empty(128, 784, device=device))
        torch.manual_seed(2)
        with torch.autocast("cuda", torch.bfloat16):
            for x in batches(device, 30):
                loss = run(x).loss
                if not graphed:
                    torch.clear_autocast_cache()
        losses.append(loss.clone())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
