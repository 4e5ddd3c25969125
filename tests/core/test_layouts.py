"""Strides: for any memory layout, the result is that of a contiguous copy."""

from collections.abc import Callable

import cases
import pytest
import torch
from cases import CASES, DTYPES, Case, Inputs, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastvae
from fastvae import functional

NLL = tuple(case for case in CASES if case.targets)
LIKE_DATA = tuple(case for case in NLL if not case.id.endswith("_head"))


def check_same(got: Result, want: Result, dtype: torch.dtype) -> None:
    """Rows are summed in memory order, so only the last digits of a sum may differ."""
    tolerance = {torch.float64: 1e-14}.get(dtype, 2e-6)
    scale = want.scale.to(want.value.dtype)
    assert ((got.value - want.value).abs() <= tolerance * scale).all()
    for name, gradient in want.gradients.items():
        if gradient.dim() == 0:
            torch.testing.assert_close(got.gradients[name], gradient)
        else:
            # Elementwise results do not depend on the position, but the exp of a vector and of its tail may differ.
            torch.testing.assert_close(got.gradients[name], gradient, atol=3e-7, rtol=_step(dtype))


def _step(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


def compare(case: Case, inputs: Inputs, dtype: torch.dtype) -> Result:
    """Run the inputs in their layout and as contiguous copies, and return the former results."""
    contiguous = {
        name: x.contiguous().clone(memory_format=torch.contiguous_format) for name, x in inputs.items()
    }
    got = cases.run(case, functional, inputs)
    want = cases.run(case, functional, contiguous)._replace(scale=cases.exact(case, contiguous).scale)
    check_same(got, want, dtype)
    return got


# ---------------------------------------------------------------------------------------------------------------------
# Layouts of typical models
# ---------------------------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("recon", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", ["contiguous", "channels_last", "other"])
@pytest.mark.parametrize("case", LIKE_DATA, ids=cases.ids)
def test_channels_last_equals_contiguous(
    backend: str, case: Case, recon: str, target: str, dtype: torch.dtype
) -> None:
    """For every pair of layouts, the gradient has the layout of the reconstruction, not that of the data."""
    inputs = cases.cast(case.inputs((2, 3, 16, 24)), dtype)
    layout: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": Tensor.contiguous,
        "channels_last": channels_last,
        "other": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    inputs = {
        name: x if x.dim() == 0 else layout[target if name == "target" else recon](x)
        for name, x in inputs.items()
    }
    got = compare(case, inputs, dtype)
    first = next(iter(got.gradients.values()))
    if backend != "reference":  # there, autograd decides
        assert first.is_contiguous() == (recon == "contiguous")
        assert is_channels_last(first) == (recon == "channels_last")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("target", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 16, 17])
def test_channels_last_head_equals_contiguous(
    backend: str, channels: int, target: str, dtype: torch.dtype
) -> None:
    """Mean and log-variance alternate at every pixel."""
    case = cases.by_id["gaussian_head"]
    inputs = cases.cast(case.inputs((2, channels, 9, 8)), dtype)
    inputs["params"] = channels_last(inputs["params"])
    if target == "channels_last":
        inputs["target"] = channels_last(inputs["target"])
    got = compare(case, inputs, dtype)
    if backend != "reference":
        assert is_channels_last(got.gradients["params"])


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize(
    ("shape", "packed"),
    [(shape, "contiguous") for shape in ((5, 34), (3, 6, 7), (2, 4, 8, 8), (2, 2, 3, 4, 5))]
    + [((2, 4, 8, 8), "channels_last")],
    ids=cases.ids,
)
def test_chunks_of_a_head_are_read_in_place(
    backend: str, shape: tuple[int, ...], packed: str, dtype: torch.dtype
) -> None:
    """`mu, logvar = h.chunk(2, dim=1)`, as in every VAE: z, kl and the gradient of the head."""
    head = torch.randn(shape).to(dtype)
    if packed == "channels_last":
        head = channels_last(head)
    seed = torch.tensor([3, 4])

    def run(h: Tensor, *, copy: bool) -> list[Tensor]:
        h = h.detach().requires_grad_()
        mu, logvar = h.chunk(2, dim=1)
        if copy:
            mu, logvar = (x.clone(memory_format=torch.contiguous_format) for x in (mu, logvar))
        z, kl = functional.reparameterize_kl(mu, logvar, seed=seed)
        weight = torch.linspace(0.5, 1.5, z.numel()).reshape(z.shape).to(dtype)
        alone = functional.gaussian_kl(mu, logvar)
        (gradient,) = torch.autograd.grad((z * weight).sum().to(kl) + (kl * kl + alone).sum(), h)
        return [z.detach(), kl.detach(), alone.detach(), gradient]

    for got, want in zip(run(head, copy=False), run(head, copy=True), strict=True):
        torch.testing.assert_close(got, want, rtol=max(2e-6, _step(dtype)), atol=1e-6)


