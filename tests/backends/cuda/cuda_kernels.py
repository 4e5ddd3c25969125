"""csrc/cuda without a GPU: the kernels' bodies, compiled as C++ (cuda_shim) and called as csrc/ops would call them.

The structs mirror csrc/cuda/kernels.h. A difference in size is detected when the library is loaded.
"""

import ctypes
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, Structure, byref, c_bool, c_double, c_int, c_int8, c_int64, c_uint64, c_void_p
from pathlib import Path
from types import MappingProxyType
from typing import Any

import compiled
import torch
from torch import Tensor

from fastvae._spec import VARIANTS

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SHIM = Path(__file__).parent / "cuda_shim"
SHIM_FILES = sorted(file for file in SHIM.iterdir() if file.name != "sanitized.cpp")
THREADS = 64  # in a block

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool)
COUNTS = {torch.uint8: 6, torch.uint16: 7, torch.int32: 8, torch.int64: 9}  # for a target of counts
LIST = ROOT / "csrc" / "likelihoods.def"
# The enum Element of csrc/cpu/kernels.h, in the same order.
ENUM = re.findall(r"^FASTVAE_(?:CUDA_)?ELEMENT\((\w+), \w+\)$", LIST.read_text(), re.MULTILINE)
ELEMENTS = {variant.name: ENUM.index(variant.element) for variant in VARIANTS.values() if variant.element}
LOGISTIC = ENUM.index("discretized_logistic")
KEPT: list[Tensor] = []  # owns the memory that the pointers of the last call refer to


