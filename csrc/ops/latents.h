// Signatures of the latent ops (schemas: library.cpp).
#pragma once
#include <ATen/core/Generator.h>

#include "common.h"

namespace fastvae {

using OptionalGenerator = std::optional<at::Generator>;

// (mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, generator) -> (z, kl), for users' calls.
using ReparameterizeKl = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                    std::optional<int64_t>, const OptionalTensor&, int64_t, const OptionalTensor&,
                                                    OptionalGenerator);

// The same arguments -> (z, kl, the seed that was used).
using SampleForward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                         std::optional<int64_t>, const OptionalTensor&, int64_t,
                                                         const OptionalTensor&, OptionalGenerator);

// The gradients that a backward op computes, in this order.
enum Needs : int64_t { kMu = 1, kLogvar = 2, kPriorMu = 4, kPriorLogvar = 8, kEps = 16 };

using SampleBackward = Tensors(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                               const OptionalTensor&, std::optional<int64_t>, const Tensor&, int64_t, const OptionalTensor&,
                               int64_t);

// (mu, logvar, prior_mu, prior_logvar, per_element) -> kl.
using KlForward = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool);
using KlBackward = Tensors(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t);

}  // namespace fastvae
