// Signatures of the ops for a layer that reads a sparse matrix (schemas: library.cpp), and the check of their arguments.
#pragma once
#include "common.h"

namespace fastvae {

// (values, starts, columns, weight, bias) -> out (B, O), where the first three are the parts of a CSR matrix (B, I), and weight is (O, I).
using SparseLinearForward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&);

// The gradients that the backward op computes, in this order.
enum SparseLinearNeeds : int64_t { kWeight = 1, kBias = 2 };

// (grad, values, starts, columns, weight, needs) -> gradients.
using SparseLinearBackward = Tensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t);

void check_sparse_linear(const Tensor& values, const Tensor& starts, const Tensor& columns, const Tensor& weight,
                         const OptionalTensor& bias);

}  // namespace fastvae
