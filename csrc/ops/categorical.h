// fastvae::nll of the row "categorical": logits (B, ..., V) and a target (B, ...) of class numbers.
#pragma once
#include "common.h"

namespace fastvae {

// Raises where the logits, the target and the constants (the number that is ignored) do not go together.
void check_categorical(const Tensor& logits, const Tensor& target, at::ArrayRef<double> constants);

// Writes the nll of each row and, where wanted, appends the gradient; that of row r is multiplied by weights[r * weight_stride].
void evaluate_categorical(const Tensor& logits, const Tensor& target, at::ArrayRef<double> constants, bool wanted,
                          const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients);

}  // namespace fastvae
