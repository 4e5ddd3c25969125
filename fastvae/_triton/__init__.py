"""The Triton backend: the ops of `fastvae::*` as `fastvae_triton::*`, for every GPU that Triton supports.

Nothing is compiled at installation: Triton compiles a kernel when it is first called and caches it on disk. Importing
this package registers the ops (ops.py). `fastvae.backends` imports it when it needs the ops, and turns an ImportError
from here into the reason that users see.

    continuous.py, counts.py, categorical.py, discretized.py, latents.py
                              the elements or the kernels of each family
    multinomial.py            the kernel of the multinomial, of the family of counts
    log_probs.py              samples with their log-densities
    mixture.py                mixtures of Gaussians
    elementwise.py            the kernel that all elements share
    loss.py                   the reduction of a likelihood's rows, and the ops of the loss
    elements.py               the ops for the value of each element
    elementary.py, noise.py   elementary functions, and random numbers
    tiles.py, launch.py, tuning.py
                              how work is partitioned and launched
    ops.py, fakes.py          schemas, autograd, fake kernels
    runtime.py                the check of the installed Triton

If TRITON_INTERPRET=1 is set before Triton is first imported, the kernels run on CPU tensors, slowly. This is how they
are tested without a GPU.
"""

from .runtime import INTERPRETED as INTERPRETED  # imported first, because it explains a missing Triton

# isort: split

from . import ops as ops
