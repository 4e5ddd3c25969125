"""The negative binomials, with or without additional zeros: the kernels of a batch of counts, and their launches.

They describe the counts of genes in cells. Most counts are zeros, so `count_kernel` first computes every element as if
its count were 0, in the type of computation C. It lists the places of the other counts, section by section, or finds
them among the stored values of a sparse target. Of these it computes the small ones in C and the rest, whose terms
cancel, in float64, and overwrites the first results. If the means are a softmax times a library, `softmax_kernel`
reads the logits before it, and `logits_kernel` turns the derivatives by the means into those by the logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._spec import VARIANTS
from .counts_elements import (
    bounded,
    dispersion_of_zeros,
    other_count,
    small_count,
    with_additional_zeros,
    zero_term,
)
from .counts_softmax import logits_kernel, softmax_kernel, softmax_of_row
from .elementary import exp, log1p
from .launch import (
    COMPUTE,
    dense_rows,
    divisor,
    kernel,
    launch,
    number,
    partition,
    row_dtype,
    row_stride,
    weight_view,
)
from .sparse import mark_stored, positions_until, row_positions
from .tiles import append, by_weight, factor_of_row, load_weights, put, sum_fours
from .tuning import choice


@triton.jit
def put_others(
    value,
    d_lead,
    d_theta,
    pi,
    own,  # the weights of the elements
    place,
    there,
    factor,
    d_mean,  # these point to the row
    d_dispersion,
    d_zero_logits,
    element_values,
    log_grads,
    INFLATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RAW: tl.constexpr,
):
    """Writes the derivatives of counts above zero. Returns the nll and the derivative by the lead, 0 outside."""
    if INFLATED:
        e = exp(-tl.abs(pi))
        value += tl.where(pi > 0.0, pi, 0.0) + log1p(e)
        d_pi = tl.where(pi < 0.0, e, 1.0) / (1.0 + e)
        if WEIGHTED > 0:
            d_pi *= own
        if d_zero_logits is not None:
            put(d_zero_logits + place, d_pi * factor, there)
    if WEIGHTED > 0:
        value *= own
        d_lead *= own
        d_theta *= own
    if element_values is not None:
        tl.store(element_values + place, value * factor, there)
    if RAW:
        if log_grads is not None:
            tl.store(log_grads + place, d_lead, there)
    elif d_mean is not None:
        put(d_mean + place, d_lead * factor, there)
    if d_dispersion is not None:
        put(d_dispersion + place, d_theta * factor, there)
    return tl.where(there, value, 0.0), tl.where(there, d_lead, 0.0)


@kernel
def count_kernel(
    mean,  # (rows, genes), with any stride of rows; with RAW, logits
    dispersion,  # (rows, genes), or one row for all with stride 0; with RAW, logarithms
    zero_logits,  # (rows, genes), or None
    library,  # with RAW, (rows,)
    tops,  # with RAW, what softmax_kernel writes, (rows, splits of it)
    sums,
    target,  # (target_rows, genes), with any stride of rows; or the stored values of a sparse one
    starts,  # of a sparse target, its crow_indices, else None
    stored_columns,  # the same: its col_indices
    weights,  # the weights of elements (target_rows, genes), or None; this and the next eight are in a WeightView
    weights_stride: "number",
    weights_size_0: "number",
    weights_size_1: "number",
    weights_size_2: "number",
    weights_stride_0: "number",
    weights_stride_1: "number",
    weights_stride_2: "number",
    weights_stride_3: "number",
    d_mean,  # out, or None: (rows, genes), dense, as are the next two; with RAW, logits_kernel writes it
    d_dispersion,
    d_zero_logits,
    row_sums,  # out: (rows, sections) in C
    row_grads,  # out with RAW: (rows, sections) in C, the sums of the derivatives by the logarithms of the means
    row_weighs,  # out with RAW and weights: (rows, sections) int32, whether there is one that is not 0
    element_values,  # out, or None: (rows, genes) in C, dense, times the factor of the derivatives; not with RAW
    log_grads,  # out with RAW, or None: (rows, genes) in C, the derivatives by the logarithms of the means
    places,  # room for (programs, SECTION) int16
    marks,  # of a sparse target, room for (programs, SECTION) int8
    grad_loss,  # see row_factor in tiles.py
    grad_nll,
    weight: tl.float64,
    eps: tl.float64,  # added to the mean; not with RAW
    genes: "number",  # this and the strides of rows in units of UNIT elements
    mean_stride: "number",
    dispersion_stride: "number",
    zero_stride: "number",
    library_stride: "number",
    target_stride: "number",
    target_rows: "number",  # see elementwise.py
    stored: "number",  # the number of stored values
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    softmax_splits: "number",
    splits: "number",  # programs of a row
    each: "number",  # sections of a program
    sections: "number",  # of a row
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # KIND of the weights
    RAW: tl.constexpr,
    UNIT: tl.constexpr,
    SECTION: tl.constexpr,  # a multiple of COLUMNS
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    genes = genes * UNIT
    mean += row * mean_stride * UNIT
    dispersion += row * dispersion_stride * UNIT
    data_row = row
    if REPEATED:
        data_row = row % target_rows
    if starts is None:
        target += data_row * target_stride * UNIT
    else:
        row_first, row_last, row_valid = row_positions(starts, data_row, stored)
        marks += program * SECTION
    if WEIGHTED > 0:
        weights += data_row * weights_stride
    dense = row * genes
    INFLATED: tl.constexpr = zero_logits is not None
    if zero_logits is not None:
        zero_logits += row * zero_stride * UNIT
        if d_zero_logits is not None:
            d_zero_logits += dense
    if d_mean is not None:
        d_mean += dense
    if d_dispersion is not None:
        d_dispersion += dense
    if element_values is not None:
        element_values += dense
    if log_grads is not None:
        log_grads += dense
    places += program * SECTION
    factor = factor_of_row(grad_loss, grad_nll, weight, row, grad_loss_stride, grad_nll_stride, C)
    factor_of_all = factor

    if RAW:
        top, total = softmax_of_row(tops, sums, row, softmax_splits, SPLITS)
        size = tl.load(library + row * library_stride).to(C)
        scale = bounded(size / total, 0.0, 1.79e308 if C == tl.float64 else 3.4e38)
        offset = tl.log(size.to(tl.float64)) - top.to(tl.float64) - tl.log(total.to(tl.float64))
    else:
        offset = tl.full((), eps, tl.float64)

    first_section = (program % splits * each).to(tl.int32)
    for section in range(first_section, tl.minimum(first_section + each, sections)):
        begin = section * SECTION
        end = tl.minimum(begin + SECTION, genes)
        values = tl.zeros((COLUMNS // 4,), C)
        grads = tl.zeros((COLUMNS // 4,), C)
        if WEIGHTED > 0:
            weighs = tl.zeros((COLUMNS,), tl.int32)
        count = tl.full((), 0, tl.int32)
        if starts is not None:
            first = positions_until(stored_columns, row_first, row_last, begin, genes, PLACES)
            last = positions_until(stored_columns, row_first, row_last, end, genes, PLACES)
            good = row_valid & (first <= last)
            good = good & mark_stored(
                marks, target, stored_columns, first, last, begin, end, SECTION, PLACES, C
            )
            count = tl.where(good, last - first, 0).to(tl.int32)
            broken = tl.where(good, 0.0, float("nan"))
            factor = factor_of_all + broken

        # All elements as if their counts were 0.
        for start in range(begin, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < genes
            mu = tl.load(mean + columns, inside, 1.0).to(C)
            theta = tl.load(dispersion + columns, inside, 1.0).to(C)
            if starts is None:
                is_other = tl.load(target + columns, inside, 0).to(C) != 0.0
            else:
                is_other = tl.load(marks + (columns - begin)) != 0
            kept = inside
            if WEIGHTED > 0:
                own = load_weights(
                    weights,
                    columns,
                    inside,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    C,
                )
                kept = inside & (own != 0.0)
                weighs = tl.where(kept, 1, weighs)
            if RAW:
                mu = exp(mu - top) * scale
            else:
                mu += offset.to(C)
            theta, inverse_theta = dispersion_of_zeros(theta, RAW)
            value, d_mu, d_theta = zero_term(mu, theta, inverse_theta)
            if INFLATED:
                pi = tl.load(zero_logits + columns, inside, 0.0).to(C)
                value, d_z, d_pi = with_additional_zeros(value, pi)
                d_mu *= d_z
                d_theta *= d_z
                if WEIGHTED > 0:
                    d_pi = by_weight(own, d_pi)
                if d_zero_logits is not None:
                    put(d_zero_logits + columns, d_pi * factor, inside)
            if RAW:
                d_mu *= mu
                d_theta *= theta
            if WEIGHTED > 0:
                value = by_weight(own, value)
                d_mu = by_weight(own, d_mu)
                d_theta = by_weight(own, d_theta)
            if element_values is not None:
                tl.store(element_values + columns, value * factor, inside)
            is_zero = kept & ~is_other
            values += sum_fours(tl.where(is_zero, value, 0.0), COLUMNS)
            if RAW:
                grads += sum_fours(tl.where(is_zero, d_mu, 0.0), COLUMNS)
                if log_grads is not None:
                    tl.store(log_grads + columns, d_mu, inside)
            elif d_mean is not None:
                put(d_mean + columns, d_mu * factor, inside)
            if d_dispersion is not None:
                put(d_dispersion + columns, d_theta * factor, inside)
            if starts is None:
                count = append(places, count, columns - begin, kept & is_other, COLUMNS)
        # All threads must have written the places and the derivatives of zeros before other threads read or overwrite
        # them.
        tl.debug_barrier()

        # The others, in float32 if that is enough. The places of the rest move to the front of the list.
        lanes = tl.arange(0, PLACES)
        other_values = tl.zeros((PLACES,), C)
        other_grads = tl.zeros((PLACES,), C)
        rest = count
        if C == tl.float32:
            rest = tl.full((), 0, tl.int32)
            for base in range(0, count, PLACES):
                j = base + lanes
                there = j < count
                if starts is None:
                    entry = tl.load(places + j, there, 0).to(tl.int32)
                    place = begin + entry
                    t = tl.load(target + place, there, 0).to(C)
                else:
                    entry = j
                    place = tl.load(stored_columns + first + j, there, begin).to(tl.int32)
                    t = tl.load(target + first + j, there, 0).to(C)
                there = there & (t != 0.0)
                own_weight = t
                if WEIGHTED > 0:
                    own_weight = load_weights(
                        weights,
                        place,
                        there,
                        weights_size_0,
                        weights_size_1,
                        weights_size_2,
                        weights_stride_0,
                        weights_stride_1,
                        weights_stride_2,
                        weights_stride_3,
                        WEIGHTED,
                        C,
                    )
                    there = there & (own_weight != 0.0)
                pi = t
                if INFLATED:
                    pi = tl.load(zero_logits + place, there, 0.0).to(C)
                fits, value, d_lead, d_theta = small_count(
                    t,
                    tl.load(mean + place, there, 0.0).to(C),
                    tl.load(dispersion + place, there, 0.0).to(C),
                    offset,
                    RAW,
                )
                value, d_lead = put_others(
                    value,
                    d_lead,
                    d_theta,
                    pi,
                    own_weight,
                    place,
                    there & fits,
                    factor,
                    d_mean,
                    d_dispersion,
                    d_zero_logits,
                    element_values,
                    log_grads,
                    INFLATED,
                    WEIGHTED,
                    RAW,
                )
                other_values += value
                other_grads += d_lead
                left = (there & ~fits).to(tl.int32)
                left_count = tl.sum(left, 0)
                if left_count > 0:
                    tl.debug_barrier()  # all threads must have read the list before others write to it
                    tl.store(places + (rest + tl.cumsum(left, 0) - 1), entry.to(tl.int16), left > 0)
                    rest += left_count
            tl.debug_barrier()
        for base in range(0, rest, PLACES):
            j = base + lanes
            there = j < rest
            if starts is None or C == tl.float32:
                entry = tl.load(places + j, there, 0).to(tl.int32)
            else:
                entry = j
            # A lane without a count takes part with a large one, because these take the fewest branches.
            if starts is None:
                place = begin + entry
                t = tl.load(target + place, there, 64).to(C)
            else:
                place = tl.load(stored_columns + first + entry, there, begin).to(tl.int32)
                t = tl.load(target + first + entry, there, 64).to(C)
                there = there & (t != 0.0)
            own_weight = t
            if WEIGHTED > 0:
                own_weight = load_weights(
                    weights,
                    place,
                    there,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    C,
                )
                there = there & (own_weight != 0.0)
            pi = t
            if INFLATED:
                pi = tl.load(zero_logits + place, there, 0.0).to(C)
            wide_value, wide_d_lead, wide_d_theta = other_count(
                t.to(tl.float64),
                tl.load(mean + place, there, 1.0).to(C).to(tl.float64),
                tl.load(dispersion + place, there, 1.0).to(C).to(tl.float64),
                offset,
                RAW,
            )
            value, d_lead = put_others(
                wide_value.to(C),
                wide_d_lead.to(C),
                wide_d_theta.to(C),
                pi,
                own_weight,
                place,
                there,
                factor,
                d_mean,
                d_dispersion,
                d_zero_logits,
                element_values,
                log_grads,
                INFLATED,
                WEIGHTED,
                RAW,
            )
            other_values += value
            other_grads += d_lead
        # All threads must have read the list before others write that of the next section.
        tl.debug_barrier()

        section_sum = tl.sum(values, 0) + tl.sum(other_values, 0)
        if starts is not None:
            section_sum += broken
        at = row * sections + section
        if RAW:
            infinite = size == float("inf")
            if WEIGHTED > 0:
                weighs_here = tl.max(weighs, 0)
                infinite = infinite & (weighs_here > 0)
                tl.store(row_weighs + at, weighs_here)
            section_sum = tl.where(infinite, section_sum + size, section_sum)
            tl.store(row_grads + at, tl.sum(grads, 0) + tl.sum(other_grads, 0))
        tl.store(row_sums + at, section_sum)


class Form(NamedTuple):
    """Where a likelihood keeps its params. The dispersion is always the second one."""

    raw: bool
    zero_logits: int | None
    library: int | None

    @property
    def tensors(self) -> int:
        return 2 + (self.zero_logits is not None) + (self.library is not None)


def _form(tensors: Sequence[str]) -> Form:
    place = {name: i for i, name in enumerate(tensors)}
    return Form("library" in place, place.get("zi_logits"), place.get("library"))


FORMS = {
    variant.name: _form(variant.tensors)
    for variant in VARIANTS.values()
    if variant.density.endswith("negative_binomial")
}


def shared_bit(likelihood: str, params: Sequence[Tensor]) -> int:
    """The bit of a param that all rows share. With a factor for each row, its gradient must be computed again."""
    return 2 if likelihood in FORMS and params[1].dim() == 1 else 0


class Cut(NamedTuple):
    """How the kernels divide rows of genes."""

    columns: int  # of a tile of count_kernel
    section: int  # the columns whose counts above zero are listed together
    sections: int
    splits: int  # the programs of count_kernel for a row
    each: int  # sections of a program
    places: int  # how many of the listed counts are computed at a time
    warps: int


# A section has enough counts above zero to occupy all threads of a program, and few enough tiles that a batch of 128
# cells occupies a GPU.
TILES = 4


def cut_of(rows: int, genes: int, dtype: torch.dtype, device: torch.device) -> Cut:
    chosen = choice("counts", rows * genes, device)
    # An element takes most of the registers that a thread has; in float64, half as many fit.
    widest = chosen.tile if dtype == torch.float32 else chosen.tile // 2
    columns = min(widest, max(16, triton.next_power_of_2(genes)))
    section = min(columns * TILES, max(columns, triton.next_power_of_2(genes)))
    sections = -(-genes // section)
    splits = min(sections, max(1, chosen.programs // max(1, rows)))
    each = -(-sections // splits) if splits else 0
    splits = -(-sections // each) if each else 0
    warps = max(1, chosen.warps * columns // widest)
    return Cut(columns, section, sections, splits, each, min(columns, chosen.tile // 8), warps)


# The number of partial results of a row that are combined at a time. A row's softmax has at most as many splits.
_SPLITS = 32


def evaluate(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    needs: int,
    weight: float,
    *,
    grad_loss: Tensor | None = None,
    grad_nll: Tensor | None = None,
    values: bool = True,
    element_values: Tensor | None = None,
    element_weight: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Run the kernels, as elementwise.evaluate runs the kernel of elements. They always compute the values."""
    form, lead = FORMS[likelihood], params[0]
    rows, genes = lead.shape
    dtype, device = row_dtype(lead), lead.device
    starts, stored_columns = params[form.tensors :] if len(params) > form.tensors else (None, None)
    sparse = starts is not None
    target_rows = starts.numel() - 1 if starts is not None else target.shape[0]
    mean, data = dense_rows(lead), target.contiguous() if sparse else dense_rows(target)
    shared = params[1].dim() == 1
    dispersion = params[1].contiguous() if shared else dense_rows(params[1])
    zero_logits = dense_rows(params[form.zero_logits]) if form.zero_logits is not None else None
    library = params[form.library] if form.library is not None else None

    of_element = lead.dtype if element_values is None else dtype

    def room(wanted: bool, dtype: torch.dtype = of_element) -> Tensor | None:
        return lead.new_empty((rows, genes), dtype=dtype) if wanted else None

    d_mean = room(bool(needs & 1))
    # The gradient of a shared dispersion is summed over the rows afterwards, in an order that does not depend on the
    # launch.
    d_dispersion = room(bool(needs & 2), dtype if shared else of_element)
    d_zero_logits = room(form.zero_logits is not None and bool(needs >> form.zero_logits & 1))
    d_library = (
        torch.empty_like(library) if library is not None and needs >> (form.library or 0) & 1 else None
    )
    log_grads = None
    if form.raw and d_mean is not None:
        log_grads = d_mean if d_mean.dtype == dtype else room(True, dtype)

    cut = cut_of(rows, genes, dtype, device)
    row_sums = lead.new_empty((rows, cut.sections), dtype=dtype)
    strides = [
        t.stride(0) if t is not None and t.dim() == 2 else 0 for t in (mean, dispersion, zero_logits, data)
    ]
    unit = divisor(genes, *strides)
    weights = weight_view(element_weight, (target_rows, genes))
    repeated = target_rows != rows
    compute = COMPUTE[dtype]

    tops = sums = row_grads = row_weighs = None
    # A row's softmax is split as if there were no other rows, so that its result does not depend on them.
    of_any = choice("nll", 1 << 30, device)
    softmax = partition(1, genes, of_any._replace(programs=_SPLITS), narrowest=64)
    softmax_warps = max(1, of_any.warps * softmax.columns // of_any.tile)
    if form.raw:
        tops, sums = (lead.new_empty((rows, softmax.splits), dtype=dtype) for _ in range(2))
        row_grads = torch.empty_like(row_sums)
        row_weighs = torch.empty_like(row_sums, dtype=torch.int32) if element_weight is not None else None
        launch(
            softmax_kernel,
            rows * softmax.splits,
            device,
            mean,
            tops,
            sums,
            genes // unit,
            strides[0] // unit,
            softmax.splits,
            softmax.tiles,
            UNIT=unit,
            COLUMNS=softmax.columns,
            # In each part, a thread has as many logits as a 128-bit access reads.
            PARTS=lead.element_size(),
            C=compute,
            num_warps=softmax_warps,
        )
    programs = rows * cut.splits
    launch(
        count_kernel,
        programs,
        device,
        mean,
        dispersion,
        zero_logits,
        library,
        tops,
        sums,
        data,
        starts,
        stored_columns,
        *weights.arguments,
        None if form.raw else d_mean,
        d_dispersion,
        d_zero_logits,
        row_sums,
        row_grads,
        row_weighs,
        element_values,
        log_grads,
        torch.empty((programs, cut.section), dtype=torch.int16, device=device),
        torch.empty((programs, cut.section), dtype=torch.int8, device=device) if sparse else None,
        grad_loss,
        grad_nll,
        weight,
        0.0 if form.raw else constants[0],
        genes // unit,
        strides[0] // unit,
        strides[1] // unit,
        strides[2] // unit,
        library.stride(0) if library is not None else 0,
        strides[3] // unit,
        target_rows,
        data.numel() if sparse else 0,
        row_stride(grad_loss),
        row_stride(grad_nll),
        softmax.splits,
        cut.splits,
        cut.each,
        cut.sections,
        REPEATED=repeated,
        WEIGHTED=weights.kind,
        RAW=form.raw,
        UNIT=unit,
        SECTION=cut.section,
        COLUMNS=cut.columns,
        PLACES=cut.places,
        SPLITS=_SPLITS,
        C=compute,
        num_warps=cut.warps,
    )
    if form.raw and (d_mean is not None or d_library is not None):
        tiles = max(1, rows * genes // (softmax.columns * of_any.programs)) if d_mean is not None else genes
        splits = max(1, -(-genes // (softmax.columns * tiles)))
        launch(
            logits_kernel,
            rows * splits,
            device,
            mean,
            zero_logits,
            library,
            tops,
            sums,
            *weights.arguments,
            row_sums,
            row_grads,
            row_weighs,
            log_grads,
            d_mean,
            d_library,
            grad_loss,
            grad_nll,
            weight,
            genes // unit,
            strides[0] // unit,
            strides[2] // unit,
            library.stride(0) if library is not None else 0,
            target_rows,
            row_stride(grad_loss),
            row_stride(grad_nll),
            softmax.splits,
            cut.sections,
            splits,
            tiles,
            REPEATED=repeated,
            WEIGHTED=weights.kind,
            UNIT=unit,
            COLUMNS=softmax.columns,
            SPLITS=_SPLITS,
            C=compute,
            num_warps=softmax_warps,
        )
    if shared and d_dispersion is not None and element_values is None:
        d_dispersion = d_dispersion.sum(0).to(params[1].dtype)
    by_param = {0: d_mean, 1: d_dispersion, form.zero_logits: d_zero_logits, form.library: d_library}
    gradients = [by_param[i] for i in range(form.tensors) if needs >> i & 1]
    return [gradient for gradient in gradients if gradient is not None], row_sums, None
