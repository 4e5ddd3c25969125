// Signatures of the ops for the value of each element (schemas: library.cpp).
#pragma once
#include <string_view>

#include "common.h"
#include "likelihood_table.h"

namespace fastvae {

// (likelihood, params, target, constants, factor, weight) -> values, for users' calls: the nll of each element times `factor`, in the rows'
// dtype. `weight` is that of fastvae::nll.
using NllElements = Tensor(std::string_view, at::TensorList, const Tensor&, at::ArrayRef<double>, double, const OptionalTensor&);

// The same with `needs` before the weight -> (values, derivatives). Bit i of `needs` is set if params[i] needs its gradient. derivatives: one tensor for
// each such param, per element and times `factor`, in the memory order of params[0]. They have the rows' dtype, because fp16 could not
// hold them before the factor of the backward is known. For a param that all rows share, they are per element too.
using NllElementsForward = std::tuple<Tensor, Tensors>(std::string_view, at::TensorList, const Tensor&, at::ArrayRef<double>, double, int64_t,
                                                      const OptionalTensor&);

// (grad, derivatives, shared, dtype) -> gradients in `dtype`: the derivatives times `grad`, which has their shape. derivatives[shared]
// (none if -1) is summed over rows, in the derivatives' dtype.
using NllElementsBackward = Tensors(const Tensor&, at::TensorList, int64_t, at::ScalarType);

// (grad, derivatives, shared) -> the sum over rows, if any. The other derivatives are scaled in place, and not returned.
using NllElementsBackwardInPlace = Tensors(const Tensor&, at::TensorList, int64_t);

// Whether the ops serve a variant, which must be one of counts by their mean.
bool gives_elements(const LikelihoodVariant& variant);

// Raises for arguments that kernels cannot take.
void check_nll_elements(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                        const OptionalTensor& weight);

// The index of the param that all rows share, or -1.
inline int64_t shared_param(at::TensorList params) { return params.size() > 1 && params[1].dim() == 1 ? 1 : -1; }

}  // namespace fastvae
