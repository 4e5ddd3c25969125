// fastvae::nll of the variants of Family::discretized: the discretised logistic and its mixtures.
#pragma once
#include <array>

#include "common.h"
#include "likelihood_table.h"

namespace fastvae {

// The constants of such a variant. A single logistic has no components.
struct LogisticConstants {
  int64_t components, levels;
  double log_scale_floor, min_mass;
};

LogisticConstants logistic_constants(const LikelihoodVariant& variant, at::ArrayRef<double> constants);

// In the format of math::DiscretizedLogistic.
std::array<double, cpu::kMaxConstants> bins_of(const LogisticConstants& constants);

// Raises if `params` (one tensor), `target` and the constants do not fit together.
void check_discretized(const LikelihoodVariant& variant, const Tensor& params, const Tensor& target, at::ArrayRef<double> constants);

// Writes the nll of each row and, if requested, appends the gradient, multiplied for row r by weights[r * weight_stride].
void evaluate_discretized(const LikelihoodVariant& variant, const Tensor& params, const Tensor& target, at::ArrayRef<double> constants,
                       bool wanted, const OptionalTensor& weight, const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients);

}  // namespace fastvae
