"""The categorical likelihood: values, gradients, padding, errors, and the requirements for every op."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae import functional, reference
from fastvae.backends import OPS, Backend, choose
from fastvae.likelihoods import Categorical

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VALUE = {torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6, torch.float64: 1e-13}
GRADIENT = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-13}
# The block of the CPU kernel is 1024 elements, and its widest vector 16.
SHAPES = (
    (1, 1),
    (3, 1),
    (4, 7),
    (2, 5, 17),
    (3, 4, 1025),
    (2, 3, 4099),
    (3, 1024),
    (2, 3, 4, 5),
    (4, 1, 3),
    (2, 0, 5),
    (0, 3, 5),
)


def data(shape: tuple[int, ...], dtype: torch.dtype, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """Logits, and classes of which every third is ignored."""
    logits = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, shape[-1], shape[:-1])
    target.view(-1)[1::3] = ignored
    return logits, target


def exact(logits: Tensor, target: Tensor, ignored: int = -100) -> Tensor:
    """The loss in float64, computed by torch."""
    each = F.cross_entropy(
        logits.double().flatten(0, -2), target.flatten(), reduction="none", ignore_index=ignored
    )
    return each.view(target.shape).flatten(1).sum(1) if target.dim() > 1 else each


def rows_weights(rows: int) -> Tensor:
    return 0.5 + (torch.arange(rows, dtype=torch.float64) * 0.618) % 1


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_cross_entropy(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, target = data(shape, dtype)
    leaf, leaf64 = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = functional.categorical_nll(leaf, target)
    assert got.shape == shape[:1]
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weights = rows_weights(shape[0])
    (gradient,) = torch.autograd.grad(got, leaf, weights.to(got.dtype))
    assert gradient.dtype == dtype
    assert gradient.shape == shape
    if target.numel() == 0:
        assert not got.any()
        return
    want = exact(leaf64, target)
    (want_gradient,) = torch.autograd.grad(want, leaf64, weights)
    assert ((got.double() - want).abs() <= VALUE[dtype] * (1 + want.abs())).all()
    error = (gradient.double() - want_gradient).abs()
    step = 2.0**-24 if dtype == torch.float16 else 0.0
    assert (error <= GRADIENT[dtype] * want_gradient.abs() + VALUE[dtype] + step).all()


HARD = (
    # The target's logit is the first one.
    (30.0, 0.0, -1.0),
    (50.0, 0.0, 1.0),
    (-30.0, 0.0, 1.0),
    (0.0, 0.0, 0.0),
    (1e4, -1e4, 0.0),
    (-1e4, 1e4, 0.0),
    (88.0, 88.5, -88.0),
    (1e-4, -1e-4, 0.0),
    (3.0, -math.inf, 2.0),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", HARD, ids=str)
def test_nll_at_extreme_logits_equals_60_digits(
    native: None, logits: tuple[float, ...], dtype: torch.dtype
) -> None:
    """Compared with 60 digits: a confident prediction keeps the digits of its nll and of p - 1."""
    mpmath.mp.dps = 60
    a = torch.tensor([logits]).to(dtype)
    values = [mpmath.mpf(x) if math.isfinite(x) else mpmath.mpf("-inf") for x in a.double()[0].tolist()]
    parts = [mpmath.exp(x - values[0]) if mpmath.isfinite(x) else mpmath.mpf(0) for x in values]
    total = sum(parts)
    want = float(mpmath.log(total))
    grads = [float((part - (i == 0) * total) / total) for i, part in enumerate(parts)]
    leaf = a.requires_grad_()
    nll = functional.categorical_nll(leaf, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(nll, leaf, torch.ones_like(nll))
    rtol = 1e-13 if dtype == torch.float64 else 2e-6
    assert nll.item() == pytest.approx(want, rel=rtol, abs=1e-37)
    # A grad below the smallest normal number of its dtype has no digits, and expf of less than -87 is 0.
    smallest = {torch.float16: 2.0**-24, torch.float64: 1e-300}.get(dtype, 1e-37)
    coarse = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 5e-6}.get(dtype, 1e-13)
    assert gradient[0].tolist() == pytest.approx(grads, rel=coarse, abs=smallest)


def test_nll_is_at_least_as_accurate_as_eager(native: None) -> None:
    logits, target = data((64, 9, 3000), torch.float32)
    logits = 4 * logits
    want = exact(logits, target)
    eager = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(64, 9).sum(1)
    ours = functional.categorical_nll(logits, target)
    assert (ours - want).abs().max() <= (eager - want).abs().max() + 5e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignored", [-100, 0, 3, -1], ids=str)
def test_ignored_positions_add_nothing(backend: str, ignored: int, dtype: torch.dtype) -> None:
    logits, target = data((4, 6, 11), dtype, ignored)
    target[2] = ignored  # ignores a whole row
    leaf = logits.requires_grad_()
    nll = functional.categorical_nll(leaf, target, ignore_index=ignored)
    (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    want = exact(logits.detach(), target, ignored)
    torch.testing.assert_close(nll.double(), want, rtol=1e-5, atol=1e-6)
    assert nll[2] == 0
    assert not gradient[target == ignored].any()
    assert gradient[target != ignored].flatten(1).any(1).all()


def test_ignored_positions_are_not_read(native: None) -> None:
    logits, target = data((3, 6, 40), torch.float32)
    logits[target == -100] = math.nan
    leaf = logits.requires_grad_()
    nll = functional.categorical_nll(leaf, target)
    (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    assert nll.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("place", [0, 18, 36, 1500])
@pytest.mark.parametrize("at_target", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_affect_only_their_row(
    backend: str, place: int, at_target: bool, value: float, dtype: torch.dtype
) -> None:
    logits = torch.randn(3, 2, 1501).to(dtype)
    logits[1, 1, place] = value
    target = torch.full((3, 2), place if at_target else (place + 1) % 1501)
    leaf = logits.requires_grad_()
    nll = functional.categorical_nll(leaf, target)
    assert nll.isfinite().tolist() == [True, False, True]
    (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    assert gradient[[0, 2]].isfinite().all()
    assert gradient[1, 0].isfinite().all()
    assert gradient[1, 1].isnan().any()


def test_row_of_minus_infinity_gives_nan(backend: str) -> None:
    nll = functional.categorical_nll(torch.full((1, 1, 5), -math.inf), torch.zeros(1, 1).long())
    assert nll.isnan().all()


def test_masked_classes_have_no_gradient(backend: str) -> None:
    """Logits of -inf exclude classes. A target that is excluded is impossible."""
    logits = torch.randn(2, 30, requires_grad=True)
    masked = logits.masked_fill(torch.arange(30) % 2 == 1, -math.inf)
    nll = functional.categorical_nll(masked, torch.tensor([4, 6]))
    torch.testing.assert_close(nll, exact(masked, torch.tensor([4, 6])).float(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    assert gradient.isfinite().all()
    assert functional.categorical_nll(masked, torch.tensor([4, 7])).tolist()[1] == math.inf


@pytest.mark.parametrize("grad", [1, 3])
def test_gradcheck(backend: str, grad: int) -> None:
    logits, target = data((3, 4, 5), torch.float64)
    assert torch.autograd.gradcheck(
        lambda a: grad * functional.categorical_nll(a, target), logits.requires_grad_()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def layouts(logits: Tensor) -> dict[str, Tensor]:
    b, t, v = logits.shape
    wide = torch.randn(b, t + 3, v)
    wide[:, 2 : t + 2] = logits
    return {
        "transposed": logits.transpose(1, 2).contiguous().transpose(1, 2),
        "time first": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "part of a longer one": wide[:, 2 : t + 2],
        "every other class": torch.stack((logits, logits), -1).flatten(2)[..., ::2],
        "expanded": logits[:1].expand(b, t, v),
    }


@pytest.mark.parametrize(
    "layout", ["transposed", "time first", "part of a longer one", "every other class", "expanded"]
)
def test_layouts_equal_contiguous(backend: str, layout: str) -> None:
    logits, target = data((3, 4, 1100), torch.float32)
    strided = layouts(logits)[layout].detach().requires_grad_()
    columns = torch.stack((target, target + 1), -1)[..., 0]  # also strided
    nll = functional.categorical_nll(strided, columns)
    (gradient,) = torch.autograd.grad(nll.sum(), strided)
    plain = strided.detach().contiguous().requires_grad_()
    want = exact(plain, target)
    torch.testing.assert_close(nll.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), plain)[0], rtol=1e-4, atol=1e-6)


def test_image_with_256_classes_equals_cross_entropy(backend: str) -> None:
    """(B, C, H, W, 256), also with logits in channels_last order, whose gradient is contiguous."""
    logits = torch.randn(2, 9, 4, 4).to(memory_format=torch.channels_last)
    target = torch.randint(0, 4, (2, 9, 4))
    leaf = logits.requires_grad_()
    nll = functional.categorical_nll(leaf, target)
    (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    plain = logits.detach().contiguous().requires_grad_()
    torch.testing.assert_close(nll.double(), exact(plain, target), rtol=1e-5, atol=1e-6)
    want = torch.autograd.grad(exact(plain, target).sum(), plain)[0]
    torch.testing.assert_close(gradient, want.float(), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The ELBO, and autograd
# ---------------------------------------------------------------------------------------------------------------------


def posterior(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 4, requires_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("objective", ["loss", "scaled", "nll", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_elbo_equals_the_formula(backend: str, objective: str, reduction: str, dtype: torch.dtype) -> None:
    logits, target = data((5, 3, 12), dtype)
    weights = torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0])

    def combine(loss: Tensor, nll: Tensor, kl: Tensor) -> Tensor:
        total = (loss * weights.to(loss.dtype)).sum() if loss.dim() else loss
        return {"loss": total, "scaled": 3 * total, "nll": (nll * weights.to(nll.dtype)).sum()}.get(
            objective, total + nll.square().sum() / 100 + kl.sum()
        )

    mu, logvar = posterior(5)
    leaf = logits.clone().requires_grad_()
    before, version = leaf.detach().clone(), leaf._version
    out = fastvae.ELBO("categorical", beta=0.7, reduction=reduction)(leaf, target, mu, logvar)
    got = torch.autograd.grad(combine(*out), (leaf, mu), allow_unused=True)
    assert torch.equal(leaf.detach(), before)
    assert leaf._version == version

    wide = [t.detach().double().requires_grad_() for t in (logits, mu, logvar)]
    nll = exact(wide[0], target)
    kl = reference.gaussian_kl(wide[1], wide[2])
    loss = nll + 0.7 * kl
    loss = {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]
    want = torch.autograd.grad(combine(loss, nll, kl), wide[:2], allow_unused=True)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance / 10)


def test_kept_graph_accumulates_gradients(native: None) -> None:
    logits, target = data((4, 3, 50), torch.float32)
    leaf = logits.requires_grad_()
    loss = fastvae.ELBO("categorical")(leaf, target, kl=torch.zeros(4)).loss
    first = torch.autograd.grad(3 * loss, leaf, retain_graph=True)[0]
    again = torch.autograd.grad(3 * loss, leaf)[0]
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()


def test_checkpoint_and_hooks_give_the_same_gradients(native: None) -> None:
    logits, target = data((4, 3, 50), torch.float32)
    leaf = logits.requires_grad_()
    want = torch.autograd.grad(functional.categorical_nll(2 * leaf, target).sum(), leaf)[0]
    nll = checkpoint(lambda a: functional.categorical_nll(2 * a, target), leaf, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(nll.sum(), leaf)[0], want)


def test_second_derivative_raises(native: None) -> None:
    logits, target = data((2, 3, 5), torch.float64)
    leaf = logits.requires_grad_()
    (first,) = torch.autograd.grad(functional.categorical_nll(leaf, target).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastvae\.use_backend\(\"reference\"\)"):
        first.square().sum().backward()
    assert torch.autograd.gradgradcheck(lambda a: reference.categorical_nll(a, target), leaf)


def test_every_element_is_written(native: None) -> None:
    """This mode fills new memory with NaN."""
    logits, target = data((4, 30, 700), torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        leaf = logits.requires_grad_()
        functional.categorical_nll(leaf, target).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 30, 3000), (200, 7), (1, 1, 100_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_any_thread_count(
    native: None, threads: None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    logits, target = data(shape, dtype)

    def run() -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        nll = functional.categorical_nll(leaf, target)
        return [nll, *torch.autograd.grad(nll.sum(), leaf)]

    torch.set_num_threads(1)
    want = run()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True)), count


ON_CAPABILITY = """
import torch, fastvae
import torch.nn.functional as F
torch.manual_seed(0)
for shape in ((5, 3), (2, 3, 1029), (7, 2, 130)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        logits = (4 * torch.randn(shape)).to(dtype).requires_grad_()
        target = torch.randint(0, shape[-1], shape[:-1])
        nll = fastvae.functional.categorical_nll(logits, target)
        (gradient,) = torch.autograd.grad(nll.sum(), logits)
        wide = logits.detach().double().requires_grad_()
        want = F.cross_entropy(wide.flatten(0, -2), target.flatten(), reduction="none").view(shape[0], -1).sum(1)
        (grads,) = torch.autograd.grad(want.sum(), wide)
        torch.testing.assert_close(nll.double(), want, rtol=5e-6, atol=5e-6)
        assert (gradient.double() - grads).abs().max() < (1e-2 if dtype.itemsize == 2 else 5e-6)
"""


def test_every_instruction_set_gives_the_same_results(on_capability: Callable[[str], str]) -> None:
    on_capability(ON_CAPABILITY)


def test_only_the_gradient_is_allocated(native: None) -> None:
    """Counts tensors of the logits' size: one with a gradient, none without."""
    logits, target = data((8, 16, 1000), torch.float32)

    def largest(run: Callable[[], Any]) -> list[int]:
        with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
            run()
        records = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
        return [n for event in records if (n := event.nbytes()) >= logits.numel()]

    fastvae.empty_cache()
    assert largest(lambda: functional.categorical_nll(logits, target)) == []
    leaf = logits.requires_grad_()
    loss = functional.categorical_nll(leaf, target).sum()
    assert largest(loss.backward) == []  # created in the forward; scaling by 1 does nothing


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def test_compiled_elbo_is_one_graph(native: None) -> None:
    torch._dynamo.reset()
    elbo, counter = fastvae.ELBO("categorical", free_bits=0.5), CompileCounterWithBackend("aot_eager")

    def step(logits: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor) -> Tensor:
        _, kl = elbo.reparameterize(mu, logvar, seed=seed)
        return elbo(logits, target, kl=kl).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    seed = torch.tensor([1, 2])
    for rows, length in ((3, 6), (8, 5), (5, 9)):
        logits, target = data((rows, length, 20), torch.float32)
        leaf = logits.requires_grad_()
        mu, logvar = posterior(rows)
        got = torch.autograd.grad(compiled(leaf, target, mu, logvar, seed), (leaf, mu))
        want = torch.autograd.grad(step(leaf, target, mu, logvar, seed), (leaf, mu))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_opcheck(native: None, dtype: torch.dtype, order: torch.memory_format) -> None:
    logits, target = data((2, 3, 4, 5), dtype)
    leaf = logits.to(memory_format=order).requires_grad_()
    arguments = ("categorical", [leaf], target, [-100.0], torch.rand(2), torch.tensor(0.5), 2)
    torch.library.opcheck(torch.ops.fastvae.nll.default, arguments)
    torch.library.opcheck(
        torch.ops.fastvae.nll_forward.default, ("categorical", [leaf.detach()], *arguments[2:], 1)
    )
    gradient = ("categorical", [leaf.detach()], target, [-100.0], torch.tensor(1.0), None, 2, 1)
    torch.library.opcheck(torch.ops.fastvae.nll_gradient.default, gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong inputs
# ---------------------------------------------------------------------------------------------------------------------

LOGITS, TARGET = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((LOGITS, TARGET.float()), TypeError, r"`target` must be int64.*float32.*target\.long\(\)"),
        ((LOGITS, TARGET.int()), TypeError, "`target` must be int64.*int32"),
        ((LOGITS, TARGET.numpy()), TypeError, "`target` must be a Tensor, got ndarray"),
        ((LOGITS.long(), TARGET), TypeError, "`logits` must be float32.*int64"),
        ((LOGITS, TARGET[:, :2]), ValueError, r"`target` must have the shape \(2, 3\).*got \(2, 2\)$"),
        (
            (LOGITS.movedim(-1, 1), TARGET),
            ValueError,
            r"classes must be in the last dimension.*logits\.movedim\(1, -1\)",
        ),
        (
            (LOGITS[:, 0, 0], TARGET[:, 0]),
            ValueError,
            r"`logits` must have shape \(B, \.\.\., V\).*got \(2,\)",
        ),
        ((LOGITS[..., :0], TARGET), ValueError, r"V\).*got \(2, 3, 0\)"),
        (
            (LOGITS, TARGET + 5),
            ValueError,
            r"`target` must hold classes from 0 to 4, or -100 \(ignore_index\), got 5 at \(0, 0\)",
        ),
        ((LOGITS, TARGET - 1), ValueError, r"from 0 to 4, or -100.*got -1 at \(0, 0\)"),
        (
            (LOGITS.to("meta"), TARGET),
            ValueError,
            "`target` must be on the device of `logits`, meta, got cpu",
        ),
    ],
)
def test_wrong_inputs_raise(
    backend: str, arguments: tuple[Any, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        functional.categorical_nll(*arguments)
    assert str(caught.value).startswith("fastvae.categorical_nll: ")
    assert "\n" not in str(caught.value)


def test_elbo_with_wrong_inputs_raises(backend: str) -> None:
    elbo = fastvae.ELBO("categorical")
    with pytest.raises(
        ValueError, match=r"^fastvae\.ELBO: `x` must hold classes from 0 to 4, .* got 7 at \(0, 0\)$"
    ):
        elbo(LOGITS, TARGET + 7, kl=torch.zeros(2))
    with pytest.raises(TypeError, match=r"^fastvae\.ELBO: `x` must be int64"):
        elbo(LOGITS, TARGET.float(), kl=torch.zeros(2))


@pytest.mark.parametrize("index", [1.5, "pad", None, True])
def test_ignore_index_of_another_type_raises(index: Any) -> None:
    for make in (
        lambda: Categorical(index),
        lambda: functional.categorical_nll(LOGITS, TARGET, ignore_index=index),
    ):
        with pytest.raises(TypeError, match="`ignore_index` must be an int, got"):
            make()
    with pytest.raises(ValueError, match="2\\^53"):
        Categorical(2**60)


def test_op_with_an_invalid_class_raises(native: None) -> None:
    """A direct call of the op must not read beyond the logits."""
    for number in (5, -1, 2**40):
        with pytest.raises(ValueError, match=f"from 0 to 4.*got {number}"):
            torch.ops.fastvae.nll("categorical", [LOGITS], TARGET + number, [-100.0], None, None, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------


def test_module_has_nll_mean_and_sample() -> None:
    logits = torch.randn(3, 4, 6)
    likelihood = Categorical()
    mean = likelihood.mean(logits)
    torch.testing.assert_close(mean.sum(-1), torch.ones(3, 4))
    assert likelihood.channels(6) == 6
    samples = likelihood.sample(logits, torch.Generator().manual_seed(1))
    assert samples.shape == (3, 4)
    assert samples.dtype == torch.int64
    assert torch.equal(samples, likelihood.sample(logits, torch.Generator().manual_seed(1)))
    assert "ignore_index=-100" in repr(likelihood)
    target = torch.randint(0, 6, (3, 4))
    assert torch.equal(likelihood.nll(logits, target), functional.categorical_nll(logits, target))


def test_sample_frequencies_equal_the_mean() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    samples = Categorical().sample(logits.expand(20_000, 4), torch.Generator().manual_seed(0))
    shares = torch.bincount(samples, minlength=4) / len(samples)
    assert (shares - logits.softmax(-1)[0]).abs().max() < 0.015


@pytest.mark.parametrize("backend_name", ["native", "reference"])
def test_repeated_calls_give_the_same_bits(backend_name: str) -> None:
    logits, target = data((6, 5, 2000), torch.float32)
    with fastvae.use_backend(backend_name):
        digests = {
            hashlib.sha256(functional.categorical_nll(logits, target).numpy().tobytes()).hexdigest()
            for _ in range(3)
        }
    assert len(digests) == 1


def test_missing_kernel_warns_and_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> Any:
        raise AssertionError("this backend has no such kernel")

    monkeypatch.setitem(choose.serving, "cpu", Backend("triton", *(missing,) * len(OPS)))
    monkeypatch.setattr(choose, "fast_path", None)
    logits, target = data((3, 4, 7), torch.float32)
    monkeypatch.setattr(choose, "_fallbacks_warned", set())
    monkeypatch.setitem(choose.LIKELIHOODS_LACKING, ("triton", "cpu"), ("categorical",))
    with pytest.warns(RuntimeWarning, match="pure-PyTorch reference for the likelihood 'categorical'"):
        nll = functional.categorical_nll(logits, target)
    assert torch.equal(nll, reference.categorical_nll(logits, target))
    with pytest.raises(AssertionError, match="no such kernel"):
        functional.bernoulli_nll(logits, logits)
