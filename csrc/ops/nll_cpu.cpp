// The CPU kernels of fastvae::nll_forward and nll_backward.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "buffer_pool.h"
#include "counts.h"
#include "cpu_kernels.h"
#include "likelihood_table.h"
#include "nll.h"

namespace fastvae {
namespace {

double weight_of(int64_t reduction, int64_t rows) { return reduction == kMean ? 1.0 / static_cast<double>(rows) : 1.0; }

// Half of a packed head: dimension 1 of (B, 2C, ...) holds C channels of one param, then C of the next. In channels_last order
// the two alternate at every pixel.
template <class View>
View half_of_head(View whole, int64_t which, int64_t channels, bool channels_last) {
  const int64_t size = whole.run / 2;
  whole = cpu::shifted(whole, which * (channels_last ? channels : size));
  whole.run = channels_last ? channels : size;
  whole.run_stride = channels_last ? 2 * channels : 0;
  return whole;
}

void check_terms(at::TensorList params, const OptionalTensor& kl, const OptionalTensor& beta) {
  const int64_t rows = params[0].size(0);
  TORCH_CHECK_VALUE(!kl || (kl->dim() == 1 && kl->size(0) == rows), "fastvae::nll: `kl` must have the shape (", rows, ",)");
  TORCH_CHECK_VALUE(!beta || beta->numel() == 1, "fastvae::nll: `beta` must be a single number");
}

void check(const LikelihoodRow& row, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
           const OptionalTensor& kl, const OptionalTensor& beta, int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= kNone && reduction <= kMean, "fastvae::nll: `reduction` must be 0, 1 or 2, got ", reduction);
  if (row.family == Family::counts) {
    check_counts(row, params, target);
    return check_terms(params, kl, beta);
  }
  TORCH_CHECK_VALUE(int64_t(params.size()) == row.tensors, "fastvae::nll: ", std::string(row.name), " takes ", row.tensors,
                    " params, got ", params.size());
  TORCH_CHECK_VALUE(int64_t(constants.size()) == row.constants, "fastvae::nll: ", std::string(row.name), " takes ", row.constants,
                    " constants, got ", constants.size());
  const Tensor& lead = params[0];
  TORCH_CHECK_VALUE(lead.dim() >= 1, "fastvae::nll: `params` need a batch dimension");
  auto expected = lead.sizes().vec();
  if (row.packed) {
    TORCH_CHECK_VALUE(lead.dim() >= 2 && expected[1] % 2 == 0, "fastvae::nll: a packed head needs an even dimension 1, got ",
                      lead.sizes());
    expected[1] /= 2;
  }
  TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef(expected), "fastvae::nll: `target` must have the shape ",
                    at::IntArrayRef(expected), ", got ", target.sizes());
  TORCH_CHECK_TYPE(c10::isFloatingType(lead.scalar_type()), "fastvae::nll: `params` must be floating point, got ",
                   lead.scalar_type());
  const auto type = target.scalar_type();
  TORCH_CHECK_TYPE(takes_target(row, lead.scalar_type(), type), "fastvae::nll: a `target` of ", type,
                   " does not go with params of ", lead.scalar_type());
  for (size_t i = 1; i < params.size(); ++i) {
    const bool scalar = row.has_scalar && i + 1 == params.size();
    TORCH_CHECK_VALUE(scalar ? params[i].numel() == 1 : params[i].sizes() == lead.sizes(), "fastvae::nll: params[", i,
                      "] has the shape ", params[i].sizes());
    TORCH_CHECK_TYPE(scalar || params[i].scalar_type() == lead.scalar_type(), "fastvae::nll: params[", i, "] must be ",
                     lead.scalar_type(), ", got ", params[i].scalar_type());
  }
  check_terms(params, kl, beta);
}

struct Evaluation {
  std::vector<double> nll;  // of each row, less the normaliser
  std::vector<double> pull;
  Tensors gradients;
  Normaliser normaliser;
};

