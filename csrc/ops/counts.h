// Variants of Family::counts on the CPU: (B, G) counts of genes in cells, whose params do not all have the data's shape.
#pragma once
#include "common.h"
#include "likelihood_table.h"

namespace fastvae {

void check_counts(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants);

// Writes the nll of each row and appends the gradients selected by `needs`, multiplied for row r by weights[r * weight_stride].
void evaluate_counts(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants, int64_t needs, const OptionalTensor& weight,
                     const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients);

// Writes the value of each element and, for each bit of `needs`, its derivatives with respect to that param, all multiplied by `factor`:
// (B, G), dense, in the dtype of the rows. Only for variants whose params are not raw, and dense targets.
void evaluate_count_elements(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                             double factor, int64_t needs, const OptionalTensor& weight, const Tensor& values, const Tensors& derivatives);

}  // namespace fastvae
