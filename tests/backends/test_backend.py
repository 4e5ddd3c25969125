"""Choosing a backend, falling back from one that is missing, and saying what is there."""

import re
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastvae
import fastvae.functional as fv
from fastvae.backends import OPS, Backend, available, choose, native
from fastvae.backends.base import Missing

A = torch.zeros(2, 3)


def serving() -> str:
    return choose.for_tensor(A).name


# --- Choosing ---------------------------------------------------------------------------------------------------------


def test_auto_is_native_here() -> None:
    """`make test` is there for the compiled kernels: falling back fails."""
    assert choose.setting == "auto"
    assert serving() == "native"
    assert choose.for_tensor(A) is choose.for_tensor(A.double())


def test_use_backend_restores_what_was_set() -> None:
    with fastvae.use_backend("reference"):
        assert serving() == "reference"
        with fastvae.use_backend("native"):
            assert serving() == "native"
        assert serving() == "reference"
        with pytest.raises(KeyError), fastvae.use_backend("native"):
            raise KeyError
        assert serving() == "reference"
        with pytest.raises(ValueError, match="nonsense"), fastvae.use_backend("nonsense"):
            pass
        assert serving() == "reference"
    assert choose.setting == "auto"


def test_set_backend_stays_until_set_again() -> None:
    try:
        fastvae.set_backend("reference")
        assert serving() == "reference"
    finally:
        fastvae.set_backend("auto")
    assert serving() == "native"


def test_the_setting_decides_who_computes(backend: str) -> None:
    """The reference leaves ordinary autograd nodes, the kernels their own: the setting is more than a label."""
    out = fv.bernoulli_nll(A.clone().requires_grad_(), A)
    assert ("Nll" in out.grad_fn.name()) == (backend != "reference")


@pytest.mark.parametrize("name", ["auto", "native", "reference"])
def test_other_devices_go_to_the_reference(name: str) -> None:
    meta = torch.zeros(2, 3, device="meta")
    with fastvae.use_backend(name):
        assert fv.bernoulli_nll(meta, meta).shape == (2,)


def test_a_backward_belongs_to_the_forward(backend: str) -> None:
    """Switching between forward and backward, or on another thread, changes nothing."""
    a = torch.randn(2, 3, requires_grad=True)
    loss = fv.bernoulli_nll(a, A).sum()
    with fastvae.use_backend("reference" if backend == "native" else "native"):
        loss.backward()
    torch.testing.assert_close(a.grad, torch.sigmoid(a.detach()))


# --- Plain calls ------------------------------------------------------------------------------------------------------


B = torch.rand(2, 3)
KL = torch.rand(2)
ONE = torch.ones(())


