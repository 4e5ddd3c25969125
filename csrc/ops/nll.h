// Signatures of the reconstruction ops (schemas: library.cpp).
#pragma once
#include <string_view>

#include "common.h"

namespace fastvae {

using Tensors = std::vector<at::Tensor>;

// (likelihood, params, target, constants, kl, beta, reduction, needs) -> (loss, nll, gradients, scalar_rows).
// `needs`: bit i is set where params[i] wants its gradient. gradients: one for each such tensor of the data's shape, already
// multiplied by the reduction's weight unless they are fp16; scalar_rows: (B,) derivatives of the rows by the 0-dim param.
using NllForward = std::tuple<Tensor, Tensor, Tensors, Tensor>(std::string_view, at::TensorList, const Tensor&,
                                                               at::ArrayRef<double>, const OptionalTensor&,
                                                               const OptionalTensor&, int64_t, int64_t);

// (grad_loss, grad_nll, gradients, scalar_rows, kl, beta, rows, reduction, need_kl, need_beta) -> the scaled gradients (the op
// with an underscore scales them in place and does not return them), then those of the scalar, kl and beta that are wanted.
using NllBackward = Tensors(const OptionalTensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, c10::SymInt, int64_t, bool, bool);

// 1/B before rounding to fp16 would turn small gradients into zeros, so those are saved without the weight.
inline bool weighted_in_forward(at::ScalarType gradient) { return gradient != at::kHalf; }

}  // namespace fastvae
