// Signatures of the ops for the value of each element (schemas: library.cpp).
#pragma once
#include <string_view>

#include "common.h"
#include "likelihood_table.h"

namespace fastvae {

// (likelihood, params, target, constants, weight) -> values: what a user calls. The nll of each element times `weight`, in the rows' type.
using NllElements = Tensor(std::string_view, at::TensorList, const Tensor&, at::ArrayRef<double>, double);

// The same with `needs` -> (values, derivatives): bit i is set where params[i] wants its gradient. derivatives: one for each such param, of
// each element, times `weight`; in the order of params[0], in the rows' type whatever the params' (fp16 could not hold them before the factor that the backward
// brings), and of every element for a param that serves all rows, too.
using NllElementsForward = std::tuple<Tensor, Tensors>(std::string_view, at::TensorList, const Tensor&, at::ArrayRef<double>, double, int64_t);

// (grad, derivatives, shared, dtype) -> gradients in `dtype`: the derivatives times `grad`, which has their shape. Of derivatives[shared]
// (-1: of none) the sum over rows, in the derivatives' type.
using NllElementsBackward = Tensors(const Tensor&, at::TensorList, int64_t, at::ScalarType);

// (grad, derivatives, shared) -> the sum over rows, where there is one. The other derivatives are scaled in place, and not returned.
using NllElementsBackwardInPlace = Tensors(const Tensor&, at::TensorList, int64_t);

// Whether the ops serve a likelihood: that of counts by their mean.
bool gives_elements(const LikelihoodVariant& variant);

// Raises for what no kernel may be given.
void check_nll_elements(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants);

// The param that serves all rows; -1: none does.
inline int64_t shared_param(at::TensorList params) { return params.size() > 1 && params[1].dim() == 1 ? 1 : -1; }

}  // namespace fastvae
