// Signatures of the ops for mixtures of Gaussians (schemas: library.cpp), and the check of their arguments.
#pragma once
#include "common.h"

namespace fastvae {

// (z, mu, logvar, log_weight, joint, per_dimension) -> (joint, per_dimension), of which the one that is not requested is empty.
using MixtureForward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, bool, bool);

// The gradients that the backward op computes, in this order.
enum MixtureNeeds : int64_t { kPoints = 1, kMeans = 2, kLogvars = 4, kLogWeights = 8 };

// (grad_joint, grad_per_dimension, z, mu, logvar, log_weight, joint, per_dimension, needs) -> gradients.
using MixtureBackward = Tensors(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                                const OptionalTensor&, const Tensor&, const Tensor&, int64_t);

void check_mixture(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weight);

}  // namespace fastvae
