// Rows of Family::counts, on the CPU: (B, G) counts of genes in cells, whose params do not all have the data's shape.
#pragma once
#include "common.h"
#include "likelihood_table.h"

namespace fastvae {

void check_counts(const LikelihoodRow& row, at::TensorList params, const Tensor& target);

struct CountEvaluation {
  std::vector<double> nll;  // of each row
  Tensors gradients;
};

// As `evaluate` of nll_cpu.cpp: the gradient of row r is multiplied by weights[r * weight_stride].
CountEvaluation evaluate_counts(const LikelihoodRow& row, at::TensorList params, const Tensor& target, int64_t needs,
                                const double* weights, int64_t weight_stride);

}  // namespace fastvae
