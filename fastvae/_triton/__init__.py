"""The Triton backend: the ops of `fastvae::*` as `fastvae_triton::*`, for every GPU that Triton knows.

Nothing is compiled when it is installed: Triton compiles a kernel at its first call and keeps it on disk. Importing
this package registers the ops (ops.py); `fastvae.backend` does so when it needs them, and turns an ImportError from
here into the reason that users see.

    elementary.py, noise.py   functions of an element, and the random numbers
    likelihoods.py            one function for each likelihood, and their table
    nll.py, latents.py        the kernels, and the ops that launch them
    launch.py, tuning.py      how work is cut up and launched
    ops.py                    schemas, fake kernels, autograd

With TRITON_INTERPRET=1 in the environment before the first import of Triton, the kernels run on CPU tensors, slowly:
that is how they are tested where there is no GPU.
"""

OLDEST = (3, 6)  # the one that comes with torch 2.11, and that the tests run
MEND = 'pip install -U "triton>=3.6"'

try:
    import triton
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error}); install it with: {MEND}", name="triton") from error

if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"Triton {triton.__version__} is too old; get a newer one with: {MEND}", name="triton")

# Triton's own reading of the variable, whose values are "1", "true", "on" and the like.
INTERPRETED: bool = triton.knobs.runtime.interpret

from . import ops as ops  # noqa: E402 (only where there is a Triton to import)
