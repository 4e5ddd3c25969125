// Variants of Family::counts that are not elementwise: (B, G) counts of genes in cells, whose params do not all have the data's shape.
#pragma once
#include "common.h"
#include "likelihood_table.h"

namespace fastvae {

// The positions of the params of each variant. The dispersion is always the second; the multinomial has logits only.
struct CountForm {
  std::string_view name;
  bool raw;  // the params are logits and the logarithm of the dispersion
  int zero_logits, library;
  int mean2 = -1, mixture_logits = -1;  // of a mixture of negative binomials
};

const CountForm& count_form(const LikelihoodVariant& variant);

// Whether the target is sparse: its values, whose positions (crow_indices and col_indices) follow the params.
bool has_positions(const LikelihoodVariant& variant, at::TensorList params);

void check_counts(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants);

// On the CPU: writes the nll of each row and appends the gradients selected by `needs`, multiplied for row r by weights[r * weight_stride].
void evaluate_counts(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants, int64_t needs, const OptionalTensor& weight,
                     const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients);

// On the CPU: writes the value of each element and, for each bit of `needs`, its derivatives with respect to that param, all multiplied by `factor`:
// (B, G), dense, in the dtype of the rows. Only for variants whose params are not raw, and dense targets.
void evaluate_count_elements(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                             double factor, int64_t needs, const OptionalTensor& weight, const Tensor& values, const Tensors& derivatives);

}  // namespace fastvae
