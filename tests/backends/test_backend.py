"""The choice of a backend, the fallback when one is missing, and the reports."""

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


def test_auto_selects_native_on_the_cpu() -> None:
    """`make test` is for the compiled kernels, so falling back is a failure."""
    assert choose.setting == "auto"
    assert serving() == "native"
    assert choose.for_tensor(A) is choose.for_tensor(A.double())


def test_use_backend_restores_the_previous_setting() -> None:
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


def test_set_backend_lasts_until_the_next_call() -> None:
    try:
        fastvae.set_backend("reference")
        assert serving() == "reference"
    finally:
        fastvae.set_backend("auto")
    assert serving() == "native"


def test_setting_selects_the_backend_that_computes(backend: str) -> None:
    """The reference creates ordinary autograd nodes, and the kernels their own, so the setting has a real effect."""
    out = fv.bernoulli_nll(A.clone().requires_grad_(), A)
    assert ("Nll" in out.grad_fn.name()) == (backend != "reference")


@pytest.mark.parametrize("name", ["auto", "native", "reference"])
def test_other_devices_use_the_reference(name: str) -> None:
    meta = torch.zeros(2, 3, device="meta")
    with fastvae.use_backend(name):
        assert fv.bernoulli_nll(meta, meta).shape == (2,)


def test_backward_uses_the_backend_of_its_forward(backend: str) -> None:
    """Switching between forward and backward, or on another thread, has no effect on the backward."""
    a = torch.randn(2, 3, requires_grad=True)
    loss = fv.bernoulli_nll(a, A).sum()
    with fastvae.use_backend("reference" if backend == "native" else "native"):
        loss.backward()
    torch.testing.assert_close(a.grad, torch.sigmoid(a.detach()))


# --- Plain calls ------------------------------------------------------------------------------------------------------


B = torch.rand(2, 3)
KL = torch.rand(2)
ONE = torch.ones(())


