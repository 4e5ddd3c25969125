// fastvae::nll of the rows of Family::discretized: the discretised logistic and the mixtures of it.
#pragma once
#include <array>

#include "common.h"
#include "likelihood_table.h"

namespace fastvae {

// What the constants of such a row say. A single logistic has no components.
struct LogisticConstants {
  int64_t components, levels;
  double log_scale_floor, min_mass;
};

LogisticConstants logistic_constants(const LikelihoodVariant& variant, at::ArrayRef<double> constants);

// As math::DiscretizedLogistic has them.
std::array<double, cpu::kMaxConstants> bins_of(const LogisticConstants& constants);

// Raises where `params` (one tensor), `target` and the constants do not go together.
void check_discretized(const LikelihoodVariant& variant, const Tensor& params, const Tensor& target, at::ArrayRef<double> constants);

// Writes the nll of each row and, where wanted, appends the gradient; that of row r is multiplied by weights[r * weight_stride].
void evaluate_discretized(const LikelihoodVariant& variant, const Tensor& params, const Tensor& target, at::ArrayRef<double> constants,
                       bool wanted, const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients);

}  // namespace fastvae
