"""The schemas and the autograd of the ops `fastvae_triton::*`, which mirror those of csrc/ops in Python.

A user's call runs the op without a suffix, which records the graph. The ops with suffixes _forward and _backward do the
work on the device (loss.py, elements.py, latents.py), or return only the shapes of the results if there is no device
(fakes.py).

The ops belong to a plain torch.library.Library, because every layer on top of it costs host time in each call. An
autograd.Function over such ops comes closest to C++. `torch.library.custom_op` takes half as long again, and
`triton_op`, which would expose the kernels to Inductor, is built on that. Inductor would find little to fuse with these
kernels anyway, because they run between the last layer of a decoder and its backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import VARIANTS
from . import elements, fakes, latents, log_probs, loss, mixture
from .counts import shared_bit
from .launch import memory_order, row_dtype
from .loss import MEAN, NONE
from .runtime import INTERPRETED

_library = torch.library.Library("fastvae_triton", "DEF")
_ops = torch.ops.fastvae_triton

_POSTERIOR = (
    "Tensor mu, Tensor? logvar, Tensor? prior_mu, Tensor? prior_logvar, str form, float[] constants, "
    "float? balance"
)
_NOISE = "int? samples, Tensor? seed, int row_offset, Tensor? eps, Generator? generator"
_DATA = "str likelihood, Tensor[] params, Tensor target, float[] constants"
_MIXTURE = "Tensor z, Tensor mu, Tensor logvar, Tensor? log_weight"
_FORMS = "bool joint, bool per_dimension) -> (Tensor joint, Tensor per_dimension)"
_EXTRAS = (
    "Tensor? scalar_rows, Tensor? kl, Tensor? beta, SymInt rows, int reduction, bool need_kl, bool need_beta"
)
_DENSITIES = (
    "Tensor mu, Tensor? logvar, Tensor? prior_mu, Tensor? prior_logvar, str form, float[] constants, bool stl"
)
_DRAWS = "int samples, Tensor? seed, int row_offset, Tensor? eps, Generator? generator"
_RANDOM = (
    "reparameterize_kl",
    "reparameterize_kl_forward",
    "sample_log_probs",
    "sample_log_probs_forward",
)

for _schema in (
    f"reparameterize_kl({_POSTERIOR}, bool per_element, {_NOISE}) -> (Tensor z, Tensor kl)",
    f"reparameterize_kl_forward({_POSTERIOR}, bool per_element, {_NOISE}) -> (Tensor z, Tensor kl, Tensor used_seed)",
    f"reparameterize_kl_backward(Tensor? grad_z, Tensor? grad_kl, {_POSTERIOR}, int? samples, Tensor seed, "
    "int row_offset, Tensor? eps, int needs) -> Tensor[]",
    f"gaussian_kl({_POSTERIOR}, bool per_element) -> Tensor",
    f"gaussian_kl_forward({_POSTERIOR}, bool per_element) -> Tensor",
    f"gaussian_kl_backward(Tensor grad_kl, {_POSTERIOR}, int needs) -> Tensor[]",
    f"sample_log_probs({_DENSITIES}, {_DRAWS}) -> (Tensor z, Tensor log_q, Tensor log_p)",
    f"sample_log_probs_forward({_DENSITIES}, {_DRAWS}) "
    "-> (Tensor z, Tensor log_q, Tensor log_p, Tensor used_seed)",
    f"sample_log_probs_backward(Tensor? grad_z, Tensor? grad_log_q, Tensor? grad_log_p, {_DENSITIES}, "
    "int samples, Tensor seed, int row_offset, Tensor? eps, int needs) -> Tensor[]",
    f"nll({_DATA}, Tensor? kl, Tensor? beta, int reduction, Tensor? weight=None) -> (Tensor loss, Tensor nll)",
    f"nll_forward({_DATA}, Tensor? kl, Tensor? beta, int reduction, int needs, Tensor? weight=None) "
    "-> (Tensor loss, Tensor nll, Tensor[] gradients, Tensor scalar_rows)",
    f"nll_gradient({_DATA}, Tensor? grad_loss, Tensor? grad_nll, int reduction, int needs, Tensor? weight=None) "
    "-> Tensor[]",
    f"nll_backward(Tensor? grad_loss, Tensor? grad_nll, Tensor[] gradients, {_EXTRAS}) -> Tensor[]",
    f"nll_backward_(Tensor? grad_loss, Tensor? grad_nll, Tensor(a!)[] gradients, {_EXTRAS}) -> Tensor[]",
    f"nll_elements({_DATA}, float factor, Tensor? weight=None) -> Tensor",
    f"nll_elements_forward({_DATA}, float factor, int needs, Tensor? weight=None) "
    "-> (Tensor values, Tensor[] derivatives)",
    "nll_elements_backward(Tensor grad, Tensor[] derivatives, int shared, ScalarType dtype) -> Tensor[]",
    "nll_elements_backward_(Tensor grad, Tensor(a!)[] derivatives, int shared) -> Tensor[]",
    f"gaussian_mixture_log_prob({_MIXTURE}, {_FORMS}",
    f"gaussian_mixture_log_prob_forward({_MIXTURE}, {_FORMS}",
    f"gaussian_mixture_log_prob_backward(Tensor? grad_joint, Tensor? grad_per_dimension, {_MIXTURE}, Tensor joint, "
    "Tensor per_dimension, int needs) -> Tensor[]",
):
    _random = _schema.partition("(")[0] in _RANDOM
    _library.define(
        _schema,
        tags=(torch.Tag.pt2_compliant_tag, *((torch.Tag.nondeterministic_seeded,) if _random else ())),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------

_below_autograd = torch._C._AutoDispatchBelowAutograd
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

_TWICE = (
    "fastvae: the fused kernels have no second derivative. Differentiate twice through the reference: "
    'with fastvae.use_backend("reference"): ...'
)


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _bits(*tensors: Tensor | None) -> int:
    """A number whose bit i is set if tensors[i] needs a gradient."""
    return sum(1 << i for i, t in enumerate(tensors) if t is not None and t.requires_grad)


def _once_differentiable(gradients: list[Tensor | None], *anchors: Tensor) -> tuple[Tensor | None, ...]:
    """If the backward itself records a graph, returns gradients that raise an error when they are differentiated.

    `anchors` are tensors whose graph leads to the inputs of this backward. torch.autograd.grad(..., inputs) only
    follows paths that lead to its inputs, so that without the anchors it would silently skip this one.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    if not torch.is_grad_enabled() or not given:
        return tuple(gradients)
    connected = [anchor for anchor in anchors if anchor.requires_grad]
    leaves = [gradient.detach().requires_grad_() for gradient in given]
    refuse = torch._C._functions.DelayedError(_TWICE.encode(), len(leaves) + len(connected))
    refusing = iter(refuse(*leaves, *connected))
    return tuple(gradient if gradient is None else next(refusing) for gradient in gradients)


