// The variants of Family::counts that are not elementwise, the same on every device.
#include "counts.h"

namespace fastvae {
namespace {

constexpr CountForm kForms[] = {
    {"negative_binomial", false, -1, -1},
    {"zero_inflated_negative_binomial", false, 2, -1},
    {"negative_binomial_logits", true, -1, 2},
    {"zero_inflated_negative_binomial_logits", true, 2, 3},
    {"negative_binomial_mixture", false, -1, -1, 2, 3},
    {"multinomial", true, -1, -1},
};

}  // namespace

const CountForm& count_form(const LikelihoodVariant& variant) {
  for (const auto& form : kForms)
    if (form.name == variant.name) return form;
  TORCH_INTERNAL_ASSERT(false, "a variant of counts without a form");
}

bool has_positions(const LikelihoodVariant& variant, at::TensorList params) { return int64_t(params.size()) == variant.tensors + 2; }

void check_counts(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants) {
  const std::string name(variant.name);
  const auto& form = count_form(variant);
  TORCH_CHECK_VALUE(int64_t(params.size()) == variant.tensors || has_positions(variant, params), "fastvae::nll: ", name, " takes ", variant.tensors,
                    " params, and two more for the positions of a sparse target, got ", params.size());
  TORCH_CHECK_VALUE(int64_t(constants.size()) == variant.constants, "fastvae::nll: ", name, " takes ", variant.constants, " constants, got ",
                    constants.size());
  const Tensor& lead = params[0];
  TORCH_CHECK_VALUE(lead.dim() == 2, "fastvae::nll: the `params` of ", name, " must be (B, G), got ", lead.sizes());
  TORCH_CHECK_TYPE(c10::isFloatingType(lead.scalar_type()), "fastvae::nll: `params` must be floating point, got ",
                   lead.scalar_type());
  const int64_t rows = lead.size(0), genes = lead.size(1);
  const int64_t of_gene[] = {genes}, of_row[] = {rows};
  for (int i = 1; i < variant.tensors; ++i) {
    const Tensor& p = params[i];
    const bool of_genes = i == 1 && p.dim() == 1, of_rows = i == form.library;
    const at::IntArrayRef expected = of_genes ? at::IntArrayRef(of_gene) : of_rows ? at::IntArrayRef(of_row) : lead.sizes();
    TORCH_CHECK_VALUE(p.sizes() == expected, "fastvae::nll: params[", i, "] must have the shape ", expected, ", got ", p.sizes());
    const bool beside_half = p.scalar_type() == at::kFloat && lead.scalar_type() != at::kDouble && (of_genes || of_rows);
    TORCH_CHECK_TYPE(p.scalar_type() == lead.scalar_type() || beside_half, "fastvae::nll: params[", i, "] must be ",
                     lead.scalar_type(), ", got ", p.scalar_type());
  }
  TORCH_CHECK_TYPE(takes_target(variant, lead.scalar_type(), target.scalar_type()), "fastvae::nll: a `target` of ", target.scalar_type(),
                   " does not go with params of ", lead.scalar_type());
  if (!has_positions(variant, params)) {
    TORCH_CHECK_VALUE(target.dim() == 2 && serves_rows(target.size(0), rows) && target.size(1) == genes, "fastvae::nll: `target` must have the shape ", lead.sizes(), ", got ",
                      target.sizes());
    return;
  }
  const Tensor &starts = params[variant.tensors], &columns = params[variant.tensors + 1];
  TORCH_CHECK_TYPE(starts.scalar_type() == at::kLong && columns.scalar_type() == at::kLong,
                   "fastvae::nll: the positions of a sparse target must be int64");
  TORCH_CHECK_VALUE(starts.dim() == 1 && serves_rows(starts.size(0) - 1, rows) && target.dim() == 1 && columns.sizes() == target.sizes(),
                    "fastvae::nll: a sparse target of ", rows, " rows must have ", rows + 1, " crow_indices and as many col_indices as values");
}

}  // namespace fastvae
