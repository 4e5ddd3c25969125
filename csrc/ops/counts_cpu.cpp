// The CPU side of the negative binomials, their mixture and the multinomial.
#include "counts.h"

#include "buffer_pool.h"
#include "cpu_kernels.h"
#include "nll_views.h"

namespace fastvae {
namespace {

// The user's sparse tensors may be malformed, and the kernel writes at the positions that they contain.
void check_positions(const int64_t* starts, const int64_t* columns, int64_t rows, int64_t genes, int64_t values) {
  bool good = starts[0] == 0 && starts[rows] == values;
  for (int64_t r = 0; r < rows; ++r) good &= starts[r] <= starts[r + 1];
  TORCH_CHECK_VALUE(good, "fastvae::nll: the crow_indices of `target` must rise from 0 to its ", values, " values");
  for (int64_t i = 0; i < values; ++i) good &= columns[i] >= 0 && columns[i] < genes;
  TORCH_CHECK_INDEX(good, "fastvae::nll: the col_indices of `target` must lie between 0 and ", genes - 1);
}

// The arguments of the kernel. `kept` holds the tensors to which its views point.
void fill_inputs(cpu::CountMixtureArgs& args, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                 at::ArrayRef<double> constants, const OptionalTensor& weight, Tensors& kept) {
  constexpr auto order = at::MemoryFormat::Contiguous;
  const auto& form = count_form(variant);
  const Tensor& lead = params[0];
  const int64_t rows = lead.size(0), genes = lead.size(1);
  const auto keep = [&](const Tensor& t) -> const Tensor& { return kept.emplace_back(t); };
  kept.reserve(8);

  args.in_double = lead.scalar_type() == at::kDouble;
  args.raw = form.raw;
  args.inflated = form.zero_logits >= 0;
  args.rows = rows;
  args.genes = genes;
  args.mean = operand(keep(dense_rows(lead, order)));
  if (variant.tensors > 1) {
    args.shared_dispersion = params[1].dim() == 1;
    const Tensor& dispersion = keep(args.shared_dispersion ? params[1].contiguous() : dense_rows(params[1], order));
    args.dispersion = {dispersion.const_data_ptr(), dtype_of(dispersion), args.shared_dispersion ? 0 : dispersion.stride(0), genes, 0};
  }
  if (args.inflated) args.zero_logits = operand(keep(dense_rows(params[form.zero_logits], order)));
  if (form.mean2 >= 0) {
    args.mean2 = operand(keep(dense_rows(params[form.mean2], order)));
    args.mixture_logits = operand(keep(dense_rows(params[form.mixture_logits], order)));
  }
  args.eps = constants.empty() ? 0 : constants[0];
  args.weights = weights_view(weight, weighted_sizes(variant, params, target), order, kept);

  if (has_positions(variant, params)) {
    const Tensor &values = keep(target.contiguous()), &starts = keep(params[variant.tensors].contiguous()),
                 &columns = keep(params[variant.tensors + 1].contiguous());
    args.starts = starts.const_data_ptr<int64_t>();
    args.columns = columns.const_data_ptr<int64_t>();
    const int64_t target_rows = starts.size(0) - 1;
    check_positions(args.starts, args.columns, target_rows, genes, values.size(0));
    args.target_values = count_operand(values);
    args.target_rows = repeated_rows(target_rows, rows);
  } else {
    args.target = count_operand(keep(dense_rows(target, order)));
    args.target_rows = repeated_rows(target.size(0), rows);
  }
}

// Where the kernel writes the derivatives by params[i], one for each element.
cpu::Result& derivative_of(cpu::CountMixtureArgs& args, const CountForm& form, int i) {
  if (i == form.mean2) return args.d_mean2;
  if (i == form.mixture_logits) return args.d_mixture_logits;
  return i == 0 ? args.d_mean : i == 1 ? args.d_dispersion : args.d_zero_logits;
}

void run_kernel(const cpu::CountMixtureArgs& args, const CountForm& form, int tensors) {
  const auto& kernels = cpu::kernels();
  if (form.mean2 >= 0) kernels.count_mixture(args);
  else if (tensors > 1) kernels.count_nll(args);
  else kernels.multinomial(args);
}

}  // namespace

void evaluate_counts(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants, int64_t needs, const OptionalTensor& weight,
                     const double* weights, int64_t weight_stride, std::vector<double>& nll, Tensors& gradients) {
  const auto& form = count_form(variant);
  const Tensor& lead = params[0];
  const int64_t rows = lead.size(0), genes = lead.size(1);
  Tensors kept;
  cpu::CountMixtureArgs args{};
  fill_inputs(args, variant, params, target, constants, weight, kept);
  nll.resize(rows);
  std::vector<double> library;
  if (form.library >= 0) library = to_doubles(params[form.library]);
  args.library = library.data();

  std::vector<double> of_genes, of_rows;
  for (int i = 0; i < variant.tensors; ++i) {
    if (!(needs >> i & 1)) continue;
    if (i == 1 && args.shared_dispersion) {
      of_genes.resize(genes);
      args.d_shared_dispersion = of_genes.data();
      gradients.emplace_back();
    } else if (i == form.library) {
      of_rows.resize(rows);
      args.d_library = of_rows.data();
      gradients.emplace_back();
    } else {
      gradients.push_back(pooled_empty(lead.sizes(), lead));
      derivative_of(args, form, i) = result(gradients.back());
    }
  }
  args.weight = weights;
  args.weight_stride = weight_stride;
  args.row_nll = nll.data();
  run_kernel(args, form, variant.tensors);

  auto gradient = gradients.begin();
  for (int i = 0; i < variant.tensors; ++i) {
    if (!(needs >> i & 1)) continue;
    if (i == 1 && args.shared_dispersion) *gradient = from_doubles(of_genes, {genes}, params[i].scalar_type());
    else if (i == form.library) *gradient = from_doubles(of_rows, {rows}, params[i].scalar_type());
    ++gradient;
  }
}

void evaluate_count_elements(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                             double factor, int64_t needs, const OptionalTensor& weight, const Tensor& values, const Tensors& derivatives) {
  Tensors kept;
  cpu::CountMixtureArgs args{};
  fill_inputs(args, variant, params, target, constants, weight, kept);
  const auto& form = count_form(variant);
  auto derivative = derivatives.begin();
  for (int i = 0; i < variant.tensors; ++i)
    if (needs >> i & 1) derivative_of(args, form, i) = result(*derivative++);
  args.values = result(values);
  args.weight = &factor;
  std::vector<double> nll(args.rows);
  args.row_nll = nll.data();
  run_kernel(args, form, variant.tensors);
}

}  // namespace fastvae
