"""Autograd with PyTorch's other features: second derivatives, transforms, autocast, hooks, checkpoints, copies, DDP."""

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_autograd import BETA, CASES, ZERO, elbo_inputs, formula, gaussian, kl_divergence, make, make_elbo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvae
import fastvae.functional as fv

B = 5
WEIGHTS = torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0])


def close(actual: Tensor, expected: Tensor, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


# --- Second derivatives -----------------------------------------------------------------------------------------------

TWICE = {
    "nll": lambda a: fv.bernoulli_nll(a, torch.full_like(a, 0.3)),
    "kl": lambda a: fv.gaussian_kl(a, a / 2),
    "sample": lambda a: fv.reparameterize_kl(a, a / 2, eps=torch.ones_like(a))[0].square().flatten(),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize(
    "differentiate",
    [
        pytest.param(lambda y, a: y.backward(), id="backward"),
        pytest.param(torch.autograd.grad, id="autograd.grad"),
    ],
)
def test_second_derivative_raises(name: str, differentiate: Callable[[Tensor, Tensor], object]) -> None:
    a = torch.randn(B, 3, requires_grad=True)
    with fastvae.use_backend("native"):
        (first,) = torch.autograd.grad(TWICE[name](a).sum(), a, create_graph=True)
        (plain,) = torch.autograd.grad(TWICE[name](a).sum(), a)
    assert torch.equal(first.detach(), plain)  # create_graph alone does no harm
    with pytest.raises(RuntimeError, match=r"fastvae\.use_backend\(\"reference\"\)"):
        differentiate(first.sum(), a)


@pytest.mark.parametrize("name", TWICE)
def test_second_derivative_of_the_reference_is_correct(name: str) -> None:
    a = torch.randn(B, 3, dtype=torch.float64, requires_grad=True)
    with fastvae.use_backend("reference"):
        assert torch.autograd.gradgradcheck(TWICE[name], (a,))


def test_create_graph_gives_usable_gradients() -> None:
    """backward(create_graph=True) gives gradients that an optimiser can use."""
    inputs = elbo_inputs("bernoulli")
    with pytest.warns(UserWarning, match="create_graph=True"):
        make_elbo("bernoulli")(*inputs.values()).loss.backward(create_graph=True)
    leaves, (loss, _, _) = formula("bernoulli", "mean", inputs)
    loss.backward()
    close(inputs["recon"].grad.detach(), leaves["recon"].grad)


# --- torch.func, forward mode -----------------------------------------------------------------------------------------


def dual(a: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = fv.bernoulli_nll(
            torch.autograd.forward_ad.make_dual(a, torch.ones_like(a)), torch.zeros_like(a)
        )
        return torch.autograd.forward_ad.unpack_dual(out).tangent


LOSS = lambda a: fv.bernoulli_nll(a, torch.zeros_like(a)).sum()  # noqa: E731
# Each gives a number that must be the derivative of `LOSS`, or of its rows, in direction 1.
TRANSFORMS = {
    "grad": lambda a: torch.func.grad(LOSS)(a).sum(),
    "vmap of grad": lambda a: torch.func.vmap(torch.func.grad(LOSS))(a[:, None]).sum(),
    "jvp": lambda a: torch.func.jvp(LOSS, (a,), (torch.ones_like(a),))[1],
    "jacrev": lambda a: torch.func.jacrev(LOSS)(a).sum(),
    "forward_ad": lambda a: dual(a).sum(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_raise_and_name_the_reference(name: str) -> None:
    a = torch.randn(B, 3)
    with (
        fastvae.use_backend("native"),
        pytest.raises(RuntimeError, match=r"fastvae\.use_backend\(\"reference\"\)"),
    ):
        TRANSFORMS[name](a)
    with fastvae.use_backend("reference"):
        close(TRANSFORMS[name](a), torch.sigmoid(a).sum())


# --- It lives in PyTorch ----------------------------------------------------------------------------------------------


def test_grad_scaler_keeps_small_float16_gradients(backend: str) -> None:
    """float16 gradients of a mean over many rows stay accurate under a loss scale, because 1/B is applied after it."""
    n = 2048
    generator = torch.Generator().manual_seed(3)
    recon = torch.randn(n, 16, generator=generator).half()
    x = torch.sigmoid(recon.float() + 0.01 * torch.randn(n, 16, generator=generator))
    recon.requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    out = fastvae.ELBO("bernoulli")(recon, x, kl=torch.zeros(n))
    assert out.loss.dtype == torch.float32
    scaler.scale(out.loss).backward()
    exact = (torch.sigmoid(recon.detach().double()) - x.double()) / n * 2.0**15
    close(recon.grad, exact, rtol=1e-3, atol=2e-6)  # the smallest step of float16, times 2^15 / n
    assert (recon.grad == 0).double().mean() < 1e-3


def test_autocast_gives_float32(backend: str) -> None:
    torch.manual_seed(0)
    encoder, decoder, elbo = nn.Linear(12, 8), nn.Linear(4, 12), make_elbo("learned")
    x = torch.rand(B, 12)

    def run(fused: bool) -> list[Tensor]:
        for module in (encoder, decoder, elbo):
            module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            mu, logvar = encoder(x).chunk(2, dim=1)
            assert mu.dtype == torch.bfloat16
            eps = torch.ones_like(mu)
            if fused:
                z, kl = elbo.reparameterize(mu, logvar, eps=eps)
                out = elbo(decoder(z), x, kl=kl)
                assert z.dtype == torch.bfloat16
                assert {t.dtype for t in out} == {torch.float32}
                loss = out.loss
            else:
                z = mu + torch.exp(logvar / 2) * eps
                kl = kl_divergence(mu.float(), logvar.float(), ZERO, ZERO)
                recon = decoder(z.bfloat16()).float()
                loss = (gaussian(recon, x, elbo.likelihood.logvar.expand_as(recon)) + BETA * kl).mean()
        loss.backward()
        parameters = [encoder.weight, decoder.weight, elbo.likelihood.logvar]
        return [p.grad.clone() for p in parameters]

    for fused, eager in zip(run(True), run(False), strict=True):
        assert fused.dtype == torch.float32
        close(fused, eager, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("in_place", [False, True])
def test_tensor_hooks_see_and_replace_gradients(backend: str, in_place: bool) -> None:
    """A hook on the reconstruction sees the gradient, and the gradient that it returns (or writes) is passed on."""
    inputs = elbo_inputs("bernoulli")
    leaf = inputs["recon"]
    recon = leaf * 1
    seen = []

    def hook(grad: Tensor) -> Tensor | None:
        seen.append(grad.clone())
        if not in_place:
            return grad * 2
        grad.mul_(2)
        return None

    recon.register_hook(hook)
    elbo = make_elbo("bernoulli")
    elbo(recon, inputs["x"], inputs["mu"], inputs["logvar"]).loss.backward()
    leaves, (loss, _, _) = formula("bernoulli", "mean", inputs)
    loss.backward()
    close(seen[0], leaves["recon"].grad)
    close(leaf.grad, 2 * leaves["recon"].grad)


def test_module_hooks_are_called(backend: str) -> None:
    elbo, inputs, calls = make_elbo("bernoulli"), elbo_inputs("bernoulli"), []
    elbo.register_forward_hook(lambda module, args, out: calls.append(("forward", type(out))))
    elbo.register_full_backward_hook(
        lambda module, grad_in, grad_out: calls.append(("backward", grad_in[0].shape))
    )
    elbo(*inputs.values()).loss.backward()
    assert calls == [("forward", fastvae.ELBOOutput), ("backward", inputs["recon"].shape)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_gives_the_same_gradients(backend: str, use_reentrant: bool) -> None:
    """The recomputed forward draws the noise of the first one, and the gradients equal those without a checkpoint."""
    elbo, z_draws = make_elbo("bernoulli"), []

    def block(mu: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
        z, kl = elbo.reparameterize(mu, logvar)
        z_draws.append(z.detach().clone())
        return elbo(z * z, x, kl=kl).loss

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(5)
        mu, logvar = (torch.randn(B, 7, requires_grad=True) for _ in range(2))
        (2 * run(mu, logvar, torch.rand(B, 7))).backward()
        return [mu.grad, logvar.grad]

    plain = gradients(block)
    z_draws.clear()
    again = gradients(lambda *args: checkpoint(block, *args, use_reentrant=use_reentrant))
    assert len(z_draws) == 2
    assert torch.equal(z_draws[0], z_draws[1])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("likelihood", ["bernoulli", "learned", "per_element"])
def test_saved_tensors_hooks_give_the_same_gradients(likelihood: str) -> None:
    """All saved tensors pass through the hooks, and come back from another place."""
    elbo, inputs = make_elbo(likelihood), elbo_inputs(likelihood)
    requested = [v for v in inputs.values() if v.requires_grad]
    plain = torch.autograd.grad(3 * elbo(*inputs.values()).loss, requested)
    packed = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index].clone()):
        loss = elbo(*inputs.values()).loss
    assert any(t.shape == inputs["recon"].shape for t in packed)
    with torch.autograd.graph.save_on_cpu():
        on_cpu = elbo(*inputs.values()).loss
    for hooked in (loss, on_cpu):
        again = torch.autograd.grad(3 * hooked, requested)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_give_the_same_values(backend: str, mode: Callable[[], object]) -> None:
    elbo, inputs = make_elbo("bernoulli"), elbo_inputs("bernoulli")
    expected = elbo(*inputs.values())
    with mode():
        out = elbo(*inputs.values())
        z, kl = elbo.reparameterize(inputs["mu"], inputs["logvar"], eps=torch.zeros(B, 7))
    for actual, want in zip(out, expected, strict=True):
        assert torch.equal(actual, want.detach())
        assert not actual.requires_grad
    assert torch.equal(z, inputs["mu"].detach())
    assert not z.requires_grad
    assert not kl.requires_grad


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copied_elbo_gives_the_same_loss_and_shares_nothing(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    """A copy computes the same and shares nothing: training it or changing its beta does not affect the original."""
    elbo, inputs = make_elbo("learned", "sum"), elbo_inputs("learned")
    with torch.no_grad():
        elbo.likelihood.logvar.fill_(0.4)
    twin = duplicate(elbo)
    expected = elbo(*inputs.values()).loss
    assert torch.equal(twin(*inputs.values()).loss, expected)
    twin.beta = 0.0
    with torch.no_grad():
        twin.likelihood.logvar.fill_(1.0)
    assert torch.equal(elbo(*inputs.values()).loss, expected)
    assert not torch.equal(twin(*inputs.values()).loss, expected)


@pytest.mark.parametrize("name", CASES)
def test_deterministic_algorithms_leave_no_element_unwritten(name: str) -> None:
    """This mode fills new memory with NaN, so it shows whether every element of every result is written."""
    case = CASES[name]
    torch.use_deterministic_algorithms(True)
    try:
        inputs = {k: v.requires_grad_(k in case.differentiable) for k, v in make(case).items()}
        (case.fused(*inputs.values()) * WEIGHTS).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(inputs[key].grad.isfinite().all() for key in case.differentiable)


DDP = """
import datetime, os, sys, torch, fastvae
from torch import distributed as dist, nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian("learned"))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = self.elbo.reparameterize(mu, logvar, eps=torch.ones_like(mu))
        return self.elbo(self.decoder(z), x, kl=kl)

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
data = torch.arange(48.0).view(8, 6) / 48
wrapped = nn.parallel.DistributedDataParallel(Model())
wrapped(data[rank * 4 : rank * 4 + 4]).loss.backward()
whole = Model()
whole(data).loss.backward()
for (name, mine), want in zip(wrapped.module.named_parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(mine.grad, want.grad, rtol=1e-5, atol=1e-6, msg=name)
assert wrapped.module.elbo.likelihood.logvar.grad.abs() > 0
dist.destroy_process_group()
os._exit(0)  # not through the end of the interpreter, which now and then aborts on threads of gloo that still run
"""


@pytest.mark.slow
def test_ddp_gives_the_gradients_of_one_process(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Two processes with half a batch each get the gradients of the whole batch, including that of the learned
    scale."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    command = [sys.executable, "-c", DDP]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize("prior", [None, -90.0, math.nan], ids=["standard", "overflows", "nan"])
def test_gradient_of_z_alone_excludes_the_kl(backend: str, prior: float | None) -> None:
    """The gradient does not even contain 0 times an infinite one."""
    mu = torch.zeros(2, 5, requires_grad=True)
    logvar = torch.full((2, 5), 90.0 if prior is None else 0.0, requires_grad=True)
    priors = [] if prior is None else [torch.zeros(2, 5), torch.full((2, 5), prior)]
    z, _ = fv.reparameterize_kl(mu, logvar, *priors, eps=torch.ones(2, 5))
    by_mu, by_logvar = torch.autograd.grad(z.sum(), [mu, logvar])
    close(by_mu, torch.ones(2, 5))
    close(by_logvar, 0.5 * torch.exp(0.5 * logvar.detach()))


def test_training_step_equals_that_of_tutorials(backend: str) -> None:
    """The loss of many tutorials, with its gradients through encoder and decoder."""
    torch.manual_seed(4)
    encoder, decoder = nn.Linear(12, 8), nn.Sequential(nn.Linear(4, 12), nn.Sigmoid())
    x = torch.rand(B, 12)

    def step(loss: Callable[..., Tensor]) -> list[Tensor]:
        mu, logvar = encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * torch.full_like(mu, 0.3)
        parameters = [*encoder.parameters(), *decoder.parameters()]
        return list(torch.autograd.grad(loss(z, mu, logvar), parameters))

    def tutorial(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        bce = F.binary_cross_entropy(decoder(z), x, reduction="sum")
        return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    elbo = fastvae.ELBO("bernoulli", reduction="sum")
    fused = step(lambda z, mu, logvar: elbo(decoder[0](z), x, mu, logvar).loss)
    for actual, expected in zip(fused, step(tutorial), strict=True):
        close(actual, expected, rtol=1e-4, atol=1e-5)