def test_plain_calls_skip_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training loop calls on a CPU goes straight to the kernels, and gives the same bits."""
    mu, logvar = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)

    def call() -> list[torch.Tensor]:
        torch.manual_seed(7)
        z, kl = fv.reparameterize_kl(mu, logvar)
        out = fastvae.ELBO("gaussian")(z[:, :3], B, kl=kl)
        of_bytes = fastvae.likelihoods.DiscretizedLogistic().nll(
            torch.zeros(2, 6), torch.ones(2, 3, dtype=torch.uint8)
        )
        per_element = fv.gaussian_kl(mu, logvar, reduction="none")
        return [z, kl, *out, of_bytes, per_element, *torch.autograd.grad(out.loss, (mu, logvar))]

    with monkeypatch.context() as patch:
        patch.setattr(choose, "fast_path", None)
        expected = call()
    monkeypatch.delattr(fv.latents, "_check_posterior")
    for name in ("check_elements", "check_kl", "CHECKS"):
        monkeypatch.delattr(fv.loss, name)
    monkeypatch.delattr(choose, "for_tensor")
    assert all(map(torch.equal, call(), expected))


def _inside(mode: object, call: Callable[[], object]) -> object:
    with mode:  # type: ignore[attr-defined]
        return call()


def _transformed() -> object:
    """Also of tensors that the transform leaves alone."""
    found = []

    def call(a: torch.Tensor) -> torch.Tensor:
        found.extend(
            [choose.fast_path.gaussian_kl(a, a, False), choose.fast_path.gaussian_kl(B, B, False), _nll([A])]
        )
        return a

    torch.func.vmap(call)(A)
    return next((result for result in found if result is not None), None)


def _with_tangent() -> object:
    with torch.autograd.forward_ad.dual_level():
        return choose.fast_path.gaussian_kl(torch.autograd.forward_ad.make_dual(B, B), B, False)


class Subclass(torch.Tensor):
    pass


def _nll(params: object, target: object = B, *rest: object, likelihood: str = "bernoulli") -> object:
    kl, beta = rest or (None, None)
    return choose.fast_path.nll(likelihood, params, target, [], kl, beta, 0)


UNUSUAL: dict[str, Callable[[], object]] = {
    "no tensor": lambda: _nll([None]),
    "an array": lambda: _nll([A], A.numpy()),
    "a subclass": lambda: _nll([A.as_subclass(Subclass)]),
    "a target of a subclass": lambda: _nll([A], B.as_subclass(Subclass)),
    "another device": lambda: _nll([A.to("meta")]),
    "a target on another device": lambda: _nll([A], B.to("meta")),
    "sparse": lambda: _nll([A.to_sparse()]),
    "nested": lambda: _nll([torch.nested.nested_tensor([A[0], A[1]])]),
    "integers": lambda: _nll([A.long()]),
    "float8": lambda: _nll([A.to(torch.float8_e5m2)]),
    "another shape": lambda: _nll([A], B[:1]),
    "another dtype of the target": lambda: _nll([A], B.double()),
    "a target with a gradient": lambda: _nll([A], B.clone().requires_grad_()),
    "bool for a Gaussian": lambda: _nll([A, ONE], B > 0.5, likelihood="gaussian_learned"),
    "a learned scale with a dimension": lambda: _nll([A, ONE[None]], likelihood="gaussian_learned"),
    "a learned scale of another dtype": lambda: _nll([A, ONE.double()], likelihood="gaussian_learned"),
    "params of two shapes": lambda: _nll([A, A[:1]], likelihood="gaussian_per_element"),
    "half a KL": lambda: _nll([A], B, KL.half(), ONE),
    "a KL per element": lambda: _nll([A], B, B, ONE),
    "a KL of another device": lambda: _nll([A], B, KL.to("meta"), ONE),
    "beta cast along": lambda: _nll([A], B, KL, ONE.half()),
    "counts": lambda: _nll([A, A], likelihood="negative_binomial"),
    "classes": lambda: _nll([A], torch.zeros(2, dtype=torch.int64), likelihood="categorical"),
    "a posterior of two shapes": lambda: choose.fast_path.reparameterize_kl(A, A[:1]),
    "a posterior of two dtypes": lambda: choose.fast_path.gaussian_kl(A, A.double(), False),
    "no batch": lambda: choose.fast_path.reparameterize_kl(ONE, ONE),
    "a mode": lambda: _inside(FlopCounterMode(display=False), lambda: _nll([A])),
    "a function mode": lambda: _inside(torch.overrides.BaseTorchFunctionMode(), lambda: _nll([A])),
    "fake tensors": lambda: _inside(torch._subclasses.FakeTensorMode(), lambda: _nll([torch.zeros(2, 3)])),
    "a transform": _transformed,
    "a tangent": _with_tangent,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_plain_calls_leave_the_unusual_to_the_checks(name: str) -> None:
    """And draw no number for it."""
    assert _nll([A]) is not None
    state = torch.get_rng_state()
    assert UNUSUAL[name]() is None
    assert torch.equal(torch.get_rng_state(), state)


def test_plain_calls_are_the_native_backend_s() -> None:
    for name in ("reference", "triton"):
        try:
            with fastvae.use_backend(name):
                assert choose.fast_path is None
        except RuntimeError:
            assert name == "triton"
    assert choose.fast_path is not None


# --- Missing ----------------------------------------------------------------------------------------------------------


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


WITHOUT = """
import sys, warnings
sys.modules["fastvae._C"] = None  # importing it raises ImportError
sys.modules["fastvae._build_info"] = None
import torch, fastvae
a = torch.zeros(2, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        nll = fastvae.functional.bernoulli_nll(a, a)
        fastvae.ELBO("bernoulli")(a, a, a, a)
assert torch.allclose(nll, torch.full((2,), 3 * 0.6931472))
ours = [w for w in caught if "fastvae" in str(w.message)]
assert len(ours) == 1, ours
print(ours[0].category.__name__, ours[0].filename, ours[0].message)
try:
    fastvae.set_backend("native")
except RuntimeError as error:
    print(error)
print(fastvae.show_config())
with warnings.catch_warnings():
    warnings.simplefilter("error")
    fastvae.set_backend("reference")
    fastvae.functional.bernoulli_nll(a, a)
"""


def test_without_the_extension_the_reference_runs_and_warns_once() -> None:
    done = python(WITHOUT)
    assert done.returncode == 0, done.stderr
    warning, error, *config = done.stdout.splitlines()
    build = "pip install --no-build-isolation -e ."
    assert warning.startswith(
        "RuntimeWarning <string> fastvae runs cpu tensors on its pure-PyTorch reference"
    )
    assert "fastvae.set_backend('reference') accepts that silently" in warning
    assert build in warning
    assert error.startswith("fastvae.set_backend: backend 'native' is not available: ")
    assert build in error
    text = "\n".join(config)
    assert re.search(r"extension +not built", text)
    assert re.search(r"nll +reference +reference +reference", text)
    assert re.search(rf"missing\n  native: .*{re.escape(build)}", text)


TRITON = """
import sys, types, fastvae
{change}
a = fastvae.functional.bernoulli_nll(*[__import__("torch").zeros(2, 3)] * 2)  # "auto" takes what there is
try:
    fastvae.set_backend("triton")
except RuntimeError as error:
    print(error)
assert fastvae.backends.choose.setting == "auto"
print(fastvae.show_config())
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "sys.modules['triton'] = None",
            "Triton is not installed (import of triton halted; None in sys.modules)",
        ),
        ("sys.modules['triton'] = types.SimpleNamespace(__version__='3.5.1')", "Triton 3.5.1 is too old"),
    ],
    ids=["missing", "old"],
)
def test_without_triton(change: str, message: str) -> None:
    """ "auto" does without it; insisting, and `fastvae doctor`, tell the reason and the line that mends it."""
    done = python(TRITON.format(change=change))
    assert done.returncode == 0, done.stderr
    error, *config = done.stdout.splitlines()
    assert error.startswith(f"fastvae.set_backend: backend 'triton' is not available: {message}")
    assert error.endswith('pip install -U "triton>=3.6"')
    assert error.partition("available: ")[2] in "\n".join(config)


