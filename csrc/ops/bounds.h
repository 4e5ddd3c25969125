// The importance-weighted bound of fastvae/bounds.py, computed together with the reconstruction loss of every draw.
#pragma once
#include <string_view>

#include "common.h"

namespace fastvae {

struct LikelihoodVariant;

// Whether `iwae_bound` serves these arguments. They are plain CPU tensors.
bool serves_iwae_bound(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, const Tensor& log_q,
                       const Tensor& log_p, const Tensor& beta, const OptionalTensor& weight);

// (loss, bound, nll, kl, ess, weights) of K draws, for log_q and log_p of (K, B), params of K * B rows, whose first B rows are the first
// draw, and a target of B rows. Only the loss has a gradient. `weights` (K, B) are the normalised importance weights.
Tensors iwae_bound(std::string_view likelihood, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                   const Tensor& log_q, const Tensor& log_p, const Tensor& beta, int64_t reduction, const OptionalTensor& weight);

}  // namespace fastvae
