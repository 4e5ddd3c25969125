// The arguments of the CUDA kernel of the negative binomials. `kept` holds the tensors to which its views point.
#pragma once
#include "common_cuda.h"
#include "counts.h"
#include "nll.h"

namespace fastvae {

inline void refuse_weight(const OptionalTensor& weight) {
  TORCH_CHECK_NOT_IMPLEMENTED(!weight, "fastvae: the CUDA kernels of counts read no `weight` yet; fastvae.set_backend(\"auto\") takes what does");
}

// Fills in everything except the results.
void fill_count_inputs(cuda::CountArgs& counts, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                       at::ArrayRef<double> constants, Tensors& kept);

// The same, and the gradients selected by `needs`, which it returns.
Tensors fill_counts(cuda::CountArgs& counts, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                    at::ArrayRef<double> constants, int64_t needs, Tensors& kept);

}  // namespace fastvae
