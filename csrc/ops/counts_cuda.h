// The CUDA kernels of the negative binomials, their mixture and the multinomial: their arguments and launches. `kept` holds the tensors
// to which views point.
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

// Where the kernel writes the derivatives by params[i], one for each element.
cuda::Result& grad_of(cuda::CountArgs& counts, const LikelihoodVariant& variant, int i);

// Launches the kernel of the variant.
void launch_counts(cuda::CountArgs& counts, const LikelihoodVariant& variant, const OnDevice& device);

}  // namespace fastvae