def test_triton_insists_on_a_gpu() -> None:
    """Where Triton is there, CPU tensors are refused by name, and the old setting comes back."""
    if available.load("triton") is None:
        pytest.skip("no Triton here")
    with (
        fastvae.use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' has no kernels for cpu tensors"),
    ):
        fv.bernoulli_nll(A, A)
    assert serving() == "native"


def test_importing_builds_nothing_and_brings_no_trainer() -> None:
    """The core imports no data set, plotting or training library, and no compiler."""
    heavy = [
        "matplotlib",
        "sklearn",
        "PIL",
        "typer",
        "rich",
        "triton",
        "lightning",
        "torch.utils.cpp_extension",
    ]
    done = python(
        "import torch, sys; before = set(sys.modules); import fastvae; "
        f"print(*(set(sys.modules) - before) & set({heavy}))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"TORCH_VERSION": "2.9.1+cu128"},
            f"the extension was built for torch 2.9.1+cu128 and this is torch {torch.__version__}; rebuild it with: "
            "pip install --no-build-isolation -e .",
        ),
        (
            {"TORCH_VERSION": "2.9.1+cu128", "WHEELS": "https://example.org"},
            f"the extension was built for torch 2.9.1+cu128 and this is torch {torch.__version__}; install the "
            "wheel for this torch with: pip install --find-links https://example.org "
            f'"fastvae-elbo=={fastvae.__version__}+torch{".".join(torch.__version__.split(".")[:2])}"',
        ),
        (
            {"WHY_PURE": "it is the pure wheel", "WHEELS": "https://example.org"},
            "fastvae was installed without its compiled extension: it is the pure wheel; install the wheel for "
            "this torch with: pip install --find-links https://example.org",
        ),
        ({"PYTHON_VERSION": "3.9.2"}, "the extension was built for Python 3.9.2 and this is Python 3."),
        (
            {"CUDA_VERSION": "9.2"},
            f"the extension was built for CUDA 9.2 and this torch ({torch.__version__}) is for",
        ),
    ],
    ids=["torch", "wheel", "pure wheel", "python", "cuda"],
)
def test_an_extension_built_for_another_version(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, str], message: str
) -> None:
    """What it was built with is compared before it is loaded, where the loader would speak of symbols."""
    real = native.build_info()
    built = types.SimpleNamespace(**{k: v for k, v in vars(real).items() if k.isupper()} | record)
    monkeypatch.setattr(native, "build_info", lambda: built)
    with pytest.raises(Missing, match=re.escape(message)):
        native.load()


