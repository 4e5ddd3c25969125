// The arguments of the CUDA kernel of the negative binomials. `kept` holds the tensors to which its views point.
#pragma once
#include "common_cuda.h"
#include "counts.h"
#include "nll.h"

namespace fastvae {

// Fills in everything except the results.
void fill_count_inputs(cuda::CountArgs& counts, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                       at::ArrayRef<double> constants, const OptionalTensor& weight, Tensors& kept);

// The same, and the gradients selected by `needs`, which it returns.
Tensors fill_counts(cuda::CountArgs& counts, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                    at::ArrayRef<double> constants, int64_t needs, const OptionalTensor& weight, Tensors& kept);

}  // namespace fastvae
