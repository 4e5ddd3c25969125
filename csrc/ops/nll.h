// Signatures of the reconstruction ops (schemas: library.cpp).
#pragma once
#include <string_view>

#include "common.h"

namespace fastvae {

// (likelihood, params, target, constants, kl, beta, reduction, weight) -> (loss, nll), for users' calls. `weight`, if given, multiplies the
// nll of each element and has the target's sizes or 1 (for counts (B, G), for a mixture of discretised logistics one channel). Elements of
// weight 0 are left out: whatever they contain reaches neither value nor gradient.
using Nll = std::tuple<Tensor, Tensor>(std::string_view, at::TensorList, const Tensor&, at::ArrayRef<double>, const OptionalTensor&,
                                       const OptionalTensor&, int64_t, const OptionalTensor&);

// (likelihood, params, target, constants, kl, beta, reduction, needs, weight) -> (loss, nll, gradients, scalar_rows).
// Bit i of `needs` is set if params[i] needs its gradient. gradients: one for each such tensor of the data's shape, multiplied by the
// weight of the reduction; scalar_rows: (B,) derivatives of the rows with respect to the 0-dim param.
using NllForward = std::tuple<Tensor, Tensor, Tensors, Tensor>(std::string_view, at::TensorList, const Tensor&,
                                                               at::ArrayRef<double>, const OptionalTensor&,
                                                               const OptionalTensor&, int64_t, int64_t, const OptionalTensor&);

// (likelihood, params, target, constants, grad_loss, grad_nll, reduction, needs, weight) -> gradients of the objective.
using NllGradient = Tensors(std::string_view, at::TensorList, const Tensor&, at::ArrayRef<double>, const OptionalTensor&,
                            const OptionalTensor&, int64_t, int64_t, const OptionalTensor&);

// (grad_loss, grad_nll, gradients, scalar_rows, kl, beta, rows, reduction, need_kl, need_beta) -> the scaled gradients (the op with an
// underscore scales them in place and does not return them), then the requested ones of the scalar, kl and beta.
using NllBackward = Tensors(const OptionalTensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, c10::SymInt, int64_t, bool, bool);

// fp16 cannot hold a gradient before the factor of the backward is known: with 1/B, small ones would round to zero; without it, large
// ones would overflow. nll_gradient computes such gradients when the factor is known.
inline bool gradient_in_forward(at::ScalarType params) { return params != at::kHalf; }

struct LikelihoodVariant;

// Raises for arguments that kernels cannot take. Python has already checked them (fastvae/functional), with better messages.
void check_nll(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
               const OptionalTensor& kl, const OptionalTensor& beta, int64_t reduction, const OptionalTensor& weight);

// The sizes (B, ...) of what a weight multiplies: elements, positions or pixels.
c10::SmallVector<int64_t, 5> weighted_sizes(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target);

// The factor with which the reduction multiplies the loss of a row.
inline double weight_of(int64_t reduction, int64_t rows) { return reduction == kMean ? 1.0 / static_cast<double>(rows) : 1.0; }

}  // namespace fastvae