@pytest.mark.parametrize(
    ("arches", "capability", "serves"),
    [
        (("8.0", "9.0", "10.0+PTX"), (8, 0), True),
        (("8.0", "9.0", "10.0+PTX"), (8, 9), True),
        (("8.0", "9.0", "10.0+PTX"), (9, 0), True),
        (("8.0", "9.0", "10.0+PTX"), (12, 0), True),
        (("8.0", "9.0", "10.0+PTX"), (7, 5), False),
        (("9.0",), (10, 0), False),
        (("8.6",), (8, 0), False),
        (("Hopper",), (9, 0), True),
        ((), (9, 0), True),
    ],
)
def test_gpus_that_the_extension_was_built_for(
    monkeypatch: pytest.MonkeyPatch, arches: tuple[str, ...], capability: tuple[int, int], serves: bool
) -> None:
    """Machine code runs within its generation, PTX on all that came later; of what it cannot tell it says yes."""
    monkeypatch.setattr(native, "build_info", lambda: types.SimpleNamespace(CUDA_ARCHES=arches))
    assert native.built_for(capability) is serves


def test_the_reasons_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an extension without CUDA kernels, and of one whose kernels are for other GPUs, each with what mends it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    built = types.SimpleNamespace(CUDA_ARCHES=("8.0", "9.0"))
    monkeypatch.setattr(native, "build_info", lambda: built)
    for has, capability, reason in (
        (False, (9, 0), "built without CUDA kernels; build them with: FASTVAE_CUDA=1 pip install"),
        (True, (7, 5), "need compute capability 8.0 and this GPU has 7.5; Triton's serve it"),
        (True, (10, 0), "8.0, 9.0 and this GPU has 10.0; build for it with: TORCH_CUDA_ARCH_LIST=10.0 pip"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        monkeypatch.setattr(available, "has_kernels", lambda name, device_type, has=has: has)
        assert not available.serves("native", "cuda")
        assert reason in available.reason("native", "cuda")


CUDA = types.SimpleNamespace(device=torch.device("cuda"))  # all that `choose` looks at


@pytest.mark.parametrize("triton", [True, False], ids=["with Triton", "without"])
@pytest.mark.parametrize(
    ("capability", "covered"), [((7, 5), False), ((8, 6), True), ((9, 0), True), ((12, 0), False)]
)
def test_a_gpu_that_the_extension_was_not_built_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], covered: bool, triton: bool
) -> None:
    """ "auto" takes Triton for it, else the reference, and tells why; insisting is refused; show_config agrees."""
    named = {name: Backend(name, *(print,) * len(OPS)) for name in ("native", "triton")}
    monkeypatch.setattr(available, "loaded", {"reference": available.REFERENCE, "native": named["native"]})
    if triton:
        monkeypatch.setitem(available.loaded, "triton", named["triton"])
    monkeypatch.setattr(available, "missing", {} if triton else {"triton": "it is not installed"})
    for name in ("setting", "fast_path", "_gpu_capability", "_unserved_warned"):
        monkeypatch.setattr(choose, name, getattr(choose, name))
    monkeypatch.setattr(choose, "serving", dict(choose.serving))
    monkeypatch.setattr(available, "has_kernels", lambda name, device: device == "cuda" or name == "native")
    built = types.SimpleNamespace(**vars(native.build_info()) | {"CUDA_ARCHES": ("8.0", "9.0")})
    monkeypatch.setattr(native, "build_info", lambda: built)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    fastvae.set_backend("auto")
    assert choose.serving["cuda"].name == "native"  # before torch has met the GPU
    with fastvae.use_backend("native"):
        choose._choose_for_gpu()
        if covered:
            assert choose.for_tensor(CUDA).name == "native"
        else:
            with pytest.raises(RuntimeError, match=r"'native' has no kernels for cuda tensors: it.* GPU has"):
                choose.for_tensor(CUDA)
    expected = "native" if covered else "triton" if triton else "reference"
    if expected == "reference":
        monkeypatch.setattr(choose, "_unserved_warned", False)
        major, minor = capability
        with pytest.warns(RuntimeWarning, match=rf"GPU has {major}\.{minor}.*Triton: it is not installed"):
            choose.for_tensor(CUDA)
    assert choose.for_tensor(CUDA).name == expected
    assert serving() == "native"
    text = fastvae.show_config()
    assert re.search(rf"nll +native +{expected} +reference", text)
    assert ("native on cuda: it" in text) != covered


