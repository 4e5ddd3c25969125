// Signatures of the latent ops (schemas: library.cpp).
#pragma once
#include <ATen/core/Generator.h>

#include <string_view>

#include "common.h"

namespace fastvae {

using OptionalGenerator = std::optional<at::Generator>;

// mu and logvar, or a packed head (B, 2 L, ...) and no logvar; the same for the prior. The form of the scale has a name and constants (see
// scale_form in latents_views.h). With `balance`, the gradient of the KL reaches the prior with this weight, and the posterior with what is
// left of 1. The KL is that of every row or, with `per_element`, of every element.
#define FASTVAE_POSTERIOR                                                                                                    \
  const Tensor &mu, const OptionalTensor &logvar, const OptionalTensor &prior_mu, const OptionalTensor &prior_logvar,        \
      std::string_view form, at::ArrayRef<double> constants, std::optional<double> balance
#define FASTVAE_POSTERIOR_ARGS mu, logvar, prior_mu, prior_logvar, form, constants, balance
#define FASTVAE_NOISE                                                                                                        \
  std::optional<int64_t> samples, const OptionalTensor &seed, int64_t row_offset, const OptionalTensor &eps, OptionalGenerator generator
#define FASTVAE_NOISE_ARGS samples, seed, row_offset, eps, std::move(generator)

// -> (z, kl), for users' calls.
using ReparameterizeKl = std::tuple<Tensor, Tensor>(FASTVAE_POSTERIOR, bool per_element, FASTVAE_NOISE);

// The same arguments -> (z, kl, the seed that was used).
using SampleForward = std::tuple<Tensor, Tensor, Tensor>(FASTVAE_POSTERIOR, bool per_element, FASTVAE_NOISE);

// The gradients that a backward op computes, in this order. That of a packed head has the bit of its first half.
enum Needs : int64_t { kMu = 1, kLogvar = 2, kPriorMu = 4, kPriorLogvar = 8, kEps = 16 };

using SampleBackward = Tensors(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, FASTVAE_POSTERIOR,
                               std::optional<int64_t> samples, const Tensor& seed, int64_t row_offset, const OptionalTensor& eps,
                               int64_t needs);

// (posterior, stl, samples, seed, row_offset, eps, generator) -> (z, log_q, log_p), for users' calls.
#define FASTVAE_DENSITIES                                                                                                    \
  const Tensor &mu, const OptionalTensor &logvar, const OptionalTensor &prior_mu, const OptionalTensor &prior_logvar,        \
      std::string_view form, at::ArrayRef<double> constants, bool stl
#define FASTVAE_DENSITIES_ARGS mu, logvar, prior_mu, prior_logvar, form, constants, stl
#define FASTVAE_DRAWS int64_t samples, const OptionalTensor &seed, int64_t row_offset, const OptionalTensor &eps, OptionalGenerator generator

using SampleLogProbs = std::tuple<Tensor, Tensor, Tensor>(FASTVAE_DENSITIES, FASTVAE_DRAWS);
// The same arguments -> (z, log_q, log_p, the seed that was used).
using LogProbsForward = std::tuple<Tensor, Tensor, Tensor, Tensor>(FASTVAE_DENSITIES, FASTVAE_DRAWS);
using LogProbsBackward = Tensors(const OptionalTensor& grad_z, const OptionalTensor& grad_log_q, const OptionalTensor& grad_log_p,
                                 FASTVAE_DENSITIES, int64_t samples, const Tensor& seed, int64_t row_offset, const OptionalTensor& eps,
                                 int64_t needs);

using KlForward = Tensor(FASTVAE_POSTERIOR, bool per_element);
using KlBackward = Tensors(const Tensor& grad_kl, FASTVAE_POSTERIOR, int64_t needs);

}  // namespace fastvae
