// The CUDA side of the negative binomials, their mixture and the multinomial: the arguments of their kernels, and the launch.
#include "counts_cuda.h"

#include "nll_views.h"

namespace fastvae {
namespace {

// The place among the kernel's params and grads of params[i], which has a value for each element.
int place_of(const CountForm& form, int i) {
  if (i == form.mean2) return cuda::kSecondMean;
  if (i == form.mixture_logits) return cuda::kMixtureLogits;
  return i == form.zero_logits ? 2 : i;
}

}  // namespace

void fill_count_inputs(cuda::CountArgs& counts, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                       at::ArrayRef<double> constants, const OptionalTensor& weight, Tensors& kept) {
  constexpr auto order = at::MemoryFormat::Contiguous;
  const auto& form = count_form(variant);
  const auto keep = [&](const Tensor& t) -> const Tensor& { return kept.emplace_back(t); };
  kept.reserve(8);
  counts.rows = params[0].size(0);
  counts.size = params[0].size(1);
  counts.raw = form.raw;
  counts.params[0] = operand(keep(dense_rows(params[0], order)));
  if (variant.tensors > 1) {
    counts.shared_dispersion = params[1].dim() == 1;
    const Tensor& dispersion = keep(counts.shared_dispersion ? params[1].contiguous() : dense_rows(params[1], order));
    const int64_t stride = counts.shared_dispersion ? 0 : dispersion.stride(0);
    counts.params[1] = {dispersion.const_data_ptr(), dtype_of(dispersion), stride, counts.size, 0};
  }
  for (int i = 2; i < variant.tensors; ++i)
    if (i != form.library) counts.params[place_of(form, i)] = operand(keep(dense_rows(params[i], order)));
  if (form.library >= 0) {
    const Tensor& library = params[form.library];
    counts.library = {library.const_data_ptr(), dtype_of(library), library.stride(0)};
  }
  if (!constants.empty()) counts.constants[0] = constants[0];
  counts.weights = weights_view(weight, weighted_sizes(variant, params, target), order, kept);
  if (!has_positions(variant, params)) {
    counts.target = count_operand(keep(dense_rows(target, order)));
    counts.target_rows = repeated_rows(target.size(0), counts.rows);
    return;
  }
  const Tensor &values = keep(target.contiguous()), &starts = keep(params[variant.tensors].contiguous()),
               &columns = keep(params[variant.tensors + 1].contiguous());
  counts.target = count_operand(values);
  counts.stored = values.size(0);
  counts.starts = starts.const_data_ptr<int64_t>();
  counts.columns = columns.const_data_ptr<int64_t>();
  counts.target_rows = repeated_rows(starts.size(0) - 1, counts.rows);
}

cuda::Result& grad_of(cuda::CountArgs& counts, const LikelihoodVariant& variant, int i) {
  return counts.grads[place_of(count_form(variant), i)];
}

Tensors fill_counts(cuda::CountArgs& counts, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                    at::ArrayRef<double> constants, int64_t needs, const OptionalTensor& weight, Tensors& kept) {
  fill_count_inputs(counts, variant, params, target, constants, weight, kept);
  const auto& form = count_form(variant);
  const Tensor& lead = params[0];
  Tensors gradients;
  for (int i = 0; i < variant.tensors; ++i) {
    if (!(needs >> i & 1)) continue;
    if (i == form.library || (i == 1 && counts.shared_dispersion)) {
      gradients.push_back(uninitialized(params[i].sizes(), params[i].options()));
      (i == 1 ? counts.shared_gradient : counts.library_gradient) = output(gradients.back());
    } else {
      gradients.push_back(pooled_empty(lead.sizes(), lead));
      grad_of(counts, variant, i) = result(gradients.back());
    }
  }
  if (form.library >= 0 && needs & 1) {
    const auto type = row_dtype(lead.scalar_type());
    counts.log_mean_grads =
        lead.scalar_type() == type ? counts.grads[0] : result(kept.emplace_back(uninitialized(lead.sizes(), lead.options().dtype(type))));
  }
  return gradients;
}

void launch_counts(cuda::CountArgs& counts, const LikelihoodVariant& variant, const OnDevice& device) {
  if (count_form(variant).mean2 >= 0) launch(counts, cuda::count_mixture_scratch, cuda::count_mixture, device);
  else if (variant.tensors > 1) launch(counts, cuda::count_scratch, cuda::count_nll, device);
  else launch(counts, cuda::multinomial_scratch, cuda::multinomial, device);
}

}  // namespace fastvae