MEETING = """
import platform, sys, torch, types
sys.modules["fastvae._build_info"] = types.SimpleNamespace(
    TORCH_VERSION=torch.__version__, PYTHON_VERSION=platform.python_version(), CUDA_ARCHES=("8.0", "9.0")
)
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
torch._C._dispatch_has_kernel_for_dispatch_key = lambda op, key: key == "CUDA" or has_kernel(op, key)
asked = []
torch.cuda.get_device_capability = lambda *_: asked.append(1) or (7, 5)
torch.cuda.is_available = lambda: True
torch._C._cuda_getDeviceCount, torch._C._cuda_init, torch.cuda._cudart = lambda: 1, lambda: None, torch
{before}
from fastvae.backends import choose
print(len(asked), choose.serving.get("cuda", choose.REFERENCE).name)
torch.cuda.init()
print(len(asked), choose.serving.get("cuda", choose.REFERENCE).name)
"""


@pytest.mark.parametrize("before", ["", "torch.cuda.init()"], ids=["at first", "before the import"])
def test_a_gpu_is_met_when_torch_initialises_it(before: str) -> None:
    """And is not asked for at import, which would initialise it."""
    done = python(MEETING.format(before=before))
    assert done.returncode == 0, done.stderr
    triton = "triton" if available.load("triton") is not None else "reference"
    assert done.stdout.splitlines() == [f"1 {triton}" if before else "0 native", f"1 {triton}"]


def test_an_extension_older_than_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks_an_op(name: str, namespace: str) -> None:
        raise AttributeError("'_OpNamespace' 'fastvae' object has no attribute 'newer'")

    monkeypatch.setattr(native, "from_ops", lacks_an_op)
    with pytest.raises(Missing, match=r"built from another version of fastvae; rebuild it with: pip install"):
        native.load()


def test_a_patch_release_of_torch_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.build_info()
    patched = ".".join(torch.__version__.split(".")[:2]) + ".99+other"
    built = types.SimpleNamespace(TORCH_VERSION=patched, PYTHON_VERSION=real.PYTHON_VERSION)
    monkeypatch.setattr(native, "build_info", lambda: built)
    assert native.load().name == "native"


# --- show_config ------------------------------------------------------------------------------------------------------


def test_show_config() -> None:
    """Versions, who serves what, and for whatever is missing the reason and the command."""
    text = fastvae.show_config()
    assert text.startswith(f"fastvae {fastvae.__version__}\n")
    for label, value in {
        "torch": torch.__version__,
        "extension": "loaded",
        "CPU in use": "(default|avx2|avx512)",
        "threads": torch.get_num_threads(),
    }.items():
        pattern = value if label == "CPU in use" else re.escape(str(value))
        assert re.search(rf"^  {label} +{pattern}", text, re.MULTILINE | re.IGNORECASE), label
    assert "backend 'auto' serves" in text
    for op in OPS:
        assert re.search(rf"^  {op} +native +\w+ +reference$", text, re.MULTILINE), op
    for name in ("native", "triton"):
        if available.load(name) is None or not available.has_kernels(name, "cuda"):
            assert re.search(rf"^  {name}( on cuda)?: .+(pip install|https://)", text, re.MULTILINE), name
    assert all(line == line.rstrip() for line in text.splitlines())


def test_show_config_follows_the_setting() -> None:
    with fastvae.use_backend("reference"):
        text = fastvae.show_config()
    assert "backend 'reference' serves" in text
    assert re.search(r"nll +reference +reference +reference", text)
