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

// Fills in the operands of every element, and returns the gradients selected by `needs`. `kept` owns copies that had to be made, and
// must live until the kernel is launched.
template <class Args>
Tensors fill_elements(Args& args, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, int64_t needs,
                      Tensors& kept) {
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
  return gradients;
}

}  // namespace fastvae
