"""The table of likelihoods, from which the checks, the backends and the tests take what they know about each.

A likelihood is a density together with a form of its parameters. For example, the scale of a Gaussian may be a constant
of the call, one trained number, a tensor beside the mean, or the second half of a packed head. `SPECS` has an entry for
each density. An entry and one of its forms make a variant, which is what a backend serves; `VARIANTS` has all variants
by name.

To add a likelihood, add its entry here. Its functions are found by name, in the modules named after its family:

    fastvae/functional/<family>.py    <density>_nll, and <density>_head_nll where its parameters may come packed
    fastvae/reference/<family>.py     the same functions
    fastvae/likelihoods/<family>.py   the module, named after the density in camel case: StudentT for student_t
    fastvae/_triton/<family>.py       the function of one element, in `ELEMENTS`

The C++ code has its own list of the same variants (csrc/likelihoods.def).
"""

from typing import NamedTuple

import torch


class Constant(NamedTuple):
    """A number passed in the call, the same for every element."""

    name: str  # the name of the reference's keyword argument
    whole: bool = False  # whether it is an int; backends receive floats
    length: int = 1  # the number of floats


SCALE = Constant("scale")
BOUNDS = Constant("logvar_bounds", length=2)
DF = Constant("df")
SHAPE = Constant("shape")
EPS = Constant("eps")
LEVELS = (Constant("bits", whole=True), Constant("log_scale_floor"), Constant("min_mass"))


class Form(NamedTuple):
    """One way to pass the parameters of a density."""

    variant: str = ""  # the variant is called <density>_<variant>
    function: str = ""  # the function is called <density>_<function>_nll
    element: str = ""  # the function of an element is called <density>_<element>
    constants: tuple[Constant, ...] = ()  # in addition to the density's own
    has_tensor: bool = False  # the scale is a tensor, the second one
    has_scalar: bool = False  # that tensor is 0-dimensional, one number for all elements
    packed: bool = False  # one tensor (B, 2C, ...) holds both parameters of (B, C, ...) data
    raw: bool = False  # the tensors are those in the `raw` field of the entry
    elements: bool = False  # the function supports reduction="none", which gives the value of each element


PLAIN = Form()  # for a density without a scale
FIXED = Form(constants=(SCALE,))
LEARNED = Form("learned", has_tensor=True, has_scalar=True)
PER_ELEMENT = Form("per_element", element="per_element", has_tensor=True)
HEAD = Form("head", "head", element="per_element", packed=True)
BOUNDED_PER_ELEMENT = Form("bounded_per_element", element="bounded", constants=(BOUNDS,), has_tensor=True)
BOUNDED_HEAD = Form("bounded_head", "head", element="bounded", constants=(BOUNDS,), packed=True)
PACKED = Form(packed=True)  # for a density that only comes packed
RAW = Form("logits", "logits", raw=True)  # the decoder's raw output, before softmax and exponential
MEAN = Form(constants=(EPS,), elements=True)  # the mean itself, to which `eps` is added
RATE = Form("rate", "rate", element="rate", constants=(EPS,), raw=True, elements=True)

SCALED = (FIXED, LEARNED, PER_ELEMENT, HEAD)

PIXELS = (torch.uint8,)  # read as x / 255
COUNTS = (torch.uint8, torch.uint16, torch.int32, torch.int64)  # not scaled


class Spec(NamedTuple):
    """The entry of one density."""

    name: str
    family: str  # continuous, counts, categorical or discretized; its files have the same name
    tensors: tuple[str, ...]  # the names of the functions' tensors; the first determines the dtype of all
    integers: tuple[torch.dtype, ...]  # the target's dtypes besides the parameters' dtype and float32
    scale: str = ""  # the name of the scale, if it may be a tensor
    halves: str = ""  # what a packed head holds, for messages
    raw: tuple[str, ...] = ()  # the tensors of the forms RAW and RATE
    constants: tuple[Constant, ...] = ()
    forms: tuple[Form, ...] = (PLAIN,)
    # The density depends on (target - first parameter), so the target's gradient is that of the first, negated. For
    # other densities only the reference provides the target's gradient.
    is_location: bool = False
    # Every element is independent: all such densities share one kernel, which applies a function of one element. Others
    # have their own kernel and checks.
    elementwise: bool = True
    by_name: bool = False  # fastvae.ELBO accepts the name, because the module needs no arguments
    # The (backend, device type) pairs without a kernel for it. "auto" then uses the next backend that has one.
    lacks: tuple[tuple[str, str], ...] = ()

    @property
    def module(self) -> str:
        """The name of the class in fastvae.likelihoods."""
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
    ),
    Spec(
        "zero_inflated_negative_binomial",
        "counts",
        tensors=("mean", "inverse_dispersion", "zi_logits"),
        integers=COUNTS,
        raw=("logits", "log_dispersion", "zi_logits", "library"),
        forms=(MEAN, RAW),
        elementwise=False,
    ),
    Spec(
        "negative_binomial_mixture",
        "counts",
        # The first two are those of the other negative binomials, whose dispersion is the second.
        tensors=("mean1", "inverse_dispersion", "mean2", "mixture_logits"),
        integers=COUNTS,
        forms=(MEAN,),
        elementwise=False,
        lacks=(("triton", "cpu"), ("triton", "cuda")),
    ),
    Spec(
        "multinomial",
        "counts",
        tensors=("logits",),
        integers=COUNTS,
        elementwise=False,
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
    """One form of one density, which a backend serves under one name. It follows from the `Spec`."""

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
    elements: bool  # whether the op nll_elements serves it
    counts: bool  # the target holds counts, so uint8 is not read as x / 255
    lacks: tuple[tuple[str, str], ...]

    @property
    def numbers(self) -> int:
        """The number of constants that a backend receives."""
        return sum(constant.length for constant in self.constants)


def _join_words(*parts: str) -> str:
    return "_".join(filter(None, parts))


def _variant(spec: Spec, form: Form) -> Variant:
    tensors = spec.raw if form.raw else spec.tensors
    if form.has_tensor:
        tensors = (*tensors, spec.scale)
    return Variant(
        name=_join_words(spec.name, form.variant),
        density=spec.name,
        family=spec.family,
        function=_join_words(spec.name, form.function, "nll"),
        element=_join_words(spec.name, form.element) if spec.elementwise else "",
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
    """The table in the format of `fastvae._C.likelihoods()`, with which it must agree, including the order.

    Each entry is (name, family, element, tensors, constants, packed, has_scalar, is_location, integers).
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


# The forms in which an encoder gives the scale of a posterior, and the names of their constants. With the encoder's
# number v:
#   logvar          v = log sigma^2
#   logvar_clamp    log sigma^2 = v, clamped to [low, high], with no gradient outside
#   logvar_bounds   log sigma^2 = v, clamped smoothly between low and high
#   log_std         sigma = e^v + eps; if soft_clamp is not 0, v and the mean are first clamped to c tanh(v / c) and
#                   c tanh(mu / c), where c is soft_clamp
#   softplus        sigma = log(1 + e^v) + eps
#   variance        sigma^2 = e^v + eps
SCALE_FORMS: dict[str, tuple[str, ...]] = {
    "logvar": (),
    "logvar_clamp": ("low", "high"),
    "logvar_bounds": ("low", "high"),
    "log_std": ("soft_clamp", "eps"),
    "softplus": ("eps",),
    "variance": ("eps",),
}