def compiler_missing(*flags: str) -> str | None:
    """Why the kernels' bodies cannot be built here with these flags, or an empty string."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    program = (
        "#include <barrier>\n#include <ucontext.h>\n_Float16 half; int main() { getcontext(new ucontext_t); }"
    )
    with tempfile.TemporaryDirectory() as directory:
        command = ["g++", "-std=c++20", *flags, "-x", "c++", "-", "-o", f"{directory}/probe"]
        done = subprocess.run(command, input=program, text=True, capture_output=True)
    return f"this g++ lacks what the tests need: {done.stderr}" if done.returncode else None


def build(directory: Path, *flags: str, main: str = "driver.cpp", jobs: int = 2) -> Path:
    """Compile the kernels and `main` for the CPU, and return the library or the program."""
    program = "-shared" not in flags
    common = ["g++", "-std=c++20", "-pthread", "-fno-strict-aliasing", f"-DFASTVAE_THREADS={THREADS}"]
    common += [f"-I{SHIM}", f"-I{ROOT / 'csrc' / 'cuda'}", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    common += [flag for flag in flags if flag != "-shared"]

    def compile_one(source: Path) -> Path:
        target = directory / f"{source.name}.o"
        subprocess.run([*common, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, [*SOURCES, SHIM / main]))
    result = directory / ("program" if program else "kernels.so")
    link = [*common, *(() if program else ("-shared",)), *map(str, objects), "-o", str(result)]
    subprocess.run(link, check=True)
    return result


def library() -> Path:
    """The kernels and driver.cpp as a library, which is kept between runs."""
    flags = ("-O1", "-fPIC", "-shared")
    csrc = ROOT / "csrc"
    sources = (csrc / "cuda", csrc / "math", csrc / "cpu" / "kernels.h", LIST, *SHIM_FILES, Path(__file__))
    return compiled.kept("cuda_kernels", sources, flags, lambda folder: build(folder, *flags)) / "kernels.so"


# ---------------------------------------------------------------------------------------------------------------------
# kernels.h
# ---------------------------------------------------------------------------------------------------------------------


class Operand(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("type", c_int8),
        ("row_stride", c_int64),
        ("run", c_int64),
        ("run_stride", c_int64),
    )


class Weights(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("type", c_int8),
        ("row_stride", c_int64),
        ("levels", c_int),
        ("sizes", c_int64 * 4),
        ("strides", c_int64 * 4),
        ("inverses", c_uint64 * 4),
    )


class Numbers(Structure):
    _fields_ = (("data", c_void_p), ("type", c_int8), ("stride", c_int64))


class Output(Structure):
    _fields_ = (("data", c_void_p), ("type", c_int8))


class Plan(Structure):
    """A struct of plan.h."""

    _fields_ = (
        ("lanes", c_int),
        ("lanes_log2", c_int),
        ("splits", c_int),
        ("split_size", c_int64),
        ("items", c_int64),
        ("blocks", c_int),
    )


class Workspace(Structure):
    _fields_ = (("scratch", c_void_p), ("counter", c_void_p))


class NllArgs(Structure):
    _fields_ = (
        ("element", c_int8),
        ("rows", c_int64),
        ("size", c_int64),
        ("params", Operand * 4),
        ("target", Operand),
        ("target_rows", c_int64),
        ("weights", Weights),
        ("constants", c_double * 5),
        ("normaliser", c_double),
        ("scalar", Numbers),
        ("grads", Operand * 4),
        ("weight", c_double),
        ("grad_loss", Numbers),
        ("grad_nll", Numbers),
        ("kl", Numbers),
        ("beta", Numbers),
        ("reduced", c_bool),
        ("loss", Output),
        ("nll", Output),
        ("scalar_rows", Output),
        ("values", Operand),
        ("workspace", Workspace),
    )


class MixtureArgs(NllArgs):
    _fields_ = (
        ("pixels", c_int64),
        ("channels", c_int64),
        ("components", c_int64),
        ("alternate", c_bool),
    )


class CategoricalArgs(NllArgs):
    _fields_ = (("positions", c_int64), ("classes", c_int64), ("ignored", c_int64))


class CountArgs(NllArgs):
    _fields_ = (
        ("raw", c_bool),
        ("shared_dispersion", c_bool),
        ("library", Numbers),
        ("shared_gradient", Output),
        ("library_gradient", Output),
        ("log_mean_grads", Operand),
        ("starts", c_void_p),
        ("columns", c_void_p),
        ("stored", c_int64),
    )


class SmallGradient(Structure):
    _fields_ = (("gradient", Output), ("result", Output), ("count", c_int64))


class NllBackwardArgs(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("size", c_int64),
        ("gradients", Operand * 4),
        ("results", Operand * 4),
        ("weight", c_double),
        ("grad_loss", Numbers),
        ("grad_nll", Numbers),
        ("scalar_rows", Numbers),
        ("kl", Numbers),
        ("beta", Numbers),
        ("scalar_gradient", Output),
        ("kl_gradient", Output),
        ("beta_gradient", Output),
        ("small", SmallGradient * 2),
        ("workspace", Workspace),
    )


class NoiseSource(Structure):
    _fields_ = (
        ("tensor", c_void_p),
        ("seed", c_uint64),
        ("offset", c_uint64),
        ("seed_pointer", c_void_p),
        ("offset_pointer", c_void_p),
        ("offset_intragraph", c_uint64),
        ("captured", c_bool),
        ("row_offset", c_int64),
    )


class ScaleForm(Structure):
    _fields_ = (("kind", c_int8), ("constants", c_double * 3), ("soft", c_double))

    KINDS = ("logvar", "clamped", "bounded", "log_std", "shifted_log_std", "softplus", "shifted_variance")


def scale_form(name: str, constants: Sequence[float]) -> ScaleForm:
    """As csrc/ops/latents.cpp makes it."""
    first, second = (*constants, 0.0, 0.0)[:2]
    kind, numbers, soft = name, (first, second, 0.0), 0.0
    if name == "logvar_clamp":
        kind = "clamped"
    elif name == "logvar_bounds":
        half = (second - first) / 2
        kind, numbers = "bounded", (first + half, half, 1 / half)
    elif name == "log_std":
        soft = first
        kind, numbers = (
            ("shifted_log_std", (math.log(second), 0.0, 0.0)) if second else (name, (0.0, 0.0, 0.0))
        )
    elif name == "variance":
        kind, numbers = (
            ("shifted_variance", (math.log(first), 0.0, 0.0)) if first else ("logvar", (0.0, 0.0, 0.0))
        )
    return ScaleForm(kind=ScaleForm.KINDS.index(kind), constants=(c_double * 3)(*numbers), soft=soft)


_LATENTS = (
    ("form", ScaleForm),
    ("rows", c_int64),
    ("size", c_int64),
    ("draws", c_int64),
    ("mu", Operand),
    ("logvar", Operand),
    ("prior_mu", Operand),
    ("prior_logvar", Operand),
    ("eps", Operand),
    ("eps_draw_stride", c_int64),
    ("noise", NoiseSource),
)


class SampleArgs(Structure):
    _fields_ = (
        *_LATENTS,
        ("z", Operand),
        ("z_draw_stride", c_int64),
        ("row_kl", Output),
        ("element_kl", Operand),
        ("used_seed", c_void_p),
        ("workspace", Workspace),
    )


class SampleGradArgs(Structure):
    _fields_ = (
        *_LATENTS,
        ("grad_z", Operand),
        ("grad_z_draw_stride", c_int64),
        ("grad_kl", Numbers),
        ("element_grad_kl", Operand),
        ("posterior_weight", c_double),
        ("prior_weight", c_double),
        ("grad_mu", Operand),
        ("grad_logvar", Operand),
        ("grad_prior_mu", Operand),
        ("grad_prior_logvar", Operand),
        ("grad_eps", Operand),
        ("grad_eps_draw_stride", c_int64),
    )


_GAUSSIAN_MIXTURE = (
    ("points", c_int64),
    ("components", c_int64),
    ("dims", c_int64),
    ("z", Operand),
    ("mu", Operand),
    ("logvar", Operand),
    ("log_weight", Operand),
    ("workspace", Workspace),
)


class GaussianMixtureValueArgs(Structure):
    _fields_ = (*_GAUSSIAN_MIXTURE, ("joint", Output), ("per_dimension", Output))


class GaussianMixtureGradArgs(Structure):
    _fields_ = (
        *_GAUSSIAN_MIXTURE,
        ("joint", c_void_p),
        ("per_dimension", c_void_p),
        ("grad_joint", Numbers),
        ("grad_per_dimension", c_void_p),
        ("of_rows", c_bool),
        ("grad_z", Output),
        ("grad_mu", Output),
        ("grad_logvar", Output),
        ("grad_log_weight", Output),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


def pointer(tensor: Tensor) -> int:
    KEPT.append(tensor)
    return tensor.data_ptr()


def event_size(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def operand(tensor: Tensor | None, counts: Mapping[torch.dtype, int] = MappingProxyType({})) -> Operand:
    """Views of dense rows, in any memory order."""
    if tensor is None:
        return Operand()
    kind = counts[tensor.dtype] if tensor.dtype in counts else DTYPES.index(tensor.dtype)
    return Operand(pointer(tensor), kind, tensor.stride(0), event_size(tensor), 0)


def weights_of(weight: Tensor | None, sizes: Sequence[int]) -> Weights:
    """A level for each dimension, although csrc/ops joins those that it can. The elements are in contiguous order."""
    if weight is None:
        return Weights()
    kind = DTYPES.index(weight.dtype) if weight.dtype != torch.uint8 else COUNTS[torch.uint8]
    strides = [weight.stride(i) if weight.shape[i] > 1 else 0 for i in range(weight.dim())]
    view = Weights(pointer(weight), kind, strides[0], max(1, weight.dim() - 1))
    view.sizes[: len(sizes) - 1] = list(reversed(sizes[1:]))
    view.inverses[: len(sizes) - 1] = [(2**63 - 1) // max(1, size) + 1 for size in reversed(sizes[1:])]
    view.strides[: len(sizes) - 1] = list(reversed(strides[1:]))
    return view


def numbers(tensor: Tensor | None) -> Numbers:
    if tensor is None:
        return Numbers()
    return Numbers(pointer(tensor), DTYPES.index(tensor.dtype), tensor.stride(0) if tensor.dim() else 0)


def output(tensor: Tensor | None) -> Output:
    return Output(pointer(tensor), DTYPES.index(tensor.dtype)) if tensor is not None else Output()


def target_rows(params: Tensor, target: Tensor) -> int:
    return 0 if target.shape[0] == params.shape[0] else target.shape[0]


def takes_turns(planes: Tensor) -> bool:
    """Whether the planes of dimension 1 alternate at every pixel, as in channels_last, and are not only strided."""
    return planes.dim() > 2 and not planes.is_contiguous() and planes.stride(1) == 1


def halves(whole: Tensor, channels: int) -> list[Operand]:
    """The mean and the log-variance of a packed head."""
    in_turns = takes_turns(whole)
    size = event_size(whole) // 2
    run = channels if in_turns else size
    first, second = operand(whole), operand(whole)
    for which, view in enumerate((first, second)):
        view.data = (view.data or 0) + which * run * whole.element_size()
        view.run = run
        view.run_stride = 2 * channels if in_turns else 0
    return [first, second]


def row_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that nobody has written holds NaN."""
    return torch.full(tuple(shape), math.nan, dtype=dtype)


