"""The Triton backend: the ops of `fastvae::*` as `fastvae_triton::*`, for every GPU that Triton knows.

Nothing is compiled when it is installed: Triton compiles a kernel at its first call and keeps it on disk. Importing
this package registers the ops (ops.py); `fastvae.backends` does so when it needs them, and turns an ImportError from
here into the reason that users see.

    continuous.py, counts.py, categorical.py, discretized.py, latents.py
                              the elements, or the kernels, of each family
    elementwise.py            the kernel that all elements share
    loss.py                   what is done with a likelihood's rows, and the ops of the loss
    elements.py               the ops of the value of each element
    elementary.py, noise.py   functions of a number, and the random numbers
    tiles.py, launch.py, tuning.py
                              how work is cut up and launched
    ops.py, fakes.py          schemas, autograd, fake kernels
    runtime.py                which Triton there is

With TRITON_INTERPRET=1 in the environment before the first import of Triton, the kernels run on CPU tensors, slowly:
that is how they are tested where there is no GPU.
"""

from .runtime import INTERPRETED as INTERPRETED  # first: it says what is wrong where there is no Triton

# isort: split

from . import ops as ops
