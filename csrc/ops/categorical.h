// fastvae::nll of the variant "categorical": logits (B, ..., V) and a target (B, ...) of class indices.
#pragma once
#include "common.h"

namespace fastvae {

// Raises if the logits, the target and the constants (the class index to ignore) do not fit together.
void check_categorical(const Tensor& logits, const Tensor& target, at::ArrayRef<double> constants);

// Writes the nll of each row and, if requested, appends the gradient, multiplied for row r by weights[r * weight_stride].
void evaluate_categorical(const Tensor& logits, const Tensor& target, at::ArrayRef<double> constants, bool wanted, const OptionalTensor& weight,
                          const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients);

}  // namespace fastvae