def _traced(tensor: Tensor | None) -> bool:
    """Whether torch.compile or another tracer is active, under which ops must not write to their inputs."""
    return type(tensor) is not Tensor


def _scaled_in_torch(
    gradients: Sequence[Tensor],
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    rows: int,
    reduction: int,
) -> list[Tensor]:
    """The saved gradients times the incoming factors, computed with torch's own ops.

    A compiler can fuse these with whatever reads the gradients next, whereas a kernel of ours would write the gradients
    to memory once more.
    """
    factor = grad_loss
    if grad_nll is not None:
        # The saved gradients include the weight of the reduction, which does not apply to nll itself.
        own = grad_nll * rows if reduction == MEAN else grad_nll
        factor = own if grad_loss is None else grad_loss + own
    assert factor is not None
    of_each_row = reduction == NONE or grad_nll is not None
    return [
        (gradient * (factor.view(-1, *[1] * (gradient.dim() - 1)) if of_each_row else factor)).to(
            gradient.dtype
        )
        for gradient in gradients
    ]


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        likelihood: str,
        constants: Sequence[float],
        reduction: int,
        target: Tensor,
        kl: Tensor | None,
        beta: Tensor | None,
        weight: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        variant = VARIANTS[likelihood]
        needs = _bits(*params)
        scalar_bit = 1 << len(params) - 1 if variant.has_scalar else 0
        computed = needs | int(target.requires_grad)  # the target's gradient is minus the first parameter's
        # In fp16, gradients cannot be stored before the incoming factor is known: with the weight 1/B, small ones would
        # round to zero, and without it, large ones would overflow. nll_gradient computes them in the backward.
        # The gradient of a parameter that all rows share is saved for the case that all rows have the same factor. If
        # each row has its own factor, it is computed again from the inputs.
        shared = needs & shared_bit(likelihood, params)
        at_once = params[0].dtype != torch.float16 and not (shared and reduction == NONE)
        keeps_inputs = not at_once or shared != 0
        with _below_autograd():
            loss, rows, gradients, scalar_rows = _ops.nll_forward.default(
                likelihood,
                params,
                target,
                constants,
                kl,
                beta,
                reduction,
                computed if at_once else computed & scalar_bit,
                weight,
            )
        ctx.set_materialize_grads(False)
        ctx.variant, ctx.needs, ctx.elementwise, ctx.at_once = variant, needs, computed & ~scalar_bit, at_once
        ctx.call = likelihood, constants, reduction
        ctx.rows, ctx.tensors, ctx.keeps_inputs = params[0].shape[0], len(params), keeps_inputs
        ctx.need_scalar = needs & scalar_bit != 0
        ctx.need_kl, ctx.need_beta = _requires_grad(kl), _requires_grad(beta)
        ctx.target_dtype = target.dtype if target.requires_grad else None
        ctx.target_rows = target.shape[0]
        with_kl = ctx.need_kl or ctx.need_beta
        # scalar_rows is an output that only this node uses. When the backward unpacks it, its graph leads to this node,
        # so that it can serve as an anchor.
        ctx.save_for_backward(
            scalar_rows,
            kl if with_kl else None,
            beta if with_kl else None,
            *(gradients if at_once else ()),
            *((*params, target, weight) if keeps_inputs else ()),
        )
        return loss, rows, scalar_rows

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_nll: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None] * (7 + ctx.tensors)
        if grad_loss is None and grad_nll is None:
            return tuple(results)
        scalar_rows, kl, beta, *saved = ctx.saved_tensors
        likelihood, constants, reduction = ctx.call
        rest = (
            scalar_rows if ctx.need_scalar else None,
            kl,
            beta,
            ctx.rows,
            reduction,
            ctx.need_kl,
            ctx.need_beta,
        )
        with _below_autograd(), torch.no_grad():
            gradients: Sequence[Tensor]
            inputs: Sequence[Tensor] = ()
            if ctx.keeps_inputs:
                saved, inputs = saved[: -ctx.tensors - 2], saved[-ctx.tensors - 2 :]
            if not ctx.at_once or (inputs and grad_nll is not None):
                gradients = []
                if ctx.elementwise:
                    gradients = _ops.nll_gradient.default(
                        likelihood,
                        inputs[:-2],
                        inputs[-2],
                        constants,
                        grad_loss,
                        grad_nll,
                        reduction,
                        ctx.elementwise,
                        inputs[-1],
                    )
                extras = _ops.nll_backward.default(grad_loss, grad_nll, [], *rest)
            elif _traced(grad_loss if grad_loss is not None else grad_nll):
                gradients = _scaled_in_torch(saved, grad_loss, grad_nll, ctx.rows, reduction)
                wanted = ctx.need_scalar or ctx.need_kl or ctx.need_beta
                extras = _ops.nll_backward.default(grad_loss, grad_nll, [], *rest) if wanted else []
            elif _keeps_graph():
                both = _ops.nll_backward.default(grad_loss, grad_nll, saved, *rest)
                gradients, extras = both[: len(saved)], both[len(saved) :]
            else:
                # The graph is about to be freed, after which nothing else can read the saved gradient, so the gradient
                # is scaled in place and returned.
                gradients = saved
                extras = _ops.nll_backward_.default(grad_loss, grad_nll, gradients, *rest)

            made, more = iter(gradients), iter(extras)
            for i in range(ctx.tensors):
                if not ctx.elementwise >> i & 1:
                    continue
                gradient = next(made)
                if i == 0 and ctx.target_dtype is not None:
                    location = gradient.chunk(2, 1)[0] if ctx.variant.packed else gradient
                    if ctx.target_rows != ctx.rows:  # several draws share the target
                        location = location.unflatten(0, (-1, ctx.target_rows)).sum(0)
                    results[3] = location.neg().to(ctx.target_dtype)
                if ctx.needs >> i & 1:
                    results[7 + i] = gradient
            if ctx.need_scalar:
                results[-1] = next(more)
            if ctx.need_kl:
                results[4] = next(more)
            if ctx.need_beta:
                results[5] = next(more)
        return _once_differentiable(results, scalar_rows)


