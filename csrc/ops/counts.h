// Rows of Family::counts, on the CPU: (B, G) counts of genes in cells, whose params do not all have the data's shape.
#pragma once
#include "common.h"
#include "likelihood_table.h"

namespace fastvae {

void check_counts(const LikelihoodRow& row, at::TensorList params, const Tensor& target);

// Writes the nll of each row and appends the gradients that `needs` asks for; that of row r is multiplied by weights[r * weight_stride].
void evaluate_counts(const LikelihoodRow& row, at::TensorList params, const Tensor& target, int64_t needs, const double* weights,
                     int64_t weight_stride, std::vector<double>& nll, Tensors& gradients);

}  // namespace fastvae