@pytest.mark.parametrize("case", cases.WITH_TARGET, ids=cases.ids)
def test_chunks_of_a_decoder_are_read_in_place(backend: str, case: Case) -> None:
    """The parameters are slices of a larger tensor, with contiguous rows but a larger batch stride."""
    inputs = cases.cast(case.inputs((4, 6, 5)), torch.float32)
    for name, x in inputs.items():
        if x.dim() > 0:
            inputs[name] = torch.cat((torch.full_like(x, 7), x, torch.full_like(x, 9)), 1)[
                :, x.shape[1] : -x.shape[1]
            ]
    compare(case, inputs, torch.float32)


@pytest.mark.parametrize("target", [torch.float32, torch.uint8], ids=cases.ids)
@pytest.mark.parametrize("over", ["batch", "channels", "everything"])
@pytest.mark.parametrize("case", NLL, ids=cases.ids)
def test_expanded_target_equals_a_copy(backend: str, case: Case, over: str, target: torch.dtype) -> None:
    """Stride 0: one image for the whole batch, as for K samples of one datum."""
    shape = (3, 4, 10, 10)
    inputs = cases.cast(case.inputs(shape), torch.float32, target, counts=case.counts)
    first = inputs["target"][{"batch": slice(1), "channels": slice(None), "everything": slice(1)}[over]]
    if over == "channels":
        first = first[:, :1]
    elif over == "everything":
        first = first[:, :1, :1, :1]
    inputs["target"] = first.expand(shape)
    assert 0 in inputs["target"].stride()
    compare(case, inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
def test_expanded_parameters_equal_a_copy(backend: str, dtype: torch.dtype) -> None:
    """torch sums the gradients of an expanded input, so the kernel must not write to its single element."""
    logits = torch.randn(1, 50).to(dtype)
    before = logits.clone()
    inputs = {"logits": logits.expand(6, 50), "target": torch.rand(6, 50).to(dtype)}
    compare(cases.by_id["bernoulli"], inputs, dtype)
    assert torch.equal(logits, before)


# ---------------------------------------------------------------------------------------------------------------------
# Any shape, any strides
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple) | st.tuples(
    st.integers(0, 3), st.integers(1, 2100)
)


@st.composite
def strided(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The values of x in another memory layout: permuted dimensions, with steps and offsets between elements."""
    order = draw(st.permutations(range(x.dim())))
    inverse = [order.index(i) for i in range(x.dim())]
    steps = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in order]
    offset = draw(st.integers(0, 3))
    room = [x.shape[d] * step + offset for d, step in zip(order, steps, strict=True)]
    filler = float("nan") if x.is_floating_point() else 1
    view = torch.full(room, filler, dtype=x.dtype)
    for i, (d, step) in enumerate(zip(order, steps, strict=True)):
        view = view.narrow(i, offset, x.shape[d] * step) if x.shape[d] else view.narrow(i, 0, 0)
        view = view[(slice(None),) * i + (slice(None, None, step),)]
    view = view.permute(inverse)
    return view.copy_(x)


@pytest.mark.parametrize("backend_name", ["native"])
@pytest.mark.parametrize("case", CASES, ids=cases.ids)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_nll_with_any_strides_equals_contiguous(backend_name: str, case: Case, data: st.DataObject) -> None:
    """The memory between the elements is NaN, so reading any of it shows."""
    shape = data.draw(SHAPES)
    dtype = data.draw(st.sampled_from(DTYPES))
    target = data.draw(st.sampled_from((dtype, torch.float32, *case.targets)))
    inputs = cases.cast(case.inputs(shape), dtype, target, counts=case.counts)
    inputs = {name: x if x.dim() == 0 else data.draw(strided(x)) for name, x in inputs.items()}
    with fastvae.use_backend(backend_name):
        compare(case, inputs, dtype)


@pytest.mark.parametrize("backend_name", ["native"])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_reparameterize_kl_with_any_strides_equals_contiguous(backend_name: str, data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    dtype = data.draw(st.sampled_from(DTYPES))
    samples = data.draw(st.sampled_from((None, 1, 3)))
    names = ("mu", "logvar", "prior_mu", "prior_logvar") if data.draw(st.booleans()) else ("mu", "logvar")
    contiguous = [torch.randn(shape).to(dtype) for _ in names]
    lying = [data.draw(strided(x)) for x in contiguous]
    z_shape = shape if samples is None else (samples, *shape)
    noise: dict[str, Tensor] = {"seed": torch.tensor([5, 6])}
    noise_lying = noise
    if data.draw(st.booleans()):
        noise = {"eps": torch.randn(z_shape).to(dtype)}
        noise_lying = {"eps": data.draw(strided(noise["eps"]))}
    weight = torch.linspace(0.5, 1.5, torch.Size(z_shape).numel()).reshape(z_shape).to(dtype)
    weight_lying = data.draw(strided(weight))

    def run(tensors: list[Tensor], noise: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        z, kl = functional.reparameterize_kl(*leaves, samples=samples, **noise)
        return [z.detach(), kl.detach(), *torch.autograd.grad((z, kl), leaves, (weight, torch.ones_like(kl)))]

    with fastvae.use_backend(backend_name):
        pairs = zip(run(lying, noise_lying, weight_lying), run(contiguous, noise, weight), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=max(2e-6, _step(dtype)), atol=1e-6)