def _nll(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    kl: Tensor | None,
    beta: Tensor | None,
    reduction: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _refuse_gradient_of_weight(weight)
    if not torch.is_grad_enabled() or not _requires_grad(target, kl, beta, *params):
        with _below_autograd():
            return _nll_without_graph(likelihood, params, target, constants, kl, beta, reduction, weight)
    if target.requires_grad and not VARIANTS[likelihood].is_location:
        raise ValueError(
            f"fastvae::nll: the `target` of {likelihood} has no gradient here; pass target.detach()"
        )
    return _Nll.apply(likelihood, constants, reduction, target, kl, beta, weight, *params)[:2]


def _nll_without_graph(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    kl: Tensor | None,
    beta: Tensor | None,
    reduction: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    loss, rows, _, _ = _ops.nll_forward.default(
        likelihood, params, target, constants, kl, beta, reduction, 0, weight
    )
    return loss, rows


def _refuse_gradient_of_weight(weight: Tensor | None) -> None:
    if torch.is_grad_enabled() and _requires_grad(weight):
        raise ValueError("fastvae::nll: the `weight` has no gradient here; pass weight.detach()")


class _NllElements(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        likelihood: str,
        constants: Sequence[float],
        factor: float,
        weight: Tensor | None,
        target: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs = _bits(*params)
        with _below_autograd():
            values, derivatives = _ops.nll_elements_forward.default(
                likelihood, params, target, constants, factor, needs, weight
            )
        shared = len(params) > 1 and params[1].dim() == 1 and needs & 2
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.tensors, ctx.dtype = needs, len(params), params[0].dtype
        ctx.shared = (needs & 1) if shared else -1  # its index among the derivatives
        ctx.shared_dtype = params[1].dtype if shared else None
        # This output is used only by this node; see scalar_rows in _Nll.
        anchor = values.new_empty(0)
        ctx.save_for_backward(anchor, *derivatives)
        return values, anchor

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (5 + ctx.tensors)
        anchor, *derivatives = ctx.saved_tensors
        with _below_autograd(), torch.no_grad():
            # This copies only if a saved-tensor hook of the user has replaced them by tensors of another layout.
            derivatives = [d.contiguous(memory_format=memory_order(d)) for d in derivatives]
            gradients: list[Tensor]
            # The derivatives of fp16 and bf16 parameters are float32 and cannot become the result.
            if ctx.dtype != row_dtype(grad) or _traced(grad) or _keeps_graph():
                gradients = _ops.nll_elements_backward.default(grad, derivatives, ctx.shared, ctx.dtype)
            else:
                # As in _Nll, nothing else will read the saved derivatives, so they are scaled in place and returned.
                gradients = derivatives
                sums = _ops.nll_elements_backward_.default(grad, gradients, ctx.shared)
                if sums:
                    gradients[ctx.shared] = sums[0]
            if ctx.shared >= 0:
                gradients[ctx.shared] = gradients[ctx.shared].to(ctx.shared_dtype)
        made = iter(gradients)
        results: list[Tensor | None] = [None] * 5
        results += [next(made) if ctx.needs >> i & 1 else None for i in range(ctx.tensors)]
        return _once_differentiable(results, anchor)


def _nll_elements(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    factor: float,
    weight: Tensor | None = None,
) -> Tensor:
    _refuse_gradient_of_weight(weight)
    if not torch.is_grad_enabled() or not _requires_grad(target, *params):
        with _below_autograd():
            return _elements_without_graph(likelihood, params, target, constants, factor, weight)
    if target.requires_grad:
        raise ValueError(
            f"fastvae::nll_elements: the `target` of {likelihood} has no gradient here; pass target.detach()"
        )
    values: Tensor = _NllElements.apply(likelihood, constants, factor, weight, target, *params)[0]
    return values


def _elements_without_graph(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    factor: float,
    weight: Tensor | None = None,
) -> Tensor:
    values, _ = _ops.nll_elements_forward.default(likelihood, params, target, constants, factor, 0, weight)
    return values


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        eps: Tensor | None,
        form: tuple[str, Sequence[float], float | None],
        per_element: bool,
        samples: int | None,
        seed: Tensor | None,
        row_offset: int,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            z, kl, used_seed = _ops.reparameterize_kl_forward.default(
                mu,
                logvar,
                prior_mu,
                prior_logvar,
                *form,
                per_element,
                samples,
                seed,
                row_offset,
                eps,
                generator,
            )
        ctx.set_materialize_grads(False)
        ctx.needs = _bits(mu, logvar, prior_mu, prior_logvar, eps)
        ctx.form, ctx.samples, ctx.row_offset = form, samples, row_offset
        ctx.save_for_backward(mu, logvar, prior_mu, prior_logvar, eps, used_seed)
        return z, kl

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_kl is None:
            return (None,) * 11
        *posterior, eps, seed = ctx.saved_tensors
        needs = ctx.needs if grad_z is not None else ctx.needs & ~latents.EPS
        gradients = []
        if needs:
            with _below_autograd():
                gradients = _ops.reparameterize_kl_backward.default(
                    grad_z, grad_kl, *posterior, *ctx.form, ctx.samples, seed, ctx.row_offset, eps, needs
                )
        return (*_placed(gradients, needs, [*posterior, eps]), *(None,) * 6)


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        form: tuple[str, Sequence[float], float | None],
        per_element: bool,
    ) -> Tensor:
        with _below_autograd():
            kl = _ops.gaussian_kl_forward.default(mu, logvar, prior_mu, prior_logvar, *form, per_element)
        ctx.needs, ctx.form = _bits(mu, logvar, prior_mu, prior_logvar), form
        ctx.save_for_backward(mu, logvar, prior_mu, prior_logvar)
        return kl

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        posterior = ctx.saved_tensors
        with _below_autograd():
            gradients = _ops.gaussian_kl_backward.default(grad_kl, *posterior, *ctx.form, ctx.needs)
        return (*_placed(gradients, ctx.needs, posterior), None, None)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        how: tuple[str, Sequence[float], bool, int],
        seed: Tensor | None,
        row_offset: int,
        eps: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        posterior = mu, logvar, prior_mu, prior_logvar
        with _below_autograd():
            *results, used_seed = _ops.sample_log_probs_forward.default(
                *posterior, *how, seed, row_offset, eps, generator
            )
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.how, ctx.row_offset = _bits(*posterior), how, row_offset
        ctx.save_for_backward(*posterior, eps, used_seed)
        z, log_q, log_p = results
        return z, log_q, log_p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 9
        *posterior, eps, seed = ctx.saved_tensors
        with _below_autograd():
            gradients = _ops.sample_log_probs_backward.default(
                *grads, *posterior, *ctx.how, seed, ctx.row_offset, eps, ctx.needs
            )
        return (*_placed(gradients, ctx.needs, posterior), *(None,) * 5)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_weight: Tensor | None,
        joint: bool,
        per_dimension: bool,
    ) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            values = _ops.gaussian_mixture_log_prob_forward.default(
                z, mu, logvar, log_weight, joint, per_dimension
            )
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.forms = _bits(z, mu, logvar, log_weight), (joint, per_dimension)
        ctx.save_for_backward(z, mu, logvar, log_weight, *values)
        return values

    @staticmethod
    def backward(
        ctx: Any, grad_joint: Tensor | None, grad_per_dimension: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # The output that was not requested is empty, and so is its gradient.
        grads = [
            grad if wanted else None
            for grad, wanted in zip((grad_joint, grad_per_dimension), ctx.forms, strict=True)
        ]
        if all(grad is None for grad in grads):
            return (None,) * 6
        *inputs, joint, per_dimension = ctx.saved_tensors
        with _below_autograd():
            gradients = _ops.gaussian_mixture_log_prob_backward.default(
                *grads, *inputs, joint, per_dimension, ctx.needs
            )
        return (*_placed(gradients, ctx.needs, inputs), None, None)


def _placed(
    gradients: Sequence[Tensor], needs: int, inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """A tuple with one entry for each input, which is its gradient or None."""
    made = iter(gradients)
    placed = [next(made) if needs >> i & 1 else None for i in range(len(inputs))]
    return _once_differentiable(placed, *(t for t in inputs if t is not None))


def _reparameterize_kl(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    per_element: bool,
    samples: int | None,
    seed: Tensor | None,
    row_offset: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    posterior, how = (mu, logvar, prior_mu, prior_logvar), (form, constants, balance)
    if torch.is_grad_enabled() and _requires_grad(*posterior, eps):
        return _Sample.apply(*posterior, eps, how, per_element, samples, seed, row_offset, generator)
    with _below_autograd():
        return _sample_without_graph(*posterior, *how, per_element, samples, seed, row_offset, eps, generator)


def _sample_without_graph(*args: Any) -> tuple[Tensor, Tensor]:
    z, kl, _ = _ops.reparameterize_kl_forward.default(*args)
    return z, kl


def _sample_log_probs(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    stl: bool,
    samples: int,
    seed: Tensor | None,
    row_offset: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    posterior, how = (mu, logvar, prior_mu, prior_logvar), (form, constants, stl, samples)
    if torch.is_grad_enabled() and _requires_grad(eps):
        raise ValueError("fastvae::sample_log_probs: `eps` has no gradient here")
    if torch.is_grad_enabled() and _requires_grad(*posterior):
        return _LogProbs.apply(*posterior, how, seed, row_offset, eps, generator)
    with _below_autograd():
        return _log_probs_without_graph(*posterior, *how, seed, row_offset, eps, generator)


def _log_probs_without_graph(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    z, log_q, log_p, _ = _ops.sample_log_probs_forward.default(*args)
    return z, log_q, log_p


def _gaussian_kl(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    per_element: bool,
) -> Tensor:
    posterior, how = (mu, logvar, prior_mu, prior_logvar), (form, constants, balance)
    if torch.is_grad_enabled() and _requires_grad(*posterior):
        return _Kl.apply(*posterior, how, per_element)
    with _below_autograd():
        return _kl_without_graph(*posterior, *how, per_element)


def _kl_without_graph(*args: Any) -> Tensor:
    return _ops.gaussian_kl_forward.default(*args)


def _mixture(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor | None, joint: bool, per_dimension: bool
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and _requires_grad(z, mu, logvar, log_weight):
        return _Mixture.apply(z, mu, logvar, log_weight, joint, per_dimension)
    with _below_autograd():
        return _mixture_without_graph(z, mu, logvar, log_weight, joint, per_dimension)


def _mixture_without_graph(*args: Any) -> tuple[Tensor, Tensor]:
    return _ops.gaussian_mixture_log_prob_forward.default(*args)


# ---------------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------------

for _name, _autograd, _composite in (
    ("nll", _nll, _nll_without_graph),
    ("nll_elements", _nll_elements, _elements_without_graph),
    ("reparameterize_kl", _reparameterize_kl, _sample_without_graph),
    ("gaussian_kl", _gaussian_kl, _kl_without_graph),
    ("sample_log_probs", _sample_log_probs, _log_probs_without_graph),
    ("gaussian_mixture_log_prob", _mixture, _mixture_without_graph),
):
    _library.impl(_name, _autograd, "Autograd")
    _library.impl(_name, _composite, "CompositeExplicitAutograd")

for _function in (
    loss.nll_forward,
    loss.nll_gradient,
    loss.nll_backward,
    loss.nll_backward_,
    elements.nll_elements_forward,
    elements.nll_elements_backward,
    elements.nll_elements_backward_,
    latents.reparameterize_kl_forward,
    latents.reparameterize_kl_backward,
    latents.gaussian_kl_forward,
    latents.gaussian_kl_backward,
    log_probs.sample_log_probs_forward,
    log_probs.sample_log_probs_backward,
    mixture.gaussian_mixture_log_prob_forward,
    mixture.gaussian_mixture_log_prob_backward,
):
    # Tensors of ROCm have the dispatch key CUDA too.
    for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _library.impl(_function.__name__, _function, _key)
    _library.impl(_function.__name__, getattr(fakes, _function.__name__), "Meta")