// Runs the kernel; the gradient of row r is multiplied by weights[r * weight_stride].
Evaluation evaluate(const LikelihoodRow& row, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                    int64_t needs, const double* weights, int64_t weight_stride) {
  if (row.family == Family::counts) {
    auto counts = evaluate_counts(row, params, target, needs, weights, weight_stride);
    Evaluation out{};
    out.nll = std::move(counts.nll);
    out.gradients = std::move(counts.gradients);
    return out;
  }
  const Tensor& lead = params[0];
  const auto order = memory_order(lead);
  const size_t elementwise = params.size() - row.has_scalar;

  Evaluation out;
  out.normaliser = normaliser(row, constants, row.has_scalar ? to_doubles(params.back())[0] : 0);
  out.nll.resize(lead.size(0));
  out.pull.resize(row.has_scalar ? lead.size(0) : 0);
  cpu::NllArgs args{};
  args.element = row.element;
  args.in_double = lead.scalar_type() == at::kDouble;
  args.rows = lead.size(0);
  args.size = event_size(target);
  std::copy_n(out.normaliser.constants, cpu::kMaxConstants, args.constants);
  args.weight = weights;
  args.weight_stride = weight_stride;
  args.row_nll = out.nll.data();
  args.row_pull = row.has_scalar ? out.pull.data() : nullptr;

  Tensors dense;
  for (size_t i = 0; i < elementwise; ++i) {
    dense.push_back(dense_rows(params[i], order));
    args.params[i] = operand(dense.back());
    if (!(needs >> i & 1)) continue;
    out.gradients.push_back(pooled_empty(lead.sizes(), lead, order));
    args.slopes[i] = result(out.gradients.back());
  }
  if (row.packed) {
    const bool channels_last = order != at::MemoryFormat::Contiguous;
    for (int which = 1; which >= 0; --which) {
      args.params[which] = half_of_head(args.params[0], which, target.size(1), channels_last);
      if (needs) args.slopes[which] = half_of_head(args.slopes[0], which, target.size(1), channels_last);
    }
  }
  const Tensor dense_target = dense_rows(target, order);
  args.target = row.counts ? count_operand(dense_target) : operand(dense_target);
  cpu::kernels().nll(args);
  return out;
}

std::tuple<Tensor, Tensor, Tensors, Tensor> nll_forward_cpu(std::string_view likelihood, at::TensorList params,
                                                            const Tensor& target, at::ArrayRef<double> constants,
                                                            const OptionalTensor& kl, const OptionalTensor& beta,
                                                            int64_t reduction, int64_t needs) {
  const auto& row = likelihood_row(likelihood);
  check(row, params, target, constants, kl, beta, reduction);
  const Tensor& lead = params[0];
  const int64_t rows = lead.size(0), size = event_size(target);
  const double weight = weight_of(reduction, rows);
  auto [nll, pull, gradients, norm] = evaluate(row, params, target, constants, needs, &weight, 0);

  const auto dtype = row_dtype(lead.scalar_type());
  Tensor scalar_rows = at::empty({0}, lead.options().dtype(dtype));
  if (row.has_scalar && (needs >> (params.size() - 1) & 1)) {
    std::vector<double> slope(rows);
    for (int64_t r = 0; r < rows; ++r) slope[r] = scalar_slope(row, size, nll[r], pull[r]);
    scalar_rows = from_doubles(slope, {rows}, dtype);
  }
  for (double& value : nll) value += norm.per_element * static_cast<double>(size);

  const auto loss_dtype = kl && kl->scalar_type() == at::kDouble ? at::kDouble : dtype;
  std::vector<double> loss = nll;
  if (kl) {
    const double factor = beta ? to_doubles(*beta)[0] : 1.0;
    const auto values = to_doubles(*kl);
    for (int64_t r = 0; r < rows; ++r) loss[r] += factor * values[r];
  }
  if (reduction != kNone) {
    double sum = 0;
    for (const double value : loss) sum += value;
    loss.assign(1, reduction == kMean ? sum / static_cast<double>(rows) : sum);
  }
  const int64_t sizes[] = {rows};
  return {from_doubles(loss, at::IntArrayRef(sizes, reduction == kNone ? 1 : 0), loss_dtype), from_doubles(nll, {rows}, dtype),
          std::move(gradients), std::move(scalar_rows)};
}

// The derivative of the objective by each row's loss, and by each row's nll.
struct RowGradients {
  std::vector<double> by_loss, by_nll;
  bool uniform;  // one value for all rows, in front
};

