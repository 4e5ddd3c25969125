"""The compiled Triton kernels, without a GPU: they compile for every architecture, spill nothing, and access memory
with 128 bits.

Each op is run up to its launches, which are recorded and compiled as Triton would compile them in the first call: from
the arguments, their types and their alignment. The cubins are then disassembled.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing; run this file without it", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from fastvae import _spec  # noqa: E402
from fastvae._triton import (  # noqa: E402
    categorical,
    counts,
    discretized,
    elements,
    elementwise,
    latents,
    log_probs,
    mixture,
    multinomial,
    tuning,
)
from fastvae._triton import loss as losses  # noqa: E402

WITH_KERNELS = (
    elementwise,
    categorical,
    counts,
    discretized,
    elements,
    latents,
    log_probs,
    losses,
    mixture,
    multinomial,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOAT, HALF, BYTE, DOUBLE = torch.float32, torch.bfloat16, torch.uint8, torch.float64

# ---------------------------------------------------------------------------------------------------------------------
# Record and compile
# ---------------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture(
    params=["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in TARGETS if name != "sm_90")]
)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(tuning, "architecture", lambda device: request.param)
    return request.param


def record(run: Callable[[], object]) -> list[Launch]:
    """The launches that an op would make for CPU tensors, whose pointers are aligned like a GPU's."""
    launches: list[Launch] = []

    def note(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
        launches.append(Launch(kernel, args, options))

    with pytest.MonkeyPatch.context() as patch:
        for module in WITH_KERNELS:
            patch.setattr(module, "launch", note)
        run()
    return launches


@dataclass(frozen=True)
class Code:
    spills: int  # in bytes, or registers
    disassemble: Callable[[], str]
    load: str  # the patterns of accesses to global memory
    store: str

    @cached_property
    def text(self) -> str:
        """SASS or AMD's assembly. Disassembling takes a hundred times as long as reading the use of registers."""
        return self.disassemble()

    @property
    def loads(self) -> list[str]:
        return re.findall(self.load, self.text)

    @property
    def stores(self) -> list[str]:
        return re.findall(self.store, self.text)

    @property
    def inner_loops(self) -> list[list[str]]:
        """The instructions of each loop in SASS that contains no other loop, in the order of the code."""
        code = [
            (int(place, 16), instruction)
            for place, instruction in re.findall(
                r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", self.text, re.MULTILINE
            )
        ]
        ends = {end: int(to[1], 16) for end, x in code if (to := re.search(r"\bBRA\b.* 0x([0-9a-f]+)$", x))}
        loops = [(start, end) for end, start in ends.items() if start < end]
        inner = [
            (a, b) for a, b in loops if not any((a, b) != (x, y) and a <= x and y <= b for x, y in loops)
        ]
        return [[x for place, x in code if a <= place <= b] for a, b in sorted(inner)]


def compile_launch(launch: Launch, architecture: str) -> Code:
    kernel, args, options = launch
    target = TARGETS[architecture]
    backend, options = make_backend(target), {**options, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=parsed.__dict__)
    return _amd(compiled.asm["amdgcn"]) if target.backend == "hip" else _nvidia(compiled.asm["cubin"])


@cache
def _nvidia(cubin: bytes) -> Code:
    def dump(what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [str(CUOBJDUMP), what, file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    usage = dump("-res-usage")
    assert "REG:" in usage
    spills = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return Code(spills, lambda: dump("-sass"), r"\bLDG\.\S+", r"\bSTG\.\S+")


def _amd(text: str) -> Code:
    # Scalar registers are spilled into lanes of vector registers, not into memory.
    spills = [int(n) for n in re.findall(r"(?:vgpr_spill_count|private_segment_fixed_size): *(\d+)", text)]
    assert len(spills) == 2
    return Code(
        sum(spills), lambda: text, *(rf"\b(?:global|buffer)_{what}_\w+" for what in ("load", "store"))
    )


def widest(accesses: list[str]) -> int:
    """The number of accesses that move 128 bits per thread."""
    return sum(".128" in access or access.endswith("dwordx4") for access in accesses)


# ---------------------------------------------------------------------------------------------------------------------
# The launches of users' calls
# ---------------------------------------------------------------------------------------------------------------------

B, D = 512, 3072
SEED = torch.tensor([1, 2])
ROWS, ONE, NONE = torch.empty(B), torch.tensor(1.0), None
STORED = 1000
POSITIONS = torch.empty(B + 1, dtype=torch.int64), torch.empty(STORED, dtype=torch.int64)


CONSTANTS: dict[str, list[float]] = {
    "scale": [0.5],
    "df": [4.0],
    "shape": [2.5],
    "logvar_bounds": [-6.0, 2.0],
    "ignore_index": [-100],
    "components": [10],
    "bits": [8],
    "log_scale_floor": [-7.0],
    "min_mass": [1e-5],
    "eps": [1e-8],
}


def data(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape or (B, D), dtype=dtype)


def loss(
    likelihood: str,
    params: list[torch.Tensor],
    target: torch.Tensor,
    needs: int = 1,
    weight: torch.Tensor | None = None,
) -> object:
    constants = [x for constant in _spec.VARIANTS[likelihood].constants for x in CONSTANTS[constant.name]]
    kl = ROWS[: params[0].shape[0]]
    return losses.nll_forward(likelihood, params, target, constants, kl, ONE, 2, needs, weight)


def bernoulli(params: torch.dtype, target: torch.dtype, needs: int = 1) -> object:
    return loss("bernoulli", [data(params)], data(target), needs)


# The form of the scale, its constants and the balance.
LOGVAR = "logvar", [], NONE
NVAE = "log_std", [5.0, 1e-2], 0.8


def sample(
    dtype: torch.dtype, size: int = 128, prior: bool = False, form: tuple[Any, ...] = LOGVAR, **noise: Any
) -> object:
    head = data(dtype, 65536, 2 * size)
    priors = (data(dtype, 65536, size),) * 2 if prior else (NONE, NONE)
    seed = NONE if "eps" in noise else SEED
    return latents.reparameterize_kl_forward(
        head, NONE, *priors, *form, False, noise.get("samples"), seed, 0, noise.get("eps"), NONE
    )


def sample_gradient(
    dtype: torch.dtype, size: int = 128, prior: bool = False, form: tuple[Any, ...] = LOGVAR
) -> object:
    priors = (data(dtype, 65536, size),) * 2 if prior else (NONE, NONE)
    return latents.reparameterize_kl_backward(
        data(dtype, 65536, size),
        data(FLOAT, 65536),
        data(dtype, 65536, 2 * size),
        NONE,
        *priors,
        *form,
        NONE,
        SEED,
        0,
        NONE,
        0b1101 if prior else 0b1,
    )


def draws(dtype: torch.dtype, size: int = 128, prior: bool = False, form: tuple[Any, ...] = LOGVAR) -> object:
    """Three draws with their densities, and the gradients."""
    head = data(dtype, 8192, 2 * size)
    priors = (data(dtype, 8192, size),) * 2 if prior else (NONE, NONE)
    posterior = head, NONE, *priors, *form[:2]
    log_probs.sample_log_probs_forward(*posterior, False, 3, SEED, 0, NONE, NONE)
    densities = (data(FLOAT, 3, 8192),) * 2
    needs = 0b1101 if prior else 0b1
    return log_probs.sample_log_probs_backward(
        data(dtype, 3, 8192, size), *densities, *posterior, prior, 3, SEED, 0, NONE, needs
    )


def scale(dtype: torch.dtype, by_row: bool) -> object:
    return losses.nll_backward_(
        ROWS if by_row else ONE, NONE, [data(dtype)], NONE, ROWS, ONE, B, 0 if by_row else 2, True, False
    )


def genes(
    likelihood: str,
    dtype: torch.dtype,
    target: torch.dtype = FLOAT,
    shared: bool = True,
    weight: torch.Tensor | None = None,
    sparse: bool = False,
) -> object:
    form = counts.FORMS[likelihood]
    params = [data(dtype), data(dtype, D) if shared else data(dtype)]
    params += [data(dtype)] * (form.zero_logits is not None) + [ROWS.to(dtype)] * (form.library is not None)
    needs = (1 << len(params)) - 1
    if sparse:
        return loss(likelihood, [*params, *POSITIONS], data(target, STORED), needs, weight)
    return loss(likelihood, params, data(target), needs, weight)


def each(likelihood: str, dtype: torch.dtype, shared: bool = True) -> object:
    """The value of each element, and all derivatives."""
    of_all = [data(dtype), data(dtype, D) if shared else data(dtype), data(dtype)]
    params = of_all[: len(_spec.VARIANTS[likelihood].tensors)]
    return elements.nll_elements_forward(
        likelihood, params, data(FLOAT), [1e-8], -1.0, (1 << len(params)) - 1
    )


def scale_each(dtype: torch.dtype, by_row: bool, shared: int) -> object:
    grad = data(FLOAT, B, 1).expand(B, D) if by_row else data(FLOAT)
    return elements.nll_elements_backward(grad, [data(FLOAT)] * 3, shared, dtype)


def gaussians(dtype: torch.dtype, joint: bool, each: bool, weights: tuple[int, ...] = ()) -> None:
    """All launches of a mixture: values, and the gradients of all arguments."""
    z, components = data(dtype, B, 32), data(dtype, 1000, 32)
    inputs = (z, components, components, data(dtype, *weights) if weights else NONE)
    values = mixture.gaussian_mixture_log_prob_forward(*inputs, joint, each)
    grads = (value if wanted else NONE for value, wanted in zip(values, (joint, each), strict=True))
    mixture.gaussian_mixture_log_prob_backward(*grads, *inputs, *values, 0b1111)


def with_64_bit_columns(run: Callable[[], object]) -> None:
    """Run an op as for rows of more than 2^31 elements."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (elementwise, losses, latents):
            cut = module.partition
            patch.setattr(module, "partition", lambda *a, cut=cut, **k: cut(*a, **k)._replace(wide=True))
        run()


IMAGE, HALF_IMAGE = (
    data(FLOAT, 64, c, 16, 16).contiguous(memory_format=torch.channels_last) for c in (32, 16)
)
MIXED = data(FLOAT, 512, 100)
PLANES, LEVELS = data(FLOAT, 16, 100, 32, 32), data(BYTE, 16, 3, 32, 32)
MANY, LONG = data(FLOAT, 10_000, 4), data(FLOAT, 2, 100_000)

# Calls with aligned tensors: their first launch reads and writes 128 bits at a time.
ALIGNED: dict[str, Callable[[], object]] = {
    "bernoulli": lambda: bernoulli(FLOAT, FLOAT),
    "bernoulli, uint8": lambda: bernoulli(FLOAT, BYTE),
    "bernoulli, bf16": lambda: bernoulli(HALF, HALF),
    "bernoulli, bf16, float": lambda: bernoulli(HALF, FLOAT),
    "bernoulli, bf16, uint8": lambda: bernoulli(HALF, BYTE),
    "gaussian": lambda: loss("gaussian", [data(FLOAT)], data(FLOAT)),
    "gaussian, learned": lambda: loss("gaussian_learned", [data(FLOAT), ONE], data(FLOAT), 3),
    "gaussian, per element": lambda: loss("gaussian_per_element", [data(FLOAT)] * 2, data(FLOAT), 3),
    "head": lambda: loss("gaussian_head", [data(HALF, B, 2 * D)], data(HALF)),
    "head, channels_last": lambda: loss("gaussian_head", [IMAGE], HALF_IMAGE),
    "head, bounded": lambda: loss("gaussian_bounded_head", [data(HALF, B, 2 * D)], data(HALF)),
    "laplace": lambda: loss("laplace", [data(FLOAT)], data(FLOAT)),
    "laplace, per element": lambda: loss("laplace_per_element", [data(FLOAT)] * 2, data(FLOAT), 3),
    "continuous Bernoulli": lambda: loss("continuous_bernoulli", [data(FLOAT)], data(FLOAT)),
    "gamma": lambda: loss("gamma", [data(FLOAT)], data(FLOAT)),
    "poisson, int32": lambda: loss("poisson", [data(FLOAT)], data(torch.int32)),
    "poisson by its rate": lambda: loss("poisson_rate", [data(FLOAT)], data(FLOAT)),
    "elements of poisson": lambda: each("poisson_rate", FLOAT),
    "student t, learned": lambda: loss("student_t_learned", [data(FLOAT), ONE], data(FLOAT), 3),
    "categorical": lambda: loss("categorical", [data(FLOAT, 8, 4, 20_000)], data(torch.int64, 8, 4)),
    "discretised, uint8": lambda: loss("discretized_logistic", [PLANES[:, :6]], LEVELS),
    "mixture, uint8": lambda: loss("discretized_logistic_mixture", [PLANES], LEVELS),
    "weighted": lambda: loss("gaussian_per_element", [data(FLOAT)] * 2, data(FLOAT), 3, data(FLOAT)),
    "weighted, bf16, half": lambda: loss("bernoulli", [data(HALF)], data(HALF), 1, data(HALF)),
    "rows of MNIST": lambda: loss("bernoulli", [data(FLOAT, 128, 784)], data(FLOAT, 128, 784)),
    "scale": lambda: scale(FLOAT, False),
    "scale elements": lambda: scale_each(FLOAT, False, 1),
    "scale elements, by row, bf16": lambda: scale_each(HALF, True, -1),
    "scale, by row, bf16": lambda: scale(HALF, True),
    "sample": lambda: sample(FLOAT),
    "sample, bf16": lambda: sample(HALF),
    "sample, prior": lambda: sample(FLOAT, prior=True),
    "sample, given noise": lambda: sample(FLOAT, samples=3, eps=data(FLOAT, 3, 65536, 128)),
    "sample, softplus": lambda: sample(FLOAT, form=("softplus", [1e-4], NONE)),
    "sample gradient, softplus": lambda: sample_gradient(FLOAT, form=("softplus", [1e-4], NONE)),
    "sample gradient": lambda: sample_gradient(FLOAT),
    "sample gradient, bf16": lambda: sample_gradient(HALF),
    "sample gradient, prior": lambda: sample_gradient(FLOAT, prior=True),
    "kl per element": lambda: latents.gaussian_kl_forward(data(FLOAT), data(FLOAT), NONE, NONE, *LOGVAR, True),
}  # fmt: skip

# Other calls: they must compile and spill nothing.
OTHERS: dict[str, Callable[[], object]] = {
    "no gradient": lambda: bernoulli(FLOAT, FLOAT, 0),
    "double": lambda: bernoulli(DOUBLE, DOUBLE),
    "head, bounded, double": lambda: loss("gaussian_bounded_head", [data(DOUBLE, B, 2 * D)], data(DOUBLE)),
    "gamma, double": lambda: loss("gamma", [data(DOUBLE)], data(DOUBLE)),
    "poisson, double, int64": lambda: loss("poisson", [data(DOUBLE)], data(torch.int64)),
    "continuous Bernoulli, double": lambda: loss("continuous_bernoulli", [data(DOUBLE)], data(DOUBLE)),
    "categorical, bf16": lambda: loss("categorical", [data(HALF, 8, 4, 1001)], data(torch.int64, 8, 4)),
    "categorical, double": lambda: loss("categorical", [data(DOUBLE, 8, 4, 1000)], data(torch.int64, 8, 4)),
    "negative binomial": lambda: genes("negative_binomial_logits", FLOAT),
    "zero-inflated": lambda: genes("zero_inflated_negative_binomial", FLOAT, torch.int32, False),
    "zero-inflated, bf16": lambda: genes("zero_inflated_negative_binomial_logits", HALF),
    "negative binomial, double": lambda: genes("negative_binomial_logits", DOUBLE, torch.int64),
    "zero-inflated, double": lambda: genes("zero_inflated_negative_binomial", DOUBLE, DOUBLE, False),
    "sparse negative binomial, uint16": lambda: genes("negative_binomial", FLOAT, torch.uint16, sparse=True),
    "sparse zero-inflated, bf16": lambda: genes(
        "zero_inflated_negative_binomial_logits", HALF, torch.int32, False, data(BYTE), True),
    "sparse zero-inflated, double": lambda: genes(
        "zero_inflated_negative_binomial_logits", DOUBLE, FLOAT, sparse=True),
    "multinomial": lambda: loss("multinomial", [data(FLOAT)], data(FLOAT)),
    "sparse multinomial": lambda: loss("multinomial", [data(FLOAT), *POSITIONS], data(FLOAT, STORED)),
    "multinomial, bf16, uint16": lambda: loss("multinomial", [data(HALF)], data(torch.uint16)),
    "multinomial, double": lambda: loss("multinomial", [data(DOUBLE)], data(torch.int64)),
    "weighted multinomial": lambda: loss("multinomial", [data(FLOAT)], data(FLOAT), 1, data(torch.bool, 1, D)),
    "elements of zero-inflated": lambda: each("zero_inflated_negative_binomial", FLOAT),
    "elements of zero-inflated, bf16": lambda: each("zero_inflated_negative_binomial", HALF, False),
    "elements of poisson, double": lambda: each("poisson_rate", DOUBLE),
    "weighted, double": lambda: loss("student_t_learned", [data(DOUBLE), ONE.double()], data(DOUBLE), 3, data(HALF)),
    "weighted rows": lambda: loss("laplace", [data(FLOAT)], data(FLOAT), 1, data(torch.bool, B, 1)),
    "weighted pixels": lambda: loss("gaussian_head", [IMAGE], HALF_IMAGE, 1, data(BYTE, 64, 1, 16, 16)),
    "weighted lines": lambda: loss("poisson", [IMAGE], IMAGE, 1, data(BYTE, 64, 32, 1, 16)),
    "weighted positions": lambda: loss(
        "categorical", [data(FLOAT, 8, 4, 1000)], data(torch.int64, 8, 4), 1, data(torch.bool, 8, 4)),
    "weighted genes": lambda: genes("zero_inflated_negative_binomial_logits", FLOAT, weight=data(FLOAT, 1, D)),
    "weighted counts, double": lambda: genes("negative_binomial", DOUBLE, DOUBLE, False, data(DOUBLE)),
    "weighted mixture": lambda: loss("discretized_logistic_mixture", [PLANES], LEVELS, 1, data(BYTE, 16, 1, 32, 32)),
    "weighted logistic": lambda: loss("discretized_logistic", [PLANES[:, :6]], LEVELS, 1, data(FLOAT, 16, 3, 32, 32)),
    "odd rows, bool": lambda: loss("bernoulli", [data(FLOAT, 9, 33)], data(torch.bool, 9, 33)),
    "many rows": lambda: losses.nll_forward("bernoulli", [MANY], MANY, [], NONE, NONE, 2, 1),
    "fp16 gradient": lambda: losses.nll_gradient("bernoulli", [data(torch.float16)], data(FLOAT), [], ONE, ROWS, 2, 1),
    "learned, backward": lambda: losses.nll_backward_(ONE, NONE, [data(FLOAT)], ROWS, ROWS, ONE, B, 2, True, True),
    "mixture, bf16, grey": lambda: loss(
        "discretized_logistic_mixture", [PLANES[:, :30].bfloat16()], LEVELS[:, :1]),
    "mixture, channels_last": lambda: loss(
        "discretized_logistic_mixture", [PLANES.to(memory_format=torch.channels_last)], LEVELS),
    "mixture, no gradient": lambda: loss("discretized_logistic_mixture", [PLANES], LEVELS, 0),
    "mixture, double": lambda: loss("discretized_logistic_mixture", [PLANES.double()], LEVELS),
    "mixture of many rows": lambda: loss("discretized_logistic_mixture", [MIXED], LEVELS[0, :, 0, 0].expand(512, 3)),
    "sample gradient, nvae, bf16": lambda: sample_gradient(HALF, prior=True, form=NVAE),
    "sample, nvae, bf16": lambda: sample(HALF, prior=True, form=NVAE),
    "draws": lambda: draws(FLOAT),
    "draws, prior, bf16": lambda: draws(HALF, prior=True),
    "draws, softplus": lambda: draws(FLOAT, form=("softplus", [1e-4])),
    "draws, small latents, double": lambda: draws(DOUBLE, 20),
    "small latents": lambda: sample(FLOAT, 20),
    "sample, double": lambda: sample(DOUBLE, 20),
    "long latents": lambda: latents.gaussian_kl_forward(LONG, LONG, NONE, NONE, *LOGVAR, False),
    "bernoulli, 64-bit columns": lambda: with_64_bit_columns(lambda: bernoulli(FLOAT, FLOAT)),
    "scale, 64-bit columns": lambda: with_64_bit_columns(lambda: scale(FLOAT, False)),
    "scale, by row, 64-bit columns": lambda: with_64_bit_columns(lambda: scale(FLOAT, True)),
    "sample, 64-bit columns": lambda: with_64_bit_columns(lambda: sample(FLOAT)),
    "sample gradient, 64-bit columns": lambda: with_64_bit_columns(lambda: sample_gradient(FLOAT)),
    "kl gradient": lambda: latents.gaussian_kl_backward(data(FLOAT), data(FLOAT), data(FLOAT), NONE, NONE, *LOGVAR, 3),
    "gaussian mixture": lambda: gaussians(FLOAT, True, True, (B, 1000)),
    "gaussian mixture, joint, shared weights": lambda: gaussians(FLOAT, True, False, (1000,)),
    "gaussian mixture, per dimension, double": lambda: gaussians(DOUBLE, False, True, (1000,)),
    "gaussian mixture, double": lambda: gaussians(DOUBLE, True, True),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIGNED)
def test_aligned_calls_compile_to_wide_accesses(architecture: str, name: str) -> None:
    first, *rest = record(ALIGNED[name])
    code = compile_launch(first, architecture)
    assert code.spills == 0
    assert widest(code.loads) > 0, code.loads
    # This one reads float32 and writes bfloat16, so it writes half of what a wide access reads.
    if name != "scale elements, by row, bf16":
        assert widest(code.stores) > 0, code.stores
    # Accesses that are not wide read a number per row, or data with fewer bytes than the parameters.
    if "uint8" not in name and "scale" not in name:
        assert len(code.loads) - widest(code.loads) <= 4, code.loads
        assert len(code.stores) - widest(code.stores) <= 2, code.stores
    for launch in rest:
        assert compile_launch(launch, architecture).spills == 0


@pytest.mark.parametrize(
    "architecture", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_compile_without_spills(architecture: str, name: str) -> None:
    for launch in record(OTHERS[name]):
        assert compile_launch(launch, architecture).spills == 0


def of_counts(name: str) -> Launch:
    return next(launch for launch in record(OTHERS[name]) if launch.kernel is counts.count_kernel)


@pytest.mark.parametrize("name", ["negative binomial", "zero-inflated", "elements of zero-inflated"])
def test_counts_are_read_with_128_bits(name: str) -> None:
    """The path of zeros: logits or mean, dispersion, additional zeros and counts. The few other counts are gathered."""
    code = compile_launch(of_counts(name), "sm_90")
    assert widest(code.loads) >= 3, code.loads
    assert widest(code.stores) >= 2, code.stores


@pytest.mark.parametrize(
    ("name", "most"),
    [("negative binomial", 105), ("zero-inflated", 200), ("sparse zero-inflated, bf16", 240)],
)
def test_only_counts_that_need_it_are_computed_in_float64(name: str, most: int) -> None:
    """Zeros take at most so many instructions each, and only the last loop, over the fewest counts, uses float64."""
    launch = of_counts(name)
    # The shorter loops find and mark the values of a sparse target, and those after the third are jumps back from code
    # that is seldom run.
    loops = [loop for loop in compile_launch(launch, "sm_90").inner_loops if len(loop) > 150][:3]
    zeros, small, _ = loops
    in_float64 = [sum(bool(re.search(r"\bD(FMA|ADD|MUL|SETP)\b", x)) for x in loop) for loop in loops]
    assert in_float64[0] == 0
    assert in_float64[1] <= 4  # the logarithm of the mean, which is a sum
    assert in_float64[2] > 100
    per_thread = launch.options["COLUMNS"] // (32 * launch.options["num_warps"])
    assert len(zeros) <= most * per_thread, len(zeros) / per_thread
    assert len(small) < 500


@pytest.mark.parametrize(("name", "most"), [("multinomial", 90), ("sparse multinomial", 42)])
def test_only_large_counts_of_the_multinomial_are_computed_in_float64(name: str, most: int) -> None:
    """Zeros take at most so many instructions in both kernels together, without float64, and small counts few."""
    launches = record(OTHERS[name])
    of_kernels = [
        next(launch for launch in launches if launch.kernel is kernel)
        for kernel in (multinomial.multinomial_sums_kernel, multinomial.multinomial_kernel)
    ]
    loops = [compile_launch(launch, "sm_90").inner_loops for launch in of_kernels]
    (*_, zeros, others), (*_, gradients, small, rest) = loops
    in_float64 = [sum(bool(re.search(r"\bD(FMA|ADD|MUL|SETP)\b", x)) for x in loop)
                  for loop in (zeros, gradients, others, small, rest)]  # fmt: skip
    assert in_float64[:2] == [0, 0]
    assert in_float64[2] <= 4  # the sums of counts
    assert in_float64[3] == 0
    assert in_float64[4] > 100
    per_thread = of_kernels[0].options["COLUMNS"] // (32 * of_kernels[0].options["num_warps"])
    assert len(zeros) + len(gradients) <= most * per_thread, (len(zeros), len(gradients))
    assert len(others) + len(small) < 250


def test_several_programs_share_a_row() -> None:
    for rows, at_least in ((1, 20), (128, 20), (1000, 4)):
        cut = counts.cut_of(rows, 20_000, FLOAT, torch.device("cpu"))
        assert cut.splits >= at_least
        assert cut.splits * cut.each * cut.section >= 20_000


@pytest.mark.parametrize("name", ["negative_binomial_logits", "negative_binomial", "multinomial"])
def test_sparse_target_is_not_made_dense(name: str) -> None:
    """A call takes the memory of its gradients, one for each tensor of genes, and little more."""
    from benchmarks.timing import peak_bytes

    rows, size = 2048, 20_000
    positions = torch.empty(rows + 1, dtype=torch.int64), torch.empty(STORED, dtype=torch.int64)
    params = [data(FLOAT, rows, size)] * (1 if name == "multinomial" else 2)
    of_genes = len(params)
    params += [data(FLOAT, rows)] * (name == "negative_binomial_logits")

    def call() -> None:
        needs = (1 << len(params)) - 1
        evaluate = losses.EVALUATE[name]
        record(lambda: evaluate(name, [*params, *positions], data(FLOAT, STORED), [1e-8], needs, 1.0))

    assert peak_bytes(call, torch.device("cpu")) < (of_genes + 0.2) * 4 * rows * size


def test_calls_cover_every_kernel() -> None:
    calls = [*ALIGNED.values(), *OTHERS.values()]
    compiled = {launch.kernel.__name__ for call in calls for launch in record(call)}
    kernels = {name for module in WITH_KERNELS for name in vars(module) if name.endswith("_kernel")}
    assert compiled == kernels


def test_uint8_data_do_not_use_shared_memory() -> None:
    """The layout follows the parameters: each thread has four float32 and the four corresponding bytes."""
    launch, *_ = record(ALIGNED["bernoulli, uint8"])
    sums_only, *_ = record(ALIGNED["bernoulli"])
    shared = [len(re.findall(r"\bLDS", compile_launch(x, "sm_90").text)) for x in (launch, sums_only)]
    assert shared[0] == shared[1]


def test_one_compilation_serves_all_batch_sizes() -> None:
    """Numbers cause no new compilation: not a 1, not a multiple of 16, not the last batch of an epoch."""

    def key(rows: int) -> object:
        kernel, args, options = record(
            lambda: loss("bernoulli", [data(FLOAT, rows, 784)], data(FLOAT, rows, 784))
        )[0]
        backend = make_backend(TARGETS["sm_90"])
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        return str(bind(*args, **options)[1])

    assert key(100) == key(128) == key(113)


@pytest.mark.parametrize("table", tuning.TABLE)
def test_tuning_table_has_valid_choices(table: str) -> None:
    for (kernel, size), choice in tuning.TABLE[table].items():
        assert kernel in tuning.KERNELS
        assert size in ("small", "large")
        assert choice.tile & (choice.tile - 1) == 0
        assert choice.tile >= 32 * choice.warps or table == "interpreter"
    assert set(tuning.TABLE["default"]) == {(k, s) for k in tuning.KERNELS for s in ("small", "large")}


# ---------------------------------------------------------------------------------------------------------------------
# What is compiled again
# ---------------------------------------------------------------------------------------------------------------------


def compiled_for(launch: Launch) -> tuple[object, ...]:
    """The key of a compilation: types, alignment, specialised numbers, constants and options."""
    kernel, args, options = launch
    backend, options = make_backend(TARGETS["sm_90"]), {**options, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*args, **options)
    parsed, *source = kernel._pack_args(backend, options, bound, specialization, rest)
    return kernel.fn.__name__, repr(source), repr(parsed)


def step(rows: int, size: int, latents_: int, likelihood: str, dtype: torch.dtype) -> None:
    params, target = data(dtype, rows, size), data(FLOAT, rows, size)
    more = [ONE.to(dtype)] if likelihood == "gaussian_learned" else []
    kl, posterior = data(FLOAT, rows), data(dtype, rows, 2 * latents_).chunk(2, 1)
    latents.reparameterize_kl_forward(*posterior, NONE, NONE, *LOGVAR, False, NONE, SEED, 0, NONE, NONE)
    losses.nll_forward(likelihood, [params, *more], target, [], kl, ONE, 2, 0b11 if more else 1)
    losses.nll_backward_(ONE, NONE, [params], kl if more else NONE, kl, ONE, rows, 2, True, False)
    latents.reparameterize_kl_backward(
        data(dtype, rows, latents_), kl, *posterior, NONE, NONE, *LOGVAR, NONE, SEED, 0, NONE, 0b11
    )


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian_learned"])
@pytest.mark.parametrize(("size", "latents_"), [(784, 20), (30, 3), (1000, 1), (8100, 64)])
def test_last_batch_of_another_size_compiles_nothing(
    size: int, latents_: int, likelihood: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a class of tuning.py, for any divisors of the number of rows."""
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    first = {compiled_for(launch) for launch in record(lambda: step(128, size, latents_, likelihood, dtype))}
    for rows in (127, 96, 37, 8, 2, 1):
        last = record(lambda rows=rows: step(rows, size, latents_, likelihood, dtype))
        new = {compiled_for(launch) for launch in last} - first
        assert not new, (rows, {name for name, *_ in new})