def test_plain_calls_skip_the_python_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, calls of a training loop go straight to the kernels, and give the same bits."""
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


PLAIN_FORM = "logvar", [], False  # the form of the scale, its constants, and whether the KL is per element


def _inside(mode: object, call: Callable[[], object]) -> object:
    with mode:  # type: ignore[attr-defined]
        return call()


def _transformed() -> object:
    """This includes tensors that the transform does not affect."""
    found = []

    def call(a: torch.Tensor) -> torch.Tensor:
        found.extend(
            [
                choose.fast_path.gaussian_kl(a, a, *PLAIN_FORM),
                choose.fast_path.gaussian_kl(B, B, *PLAIN_FORM),
                _nll([A]),
            ]
        )
        return a

    torch.func.vmap(call)(A)
    return next((result for result in found if result is not None), None)


def _with_tangent() -> object:
    with torch.autograd.forward_ad.dual_level():
        return choose.fast_path.gaussian_kl(torch.autograd.forward_ad.make_dual(B, B), B, *PLAIN_FORM)


class Subclass(torch.Tensor):
    pass


def _nll(
    params: object,
    target: object = B,
    *rest: object,
    likelihood: str = "bernoulli",
    weight: object = None,
) -> object:
    kl, beta = rest or (None, None)
    return choose.fast_path.nll(likelihood, params, target, [], kl, beta, 0, weight)


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
    "a weight of another shape": lambda: _nll([A], weight=torch.ones(2)),
    "a weight of another dtype": lambda: _nll([A], weight=torch.ones(2, 3).int()),
    "a weight of another device": lambda: _nll([A], weight=torch.ones(2, 3, device="meta")),
    "a weight with a gradient": lambda: _nll([A], weight=torch.ones(2, 3, requires_grad=True)),
    "a list of weights": lambda: _nll([A], weight=[1, 2]),
    "counts": lambda: _nll([A, A], likelihood="negative_binomial"),
    "classes": lambda: _nll([A], torch.zeros(2, dtype=torch.int64), likelihood="categorical"),
    "a posterior of two shapes": lambda: choose.fast_path.reparameterize_kl(A, A[:1], *PLAIN_FORM),
    "a posterior of two dtypes": lambda: choose.fast_path.gaussian_kl(A, A.double(), *PLAIN_FORM),
    "no batch": lambda: choose.fast_path.reparameterize_kl(ONE, ONE, *PLAIN_FORM),
    "a mode": lambda: _inside(FlopCounterMode(display=False), lambda: _nll([A])),
    "a function mode": lambda: _inside(torch.overrides.BaseTorchFunctionMode(), lambda: _nll([A])),
    "fake tensors": lambda: _inside(torch._subclasses.FakeTensorMode(), lambda: _nll([torch.zeros(2, 3)])),
    "a transform": _transformed,
    "a tangent": _with_tangent,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_calls_use_the_python_checks(name: str) -> None:
    """They also draw no random number for it."""
    assert _nll([A]) is not None
    assert _nll([A], weight=torch.ones(1, 3, dtype=torch.bool)) is not None
    state = torch.get_rng_state()
    assert UNUSUAL[name]() is None
    assert torch.equal(torch.get_rng_state(), state)


def test_fast_path_exists_only_for_the_native_backend() -> None:
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


def test_missing_extension_warns_once_and_uses_the_reference() -> None:
    done = python(WITHOUT)
    assert done.returncode == 0, done.stderr
    warning, error, *config = done.stdout.splitlines()
    build = "pip install --no-build-isolation -e ."
    assert warning.startswith(
        "RuntimeWarning <string> fastvae uses its pure-PyTorch reference for cpu tensors"
    )
    assert "fastvae.set_backend('reference') silences this warning" in warning
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
a = fastvae.functional.bernoulli_nll(*[__import__("torch").zeros(2, 3)] * 2)  # "auto" uses what is available
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
def test_missing_triton_is_reported_with_a_solution(change: str, message: str) -> None:
    """ "auto" works without it. The setting "triton" and `fastvae doctor` report the reason and the solution."""
    done = python(TRITON.format(change=change))
    assert done.returncode == 0, done.stderr
    error, *config = done.stdout.splitlines()
    assert error.startswith(f"fastvae.set_backend: backend 'triton' is not available: {message}")
    assert error.endswith('pip install -U "triton>=3.6"')
    assert error.partition("available: ")[2] in "\n".join(config)


def test_triton_setting_without_a_gpu_raises() -> None:
    """If Triton is installed, CPU tensors raise an error, and the previous setting is restored."""
    if available.load("triton") is None:
        pytest.skip("no Triton here")
    with (
        fastvae.use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' has no kernels for cpu tensors"),
    ):
        fv.bernoulli_nll(A, A)
    assert serving() == "native"


def test_import_builds_nothing_and_imports_no_trainer() -> None:
    """The core imports no library for data sets, plotting or training, and no compiler."""
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
            f"the extension was built for torch 2.9.1+cu128 but this is torch {torch.__version__}; rebuild it with: "
            "pip install --no-build-isolation -e .",
        ),
        (
            {"TORCH_VERSION": "2.9.1+cu128", "WHEELS": "https://example.org"},
            f"the extension was built for torch 2.9.1+cu128 but this is torch {torch.__version__}; install the "
            "wheel for this torch with: pip install --find-links https://example.org "
            f'"fastvae-elbo=={fastvae.__version__}+torch{".".join(torch.__version__.split(".")[:2])}"',
        ),
        (
            {"WHY_PURE": "it is the pure wheel", "WHEELS": "https://example.org"},
            "fastvae was installed without its compiled extension: it is the pure wheel; install the wheel for "
            "this torch with: pip install --find-links https://example.org",
        ),
        ({"PYTHON_VERSION": "3.9.2"}, "the extension was built for Python 3.9.2 but this is Python 3."),
        (
            {"CUDA_VERSION": "9.2"},
            f"the extension was built for CUDA 9.2 but this torch ({torch.__version__}) was built for",
        ),
    ],
    ids=["torch", "wheel", "pure wheel", "python", "cuda"],
)
def test_extension_built_for_another_version_is_reported(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, str], message: str
) -> None:
    """The versions are compared before loading, where the loader's error would only mention symbols."""
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
def test_built_for_accepts_compatible_gpus(
    monkeypatch: pytest.MonkeyPatch, arches: tuple[str, ...], capability: tuple[int, int], serves: bool
) -> None:
    """Machine code runs on its generation, and PTX on all later ones. Unknown names are assumed to fit."""
    monkeypatch.setattr(native, "build_info", lambda: types.SimpleNamespace(CUDA_ARCHES=arches))
    assert native.built_for(capability) is serves