RowGradients row_gradients(const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, int64_t rows, int64_t reduction) {
  RowGradients g;
  g.uniform = reduction != kNone && !grad_nll;
  if (!grad_loss) g.by_loss.assign(rows, 0.0);
  else if (reduction == kNone) g.by_loss = to_doubles(*grad_loss);
  else g.by_loss.assign(g.uniform ? 1 : rows, to_doubles(*grad_loss)[0] * weight_of(reduction, rows));
  g.by_nll = g.by_loss;
  if (grad_nll) {
    const auto own = to_doubles(*grad_nll);
    for (int64_t r = 0; r < rows; ++r) g.by_nll[r] += own[r];
  }
  return g;
}

Tensors extras(const RowGradients& g, const OptionalTensor& scalar_rows, const OptionalTensor& kl, const OptionalTensor& beta,
               int64_t rows, bool need_kl, bool need_beta) {
  const auto at_row = [&](const std::vector<double>& values, int64_t r) { return values[g.uniform ? 0 : r]; };
  Tensors results;
  if (scalar_rows) {
    const auto slopes = to_doubles(*scalar_rows);
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += at_row(g.by_nll, r) * slopes[r];
    results.push_back(from_doubles({sum}, {}, scalar_rows->scalar_type()));
  }
  if (need_kl) {
    const double factor = beta ? to_doubles(*beta)[0] : 1.0;
    std::vector<double> values(rows);
    for (int64_t r = 0; r < rows; ++r) values[r] = factor * at_row(g.by_loss, r);
    results.push_back(from_doubles(values, {rows}, kl->scalar_type()));
  }
  if (need_beta) {
    const auto values = to_doubles(*kl);
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += at_row(g.by_loss, r) * values[r];
    results.push_back(from_doubles({sum}, {}, beta->scalar_type()));
  }
  return results;
}

Tensors nll_gradient_cpu(std::string_view likelihood, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                         const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, int64_t reduction, int64_t needs) {
  const auto& row = likelihood_row(likelihood);
  check(row, params, target, constants, {}, {}, reduction);
  const auto g = row_gradients(grad_loss, grad_nll, params[0].size(0), reduction);
  return evaluate(row, params, target, constants, needs, g.by_nll.data(), !g.uniform).gradients;
}

// out[i] = gradients[i] times what the forward has not already multiplied in.
void scale(const RowGradients& g, at::TensorList gradients, at::TensorList out, int64_t rows, int64_t reduction) {
  std::vector<double> factor = g.by_nll;
  bool one = true;
  for (double& f : factor) {
    f /= weight_of(reduction, rows);
    one &= f == 1.0;
  }
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (one) {
      if (!gradients[i].is_same(out[i])) out[i].copy_(gradients[i]);
      continue;
    }
    // One factor holds for a gradient of any shape, several for one of a row each.
    const int64_t count = g.uniform ? gradients[i].size(0) : rows;
    cpu::kernels().scale_rows({count, event_size(gradients[i]), operand(gradients[i]), result(out[i]), factor.data(), !g.uniform});
  }
}

Tensors nll_backward_cpu(const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, at::TensorList gradients,
                         const OptionalTensor& scalar_rows, const OptionalTensor& kl, const OptionalTensor& beta,
                         c10::SymInt sym_rows, int64_t reduction, bool need_kl, bool need_beta) {
  const int64_t rows = sym_rows.expect_int();
  const auto g = row_gradients(grad_loss, grad_nll, rows, reduction);
  Tensors results;
  for (const auto& gradient : gradients) results.push_back(pooled_empty(gradient.sizes(), gradient, memory_order(gradient)));
  scale(g, gradients, results, rows, reduction);
  for (auto& extra : extras(g, scalar_rows, kl, beta, rows, need_kl, need_beta)) results.push_back(std::move(extra));
  return results;
}

Tensors nll_backward_in_place_cpu(const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, at::TensorList gradients,
                                  const OptionalTensor& scalar_rows, const OptionalTensor& kl, const OptionalTensor& beta,
                                  c10::SymInt sym_rows, int64_t reduction, bool need_kl, bool need_beta) {
  const int64_t rows = sym_rows.expect_int();
  const auto g = row_gradients(grad_loss, grad_nll, rows, reduction);
  scale(g, gradients, gradients, rows, reduction);
  return extras(g, scalar_rows, kl, beta, rows, need_kl, need_beta);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("nll_forward", nll_forward_cpu);
  m.impl("nll_gradient", nll_gradient_cpu);
  m.impl("nll_backward", nll_backward_cpu);
  m.impl("nll_backward_", nll_backward_in_place_cpu);
}

}  // namespace fastvae