def poisoned_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, math.nan)  # in the same memory order


# ---------------------------------------------------------------------------------------------------------------------
# The ops
# ---------------------------------------------------------------------------------------------------------------------


def same_for_all(likelihood: str, constants: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Return (normaliser, constants of the kernel) as in csrc/ops/likelihood_table.h, where a learned scale is 1."""
    family = likelihood.split("_")[0]
    if "bounded" in likelihood:
        lo, hi = constants
        return 0.5 * math.log(2 * math.pi), ((lo + hi) / 2, (hi - lo) / 2, 2 / (hi - lo))
    if family == "gaussian":
        scale = constants[0] if constants else 1.0
        return 0.5 * math.log(2 * math.pi) + math.log(scale), (scale**-0.5, 1 / scale, -math.log(scale))
    if family == "laplace":
        scale = constants[0] if constants else 1.0
        return math.log(2) + math.log(scale), (scale**-0.5, 1 / scale, -math.log(scale))
    if likelihood == "poisson_rate":
        return 0.0, (constants[0], 0.0)
    if family == "gamma":
        return math.lgamma(constants[0]), (constants[0], constants[0] - 1)
    if family == "student":
        df, scale = (*constants, 1.0)[:2]
        beta = math.lgamma(df / 2) + math.lgamma(0.5) - math.lgamma((df + 1) / 2)
        log_inverse = -math.log(scale) - math.log(df) / 2
        return beta - log_inverse, (math.exp(log_inverse / 2), math.exp(log_inverse), log_inverse, df + 1)
    return 0.0, (0.0, 0.0)


class Kernels:
    """The ops of csrc/ops/library.cpp on CPU tensors, with one launch each."""

    def __init__(self, library: Path) -> None:
        self.library = CDLL(str(library))
        for name in (
            "size_of",
            "place",
            "run_nll_scratch",
            "run_nll_backward_scratch",
            "run_mixture_scratch",
            "run_categorical_scratch",
            "run_count_nll_scratch",
            "run_count_mixture_scratch",
            "run_multinomial_scratch",
            "run_sample_scratch",
            "run_gaussian_mixture_scratch",
            "run_gaussian_mixture_grad_scratch",
        ):
            getattr(self.library, name).restype = c_int64
        structs = (
            NllArgs,
            MixtureArgs,
            CategoricalArgs,
            NllBackwardArgs,
            SampleArgs,
            SampleGradArgs,
            Plan,
            CountArgs,
            GaussianMixtureValueArgs,
            GaussianMixtureGradArgs,
        )
        for i, struct in enumerate(structs):
            assert self.library.size_of(i) == ctypes.sizeof(struct), struct.__name__
        self.counter = torch.zeros(2, dtype=torch.int32)
        self.processors = 1

    @property
    def processors(self) -> int:
        return self._processors

    @processors.setter
    def processors(self, count: int) -> None:
        self._processors = count
        self.library.set_processors(count)

    def plan(self, rows: int, size: int, unit: int, unroll: int, slots: int) -> Plan:
        plan = Plan()
        self.library.plan(c_int64(rows), c_int64(size), unit, unroll, c_int64(slots), byref(plan))
        return plan

    def place(self, i: int, run: int, run_stride: int) -> int:
        """The offset of element i in a row that consists of runs."""
        return self.library.place(c_int64(i), c_int64(run), c_int64(run_stride))

    def _run(self, name: str, args: Any, *, scratch: bool = True) -> None:
        if scratch:
            size = getattr(self.library, f"{name}_scratch")(byref(args))
            args.workspace.scratch = pointer(poisoned((size // 8,), torch.float64)) if size else None
            args.workspace.counter = pointer(self.counter)
        before = self.library.launches()
        error = getattr(self.library, name)(byref(args))
        assert error == 0
        assert self.library.launches() <= before + 1
        assert not self.counter.any()
        KEPT.clear()

    def _nll_args(
        self,
        likelihood: str,
        params: Sequence[Tensor],
        target: Tensor,
        constants: Sequence[float],
        needs: int,
    ) -> tuple[NllArgs, list[Tensor]]:
        args = NllArgs(element=ELEMENTS[likelihood], rows=params[0].shape[0], size=event_size(target))
        args.target_rows = target_rows(params[0], target)
        args.normaliser, same = same_for_all(likelihood, constants)
        args.constants[: len(same)] = same
        elementwise = list(params)
        if likelihood.endswith("_learned"):
            args.scalar = numbers(elementwise.pop())
        args.target = operand(target, COUNTS if VARIANTS[likelihood].counts else {})
        grads = [poisoned_like(p) if needs >> i & 1 else None for i, p in enumerate(elementwise)]
        if likelihood.endswith("_head"):
            args.params[:2] = halves(params[0], target.shape[1])
            if grads[0] is not None:
                args.grads[:2] = halves(grads[0], target.shape[1])
        else:
            for i, p in enumerate(elementwise):
                args.params[i], args.grads[i] = operand(p), operand(grads[i])
        return args, [grad for grad in grads if grad is not None]

    def nll_forward(
        self,
        likelihood: str,
        params: Sequence[Tensor],
        target: Tensor,
        constants: Sequence[float] = (),
        kl: Tensor | None = None,
        beta: Tensor | None = None,
        reduction: int = 2,
        needs: int = 0,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        args, gradients = self._nll_args(likelihood, params, target, constants, needs)
        args.weights = weights_of(weight, target.shape)
        rows, dtype = params[0].shape[0], row_dtype(params[0])
        nll = poisoned((rows,), dtype)
        loss_dtype = torch.float64 if kl is not None and kl.dtype == torch.float64 else dtype
        loss = poisoned(() if reduction else (rows,), loss_dtype)
        wants_scalar = likelihood.endswith("_learned") and needs >> 1 & 1
        scalar_rows = poisoned((rows,), dtype) if wants_scalar else None
        args.weight = self.weight(reduction, rows)
        args.nll, args.loss, args.reduced = output(nll), output(loss), reduction != 0
        args.kl, args.beta, args.scalar_rows = numbers(kl), numbers(beta), output(scalar_rows)
        self._run("run_nll", args)
        return loss, nll, gradients, scalar_rows

    @staticmethod
    def weight(reduction: int, rows: int) -> float:
        return (1.0 / rows if rows else math.inf) if reduction == 2 else 1.0

    def logistic(
        self,
        params: Tensor,
        target: Tensor,
        components: int = 0,
        *,
        levels: int = 255,
        floor: float = -7.0,
        small: float = 1e-5,
        reduction: int = 2,
        grad_nll: Tensor | None = None,
        with_gradient: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss, nll, gradient) of a discretised logistic or a mixture; with `grad_nll`, only the gradient is
        computed."""
        rows, channels, size = params.shape[0], target.shape[1], event_size(target)
        args = MixtureArgs(element=LOGISTIC, rows=rows, size=size, components=components, channels=channels)
        args.pixels, args.alternate = size // channels, takes_turns(params)
        args.target_rows = target_rows(params, target)
        args.constants[:] = levels, 1 / levels, math.log(2 / levels), floor, small
        args.weight, args.reduced = self.weight(reduction, rows), reduction != 0
        args.target = operand(target, COUNTS)
        grads = poisoned_like(params)
        if components:
            args.params[0], args.grads[0] = operand(params), operand(grads if with_gradient else None)
        else:
            args.params[:2] = halves(params, channels)
            if with_gradient:
                args.grads[:2] = halves(grads, channels)
        nll, loss = (
            poisoned((rows,), row_dtype(params)),
            poisoned(() if reduction else (rows,), row_dtype(params)),
        )
        if grad_nll is None:
            args.nll, args.loss = output(nll), output(loss)
        args.grad_nll = numbers(grad_nll)
        self._run("run_mixture" if components else "run_nll", args)
        return loss, nll, grads

    def categorical(
        self,
        logits: Tensor,
        target: Tensor,
        ignored: int = -100,
        *,
        reduction: int = 2,
        grad_nll: Tensor | None = None,
        with_gradient: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss, nll, gradient); with `grad_nll`, only the gradient is computed."""
        rows, positions = logits.shape[0], event_size(target)
        args = CategoricalArgs(rows=rows, size=positions, positions=positions, ignored=ignored)
        args.classes, args.target_rows = logits.shape[-1], target_rows(logits, target)
        args.weight, args.reduced = self.weight(reduction, rows), reduction != 0
        args.target, args.params[0] = operand(target, COUNTS), operand(logits)
        grads = poisoned_like(logits)
        args.grads[0] = operand(grads if with_gradient else None)
        nll, loss = (
            poisoned((rows,), row_dtype(logits)),
            poisoned(() if reduction else (rows,), row_dtype(logits)),
        )
        if grad_nll is None:
            args.nll, args.loss = output(nll), output(loss)
        args.grad_nll = numbers(grad_nll)
        self._run("run_categorical", args)
        return loss, nll, grads

    def counts(
        self,
        likelihood: str,
        params: Sequence[Tensor],
        target: Tensor,
        *,
        eps: float = 0.0,
        positions: tuple[Tensor, Tensor] | None = None,
        reduction: int = 1,
        grad_nll: Tensor | None = None,
        with_gradient: bool = True,
        elements: bool = False,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        """Return (loss, nll, gradients, values of the elements); with `grad_nll`, only gradients are computed.

        `positions` are the crow_indices and the col_indices of a sparse target, whose values `target` then holds.
        """
        lead, raw = params[0], likelihood.endswith("_logits")
        rows, features = lead.shape
        args = CountArgs(element=-1, rows=rows, size=features, raw=raw)
        args.weight, args.reduced = self.weight(reduction, rows), reduction != 0
        args.constants[0] = eps
        dtype = row_dtype(lead)
        of_element = dtype if elements else lead.dtype
        gradients = []
        names = (
            ("logits", "dispersion", "zi_logits", "library") if raw else ("mean", "dispersion", "zi_logits")
        )
        if likelihood == "multinomial":
            names = ("logits",)
        elif likelihood == "negative_binomial_mixture":
            names = ("mean", "dispersion", "mean2", "mixture_logits")
        elif not likelihood.startswith("zero_inflated"):
            names = tuple(name for name in names if name != "zi_logits")
        for name, param in zip(names, params, strict=True):
            is_shared = name == "dispersion" and param.dim() == 1
            small = (is_shared and not elements) or name == "library"
            gradient = poisoned(param.shape, param.dtype) if small else poisoned((rows, features), of_element)
            if with_gradient:
                gradients.append(gradient)
            if name == "library":
                args.library = numbers(param)
                args.library_gradient = output(gradient if with_gradient else None)
                continue
            i = {"dispersion": 1, "zi_logits": 2, "mixture_logits": 2, "mean2": 3}.get(name, 0)
            args.params[i] = operand(param)
            if is_shared:
                args.shared_dispersion = True
                args.params[i].row_stride, args.params[i].run = 0, features
            if small:
                args.shared_gradient = output(gradient if with_gradient else None)
            else:
                args.grads[i] = operand(gradient if with_gradient else None)
        if raw and with_gradient:
            same = lead.dtype == dtype
            args.log_mean_grads = args.grads[0] if same else operand(poisoned((rows, features), dtype))
        args.target = operand(target, COUNTS)
        args.target_rows = target_rows(lead, target)
        if positions is not None:
            starts, columns = positions
            args.starts, args.columns, args.stored = pointer(starts), pointer(columns), target.numel()
            repeated = starts.numel() - 1
            args.target_rows = 0 if repeated == rows else repeated
        args.weights = weights_of(weight, (args.target_rows or rows, features))
        values = poisoned((rows, features), dtype) if elements else None
        if elements:
            args.values = operand(values)
        nll, loss = poisoned((rows,), dtype), poisoned(() if reduction else (rows,), dtype)
        if grad_nll is None:
            args.nll, args.loss = output(nll), output(loss)
        args.grad_nll = numbers(grad_nll)
        kernels = {"multinomial": "run_multinomial", "negative_binomial_mixture": "run_count_mixture"}
        self._run(kernels.get(likelihood, "run_count_nll"), args)
        return loss, nll, gradients, values

    def nll_gradient(
        self,
        likelihood: str,
        params: Sequence[Tensor],
        target: Tensor,
        constants: Sequence[float],
        grad_loss: Tensor | None,
        grad_nll: Tensor | None,
        reduction: int,
        needs: int,
    ) -> list[Tensor]:
        args, gradients = self._nll_args(likelihood, params, target, constants, needs)
        args.weight = self.weight(reduction, target.shape[0])
        args.grad_loss, args.grad_nll = numbers(grad_loss), numbers(grad_nll)
        self._run("run_nll", args)
        return gradients

    def nll_backward(
        self,
        grad_loss: Tensor | None,
        grad_nll: Tensor | None,
        gradients: Sequence[Tensor],
        scalar_rows: Tensor | None,
        kl: Tensor | None,
        beta: Tensor | None,
        rows: int,
        reduction: int,
        *,
        in_place: bool,
        need_kl: bool = False,
        need_beta: bool = False,
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None, Tensor | None]:
        size = event_size(gradients[0]) if gradients else 0
        args = NllBackwardArgs(rows=rows, size=size, weight=self.weight(reduction, rows))
        results = list(gradients) if in_place else [poisoned_like(g) for g in gradients]
        for i, (gradient, result) in enumerate(zip(gradients, results, strict=True)):
            args.gradients[i], args.results[i] = operand(gradient), operand(result)
        args.grad_loss, args.grad_nll = numbers(grad_loss), numbers(grad_nll)
        args.scalar_rows, args.kl, args.beta = numbers(scalar_rows), numbers(kl), numbers(beta)
        scalar = poisoned((), scalar_rows.dtype) if scalar_rows is not None else None
        by_kl = poisoned((rows,), kl.dtype) if need_kl and kl is not None else None
        by_beta = poisoned((), beta.dtype) if need_beta and beta is not None else None
        args.scalar_gradient, args.kl_gradient, args.beta_gradient = map(output, (scalar, by_kl, by_beta))
        self._run("run_nll_backward", args)
        return results, scalar, by_kl, by_beta

    @staticmethod
    def _gaussian_mixture(
        args: Any, z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor | None
    ) -> None:
        args.points, args.dims = z.shape
        args.components = mu.shape[0]
        args.z, args.mu, args.logvar = map(operand, (z, mu, logvar))
        if log_weight is not None:
            args.log_weight = operand(log_weight)
            args.log_weight.row_stride = log_weight.stride(0) if log_weight.dim() == 2 else 0

    def gaussian_mixture(
        self, inputs: Sequence[Tensor], *, joint: bool, per_dimension: bool
    ) -> tuple[Tensor, ...]:
        """The densities that are requested, of (z, mu, logvar) and perhaps log-weights."""
        z, mu, logvar, log_weight = (*inputs, None)[:4]
        assert z is not None
        args = GaussianMixtureValueArgs()
        self._gaussian_mixture(args, z, mu, logvar, log_weight)
        values = [poisoned(z.shape[:1], row_dtype(z)), poisoned(z.shape, row_dtype(z))]
        if joint:
            args.joint = output(values[0])
        if per_dimension:
            args.per_dimension = output(values[1])
        self._run("run_gaussian_mixture", args)
        return tuple(value for value, wanted in zip(values, (joint, per_dimension), strict=True) if wanted)

    def gaussian_mixture_grad(
        self,
        inputs: Sequence[Tensor],
        joint: tuple[Tensor, Tensor] | None,
        per_dimension: tuple[Tensor, Tensor] | None,
    ) -> list[Tensor]:
        """The gradients of all inputs. `joint` and `per_dimension` are values and their gradients."""
        z, mu, logvar, log_weight = (*inputs, None)[:4]
        assert z is not None
        args = GaussianMixtureGradArgs()
        self._gaussian_mixture(args, z, mu, logvar, log_weight)
        if joint is not None:
            args.joint, args.grad_joint = pointer(joint[0]), numbers(joint[1])
        if per_dimension is not None:
            args.per_dimension, args.grad_per_dimension = map(pointer, per_dimension)
        args.of_rows = log_weight is not None and log_weight.dim() == 2
        gradients = [poisoned(x.shape, x.dtype) for x in inputs]
        names = ("grad_z", "grad_mu", "grad_logvar", "grad_log_weight")
        for name, gradient in zip(names, gradients, strict=False):
            setattr(args, name, output(gradient))
        self._run("run_gaussian_mixture_grad", args)
        return gradients

    def _latents(
        self,
        args: Any,
        mu: Tensor,
        logvar: Tensor,
        prior: Sequence[Tensor] | None,
        noise: NoiseSource | None,
        eps: Tensor | None,
        samples: int | None,
    ) -> None:
        args.rows, args.size = mu.shape[0], event_size(mu)
        args.draws = 1 if samples is None else samples
        args.mu, args.logvar = operand(mu), operand(logvar)
        if prior is not None:
            args.prior_mu, args.prior_logvar = map(operand, prior)
        if noise is not None:
            args.noise = noise
        args.eps, args.eps_draw_stride = self._draws(eps, samples)

    @staticmethod
    def _draws(tensor: Tensor | None, samples: int | None) -> tuple[Operand, int]:
        if tensor is None:
            return Operand(), 0
        return (operand(tensor), 0) if samples is None else (operand(tensor[0]), tensor.stride(0))

    def sample(
        self,
        mu: Tensor,
        logvar: Tensor,
        prior: Sequence[Tensor] | None = None,
        *,
        noise: NoiseSource | None = None,
        eps: Tensor | None = None,
        samples: int | None = None,
        form: tuple[str, Sequence[float]] = ("logvar", ()),
    ) -> tuple[Tensor, Tensor, Tensor]:
        args = SampleArgs(form=scale_form(*form))
        self._latents(args, mu, logvar, prior, noise, eps, samples)
        z = poisoned(mu.shape if samples is None else (samples, *mu.shape), mu.dtype)
        kl, used = poisoned((mu.shape[0],), row_dtype(mu)), torch.full((2,), -1)
        args.z, args.z_draw_stride = self._draws(z, samples)
        args.row_kl, args.used_seed = output(kl), pointer(used)
        self._run("run_sample", args)
        return z, kl, used

    def kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        prior: Sequence[Tensor] | None = None,
        *,
        per_element: bool = False,
        form: tuple[str, Sequence[float]] = ("logvar", ()),
    ) -> Tensor:
        args = SampleArgs(form=scale_form(*form))
        self._latents(args, mu, logvar, prior, None, None, 0)
        kl = poisoned(mu.shape if per_element else (mu.shape[0],), row_dtype(mu))
        if per_element:
            args.element_kl = operand(kl)
        else:
            args.row_kl = output(kl)
        self._run("run_sample", args)
        return kl

    def sample_grad(
        self,
        grad_z: Tensor | None,
        grad_kl: Tensor | None,
        mu: Tensor,
        logvar: Tensor,
        prior: Sequence[Tensor] | None = None,
        *,
        noise: NoiseSource | None = None,
        eps: Tensor | None = None,
        samples: int | None = None,
        per_element: bool = False,
        form: tuple[str, Sequence[float]] = ("logvar", ()),
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> list[Tensor]:
        """The gradients of mu, logvar, the prior and eps, as far as they exist."""
        args = SampleGradArgs(form=scale_form(*form), posterior_weight=weights[0], prior_weight=weights[1])
        self._latents(args, mu, logvar, prior, noise, eps, samples)
        args.grad_z, args.grad_z_draw_stride = self._draws(grad_z, samples)
        if per_element:
            args.element_grad_kl = operand(grad_kl)
        else:
            args.grad_kl = numbers(grad_kl)
        gradients = [poisoned(mu.shape, mu.dtype) for _ in range(2 if prior is None else 4)]
        names = ("grad_mu", "grad_logvar", "grad_prior_mu", "grad_prior_logvar")
        for name, gradient in zip(names, gradients, strict=False):
            setattr(args, name, operand(gradient))
        if eps is not None and grad_z is not None:
            gradients.append(poisoned_like(eps))
            args.grad_eps, args.grad_eps_draw_stride = self._draws(gradients[-1], samples)
        self._run("run_sample_grad", args, scratch=False)
        return gradients
