// Converts the arguments of fastvae::nll_* into the plain structs that all kernels take.
#pragma once
#include "buffer_pool.h"
#include "likelihood_table.h"
#include "nll.h"

namespace fastvae {

// Half of a packed head: dimension 1 of (B, 2C, ...) holds the C channels of one param, then the C channels of the next. In
// channels_last order, the two alternate at every pixel.
template <class View>
View half_of_head(View whole, int64_t which, int64_t channels, bool channels_last) {
  const int64_t size = whole.run / 2;
  whole = cpu::shifted(whole, which * (channels_last ? channels : size));
  whole.run = channels_last ? channels : size;
  whole.run_stride = channels_last ? 2 * channels : 0;
  return whole;
}

// A view of the weights of elements (or positions, or pixels) of these sizes, (B, ...), which are read in `order`.
inline cpu::Weights weights_view(const OptionalTensor& weight, at::IntArrayRef sizes, at::MemoryFormat order, Tensors& kept) {
  cpu::Weights view;
  if (!weight) return view;
  kept.push_back(*weight);
  const Tensor& t = kept.back();
  const auto add_level = [&](int64_t i) {
    const int64_t size = sizes[i], stride = t.size(i) == 1 ? 0 : t.stride(i);
    if (size == 1) return;
    if (view.levels > 0 && stride == view.sizes[view.levels - 1] * view.strides[view.levels - 1]) {
      view.sizes[view.levels - 1] *= size;
      return;
    }
    TORCH_CHECK_VALUE(view.levels < cpu::kMaxLevels, "fastvae::nll: the `weight` has too many broadcast dimensions; pass weight.expand(",
                      sizes, ").contiguous()");
    view.sizes[view.levels] = size;
    view.strides[view.levels++] = stride;
  };
  const bool channels_last = order != at::MemoryFormat::Contiguous;
  if (channels_last) add_level(1);
  for (int64_t i = t.dim() - 1; i > (channels_last ? 1 : 0); --i) add_level(i);
  if (view.levels == 0) view.sizes[view.levels++] = 1;
  view.data = t.const_data_ptr();
  view.type = dtype_of(t);
  if (view.type == cpu::DType::u8) view.type = cpu::DType::byte;
  view.row_stride = t.size(0) == 1 ? 0 : t.stride(0);
  for (int l = 0; l < view.levels; ++l) view.inverses[l] = cpu::Weights::inverse_of(std::max<int64_t>(1, view.sizes[l]));
  return view;
}

// Fills in the operands of every element, and returns the gradients selected by `needs`. `kept` owns copies that had to be made, and
// must live until the kernel is launched.
template <class Args>
Tensors fill_elements(Args& args, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, int64_t needs,
                      const OptionalTensor& weight, Tensors& kept) {
  const Tensor& lead = params[0];
  const auto order = memory_order(lead);
  args.element = variant.element;
  args.rows = lead.size(0);
  args.size = event_size(target);
  Tensors gradients;
  for (size_t i = 0; i < params.size() - variant.has_scalar; ++i) {
    kept.push_back(dense_rows(params[i], order));
    args.params[i] = operand(kept.back());
    if (!(needs >> i & 1)) continue;
    gradients.push_back(pooled_empty(lead.sizes(), lead, order));
    args.grads[i] = result(gradients.back());
  }
  if (variant.packed) {
    const bool channels_last = order != at::MemoryFormat::Contiguous;
    for (int which = 1; which >= 0; --which) {
      args.params[which] = half_of_head(args.params[0], which, target.size(1), channels_last);
      if (needs) args.grads[which] = half_of_head(args.grads[0], which, target.size(1), channels_last);
    }
  }
  kept.push_back(dense_rows(target, order));
  args.target = variant.integers == Integers::counts ? count_operand(kept.back()) : operand(kept.back());
  args.target_rows = repeated_rows(target.size(0), args.rows);
  args.weights = weights_view(weight, weighted_sizes(variant, params, target), order, kept);
  return gradients;
}

}  // namespace fastvae
