"""The one table of likelihoods: what the checks, the backends and the tests know of each.

A likelihood is a density and the form in which its parameters come: a Gaussian's scale may be one number of the call,
one trained number, a tensor beside the mean, or the second half of a packed head. `SPECS` has an entry for each
density. An entry and one of its forms make a variant, which is what a backend serves; `VARIANTS` has them all, by name.

To add a likelihood, add its entry here. The functions that belong to it are found by their names, in the files that are
called after its family:

    fastvae/functional/<family>.py    <density>_nll, and <density>_head_nll where its parameters may come packed
    fastvae/reference/<family>.py     the same
    fastvae/likelihoods/<family>.py   the module, named as the density in capitals: StudentT for student_t
    fastvae/_triton/<family>.py       the element, in `ELEMENTS`

csrc has a list of its own with the same variants (csrc/likelihoods.def).
"""

from typing import NamedTuple

import torch


class Constant(NamedTuple):
    """A number of the call, the same for every element."""

    name: str  # of the reference's keyword argument
    whole: bool = False  # an int; backends are handed floats
    length: int = 1  # how many numbers it is


SCALE = Constant("scale")
BOUNDS = Constant("logvar_bounds", length=2)
DF = Constant("df")
SHAPE = Constant("shape")
EPS = Constant("eps")
LEVELS = (Constant("bits", whole=True), Constant("log_scale_floor"), Constant("min_mass"))


class Form(NamedTuple):
    """How the parameters of a density come."""

    variant: str = ""  # the variant is called <density>_<variant>
    function: str = ""  # the function is called <density>_<function>_nll
    element: str = ""  # the function of an element is called <density>_<element>
    constants: tuple[Constant, ...] = ()  # besides the density's own
    has_tensor: bool = False  # the scale is a tensor, the second
    has_scalar: bool = False  # that tensor is 0-dimensional, one number for all elements
    packed: bool = False  # one tensor (B, 2C, ...) has both parameters of (B, C, ...) data
    raw: bool = False  # the tensors are the entry's `raw`
    elements: bool = False  # its function gives the value of each element too, with reduction="none"


PLAIN = Form()  # as the entry says: of a density that has no scale
FIXED = Form(constants=(SCALE,))
LEARNED = Form("learned", has_tensor=True, has_scalar=True)
PER_ELEMENT = Form("per_element", element="per_element", has_tensor=True)
HEAD = Form("head", "head", element="per_element", packed=True)
BOUNDED_PER_ELEMENT = Form("bounded_per_element", element="bounded", constants=(BOUNDS,), has_tensor=True)
BOUNDED_HEAD = Form("bounded_head", "head", element="bounded", constants=(BOUNDS,), packed=True)
PACKED = Form(packed=True)  # there is no other
RAW = Form("logits", "logits", raw=True)  # what the decoder returns, before softmax and exponential
MEAN = Form(constants=(EPS,), elements=True)  # the mean itself, to which `eps` is added
RATE = Form("rate", "rate", element="rate", constants=(EPS,), raw=True, elements=True)

SCALED = (FIXED, LEARNED, PER_ELEMENT, HEAD)

PIXELS = (torch.uint8,)  # read as x / 255
COUNTS = (torch.uint8, torch.uint16, torch.int32, torch.int64)  # each as it is


class Spec(NamedTuple):
    """One density."""

    name: str
    family: str  # continuous, counts, categorical or discretized: the word that its files are called
    tensors: tuple[str, ...]  # as the functions name them; the first has the type of all
    integers: tuple[torch.dtype, ...]  # that the target may be, beside the parameters' type and float32
    scale: str = ""  # the tensor that its scale may come in
    halves: str = ""  # what a packed head holds, in words for messages
    raw: tuple[str, ...] = ()  # the tensors of the forms RAW and RATE
    constants: tuple[Constant, ...] = ()
    forms: tuple[Form, ...] = (PLAIN,)
    # A density of (target - first parameter), whose derivative by the target is the first's, negated. Of others no
    # backend but the reference gives the target's derivative.
    is_location: bool = False
    # Every element is for itself: the kernels of all such densities are the same but for a function of the element.
    # Others have a kernel, and checks, of their own.
    elementwise: bool = True
    by_name: bool = False  # fastvae.ELBO takes the name for the module, which needs no arguments
    # (backend, type of device) that have no kernel for it. "auto" takes the next backend that has.
    lacks: tuple[tuple[str, str], ...] = ()

    @property
    def module(self) -> str:
        """The class in fastvae.likelihoods."""
        return "".join(map(str.capitalize, self.name.split("_")))