def test_reason_for_a_gpu_names_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an extension without CUDA kernels, and for one with kernels for other GPUs, each with its solution."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    built = types.SimpleNamespace(CUDA_ARCHES=("8.0", "9.0"))
    monkeypatch.setattr(native, "build_info", lambda: built)
    for has, capability, reason in (
        (False, (9, 0), "built without CUDA kernels; build them with: FASTVAE_CUDA=1 pip install"),
        (True, (7, 5), "need compute capability 8.0 but this GPU has 7.5; Triton's kernels serve it"),
        (
            True,
            (10, 0),
            "8.0, 9.0 but this GPU has 10.0; build it for this GPU with: TORCH_CUDA_ARCH_LIST=10.0 pip",
        ),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        monkeypatch.setattr(available, "has_kernels", lambda name, device_type, has=has: has)
        assert not available.serves("native", "cuda")
        assert reason in available.reason("native", "cuda")


CUDA = types.SimpleNamespace(device=torch.device("cuda"))  # everything that `choose` uses


@pytest.mark.parametrize("triton", [True, False], ids=["with Triton", "without"])
@pytest.mark.parametrize(
    ("capability", "covered"), [((7, 5), False), ((8, 6), True), ((9, 0), True), ((12, 0), False)]
)
def test_unsupported_gpu_uses_another_backend(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], covered: bool, triton: bool
) -> None:
    """ "auto" uses Triton, or the reference with a warning; "native" raises; show_config agrees."""
    named = {name: Backend(name, *(print,) * len(OPS)) for name in ("native", "triton")}
    monkeypatch.setattr(available, "loaded", {"reference": available.REFERENCE, "native": named["native"]})
    if triton:
        monkeypatch.setitem(available.loaded, "triton", named["triton"])
    monkeypatch.setattr(available, "missing", {} if triton else {"triton": "it is not installed"})
    for name in ("setting", "fast_path", "_gpu_capability", "_no_backend_warned"):
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
    assert choose.serving["cuda"].name == "native"  # before torch has initialised CUDA
    with fastvae.use_backend("native"):
        choose._choose_for_gpu()
        if covered:
            assert choose.for_tensor(CUDA).name == "native"
        else:
            with pytest.raises(RuntimeError, match=r"'native' has no kernels for cuda tensors: it.* GPU has"):
                choose.for_tensor(CUDA)
    expected = "native" if covered else "triton" if triton else "reference"
    if expected == "reference":
        monkeypatch.setattr(choose, "_no_backend_warned", False)
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
queries = []
torch.cuda.get_device_capability = lambda *_: queries.append(1) or (7, 5)
torch.cuda.is_available = lambda: True
torch._C._cuda_getDeviceCount, torch._C._cuda_init, torch.cuda._cudart = lambda: 1, lambda: None, torch
{before}
from fastvae.backends import choose
print(len(queries), choose.serving.get("cuda", choose.REFERENCE).name)
torch.cuda.init()
print(len(queries), choose.serving.get("cuda", choose.REFERENCE).name)
"""


@pytest.mark.parametrize("before", ["", "torch.cuda.init()"], ids=["at first", "before the import"])
def test_gpu_is_checked_when_torch_initialises_cuda(before: str) -> None:
    """It is not queried at import, which would initialise CUDA."""
    done = python(MEETING.format(before=before))
    assert done.returncode == 0, done.stderr
    triton = "triton" if available.load("triton") is not None else "reference"
    assert done.stdout.splitlines() == [f"1 {triton}" if before else "0 native", f"1 {triton}"]


def test_extension_older_than_the_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks_an_op(name: str, namespace: str) -> None:
        raise AttributeError("'_OpNamespace' 'fastvae' object has no attribute 'newer'")

    monkeypatch.setattr(native, "from_ops", lacks_an_op)
    with pytest.raises(Missing, match=r"built from another version of fastvae; rebuild it with: pip install"):
        native.load()


def test_extension_accepts_another_patch_release_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.build_info()
    patched = ".".join(torch.__version__.split(".")[:2]) + ".99+other"
    built = types.SimpleNamespace(TORCH_VERSION=patched, PYTHON_VERSION=real.PYTHON_VERSION)
    monkeypatch.setattr(native, "build_info", lambda: built)
    assert native.load().name == "native"


# --- show_config ------------------------------------------------------------------------------------------------------


def test_show_config_names_versions_and_backends() -> None:
    """It shows versions, serving backends, and for everything missing the reason and the command."""
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