SPECS = (
    Spec(
        "bernoulli",
        "continuous",
        tensors=("logits",),
        integers=(*PIXELS, torch.bool),
        by_name=True,
    ),
    Spec(
        "gaussian",
        "continuous",
        tensors=("mean",),
        integers=PIXELS,
        scale="logvar",
        halves="mean and log-variance",
        forms=(*SCALED, BOUNDED_PER_ELEMENT, BOUNDED_HEAD),
        is_location=True,
        by_name=True,
    ),
    Spec(
        "laplace",
        "continuous",
        tensors=("loc",),
        integers=PIXELS,
        scale="log_scale",
        halves="location and log-scale",
        forms=SCALED,
        is_location=True,
        by_name=True,
    ),
    Spec(
        "continuous_bernoulli",
        "continuous",
        tensors=("logits",),
        integers=PIXELS,
        by_name=True,
    ),
    Spec(
        "student_t",
        "continuous",
        tensors=("loc",),
        integers=PIXELS,
        scale="log_scale",
        halves="location and log-scale",
        constants=(DF,),
        forms=SCALED,
        is_location=True,
    ),
    Spec(
        "gamma",
        "continuous",
        tensors=("log_scale",),
        integers=(),
        constants=(SHAPE,),
    ),
    Spec(
        "poisson",
        "counts",
        tensors=("log_rate",),
        integers=COUNTS,
        raw=("rate",),
        forms=(PLAIN, RATE),
        by_name=True,
    ),
    Spec(
        "negative_binomial",
        "counts",
        tensors=("mean", "inverse_dispersion"),
        integers=COUNTS,
        raw=("logits", "log_dispersion", "library"),
        forms=(MEAN, RAW),
        elementwise=False,
        lacks=(("native", "cuda"),),
    ),
    Spec(
        "zero_inflated_negative_binomial",
        "counts",
        tensors=("mean", "inverse_dispersion", "zi_logits"),
        integers=COUNTS,
        raw=("logits", "log_dispersion", "zi_logits", "library"),
        forms=(MEAN, RAW),
        elementwise=False,
        lacks=(("native", "cuda"),),
    ),
    Spec(
        "categorical",
        "categorical",
        tensors=("logits",),
        integers=(torch.int64,),
        constants=(Constant("ignore_index", whole=True),),
        elementwise=False,
        by_name=True,
    ),
    Spec(
        "discretized_logistic",
        "discretized",
        tensors=("params",),
        integers=(torch.uint8,),
        halves="mean and log-scale",
        constants=LEVELS,
        forms=(PACKED,),
        elementwise=False,
    ),
    Spec(
        "discretized_logistic_mixture",
        "discretized",
        tensors=("params",),
        integers=(torch.uint8,),
        constants=(Constant("components", whole=True), *LEVELS),
        elementwise=False,
    ),
)


class Variant(NamedTuple):
    """One form of one density: what a backend serves under one name. All of it follows from the `Spec`."""

    name: str
    density: str
    family: str
    function: str  # in fastvae.functional and fastvae.reference
    element: str  # in fastvae._triton and csrc; "" where the density is not elementwise
    tensors: tuple[str, ...]
    constants: tuple[Constant, ...]
    integers: tuple[torch.dtype, ...]
    is_location: bool
    has_scalar: bool  # the last tensor is 0-dimensional; the others have the shape of the first
    packed: bool
    halves: str
    elements: bool  # the op nll_elements serves it
    counts: bool  # the target counts something: uint8 is a number like the wider integers, and no pixel
    lacks: tuple[tuple[str, str], ...]

    @property
    def numbers(self) -> int:
        """How many constants a backend is handed."""
        return sum(constant.length for constant in self.constants)


def _joined(*parts: str) -> str:
    return "_".join(filter(None, parts))


def _variant(spec: Spec, form: Form) -> Variant:
    tensors = spec.raw if form.raw else spec.tensors
    if form.has_tensor:
        tensors = (*tensors, spec.scale)
    return Variant(
        name=_joined(spec.name, form.variant),
        density=spec.name,
        family=spec.family,
        function=_joined(spec.name, form.function, "nll"),
        element=_joined(spec.name, form.element) if spec.elementwise else "",
        tensors=("params",) if form.packed else tensors,
        constants=(*spec.constants, *form.constants),
        integers=spec.integers,
        is_location=spec.is_location,
        has_scalar=form.has_scalar,
        packed=form.packed,
        halves=spec.halves,
        elements=form.elements,
        counts=spec.integers is COUNTS,
        lacks=spec.lacks,
    )


VARIANTS: dict[str, Variant] = {
    variant.name: variant for variant in (_variant(spec, form) for spec in SPECS for form in spec.forms)
}


def table() -> list[tuple[str, str, str, int, int, bool, bool, bool, tuple[torch.dtype, ...]]]:
    """What csrc's table says too, variant by variant, in its order: `fastvae._C.likelihoods()` is to be the same.

    (name, family, element, tensors, constants, packed, has_scalar, is_location, integers) of each.
    """
    return [
        (
            variant.name,
            variant.family,
            variant.element,
            len(variant.tensors),
            variant.numbers,
            variant.packed,
            variant.has_scalar,
            variant.is_location,
            variant.integers,
        )
        for variant in VARIANTS.values()
    ]
