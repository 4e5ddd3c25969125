// The CPU kernels of fastvae::nll_forward and nll_backward.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "buffer_pool.h"
#include "categorical.h"
#include "counts.h"
#include "cpu_kernels.h"
#include "likelihood_table.h"
#include "discretized.h"
#include "nll_views.h"

namespace fastvae {
namespace {

struct Evaluation {
  std::vector<double> nll;  // of each row, without the normaliser
  std::vector<double> scale_grad;
  std::vector<double> weights;  // the sum of the weights of each row; empty without weights
  Tensors gradients;
  Normaliser normaliser;
};

// Runs the kernel. The gradient of row r is multiplied by weights[r * weight_stride].
Evaluation evaluate_elements(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                             int64_t needs, const OptionalTensor& weight, const double* weights, int64_t weight_stride) {
  Evaluation out;
  out.normaliser = normaliser(variant, constants, variant.has_scalar ? to_doubles(params.back())[0] : 0);
  out.nll.resize(params[0].size(0));
  out.scale_grad.resize(variant.has_scalar ? params[0].size(0) : 0);
  cpu::NllArgs args{};
  args.in_double = params[0].scalar_type() == at::kDouble;
  std::copy_n(out.normaliser.constants, cpu::kMaxConstants, args.constants);
  args.weight = weights;
  args.weight_stride = weight_stride;
  args.row_nll = out.nll.data();
  args.row_scale_grad = variant.has_scalar ? out.scale_grad.data() : nullptr;
  out.weights.resize(weight ? params[0].size(0) : 0);
  args.row_weights = weight ? out.weights.data() : nullptr;
  Tensors kept;
  out.gradients = fill_elements(args, variant, params, target, needs, weight, kept);
  cpu::kernels().nll(args);
  return out;
}

Evaluation evaluate(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                    int64_t needs, const OptionalTensor& weight, const double* weights, int64_t weight_stride) {
  if (variant.elementwise()) return evaluate_elements(variant, params, target, constants, needs, weight, weights, weight_stride);
  Evaluation out{};
  switch (variant.family) {
    case Family::counts:
      evaluate_counts(variant, params, target, constants, needs, weight, weights, weight_stride, out.nll, out.gradients);
      break;
    case Family::categorical:
      evaluate_categorical(params[0], target, constants, needs & 1, weight, weights, weight_stride, out.nll, out.gradients);
      break;
    case Family::discretized:
      evaluate_discretized(variant, params[0], target, constants, needs & 1, weight, weights, weight_stride, out.nll, out.gradients);
      break;
    case Family::continuous: break;  // all of this family are elementwise
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensors, Tensor> nll_forward_cpu(std::string_view likelihood, at::TensorList params,
                                                            const Tensor& target, at::ArrayRef<double> constants,
                                                            const OptionalTensor& kl, const OptionalTensor& beta,
                                                            int64_t reduction, int64_t needs, const OptionalTensor& weight) {
  const auto& variant = likelihood_variant(likelihood);
  check_nll(variant, params, target, constants, kl, beta, reduction, weight);
  const Tensor& lead = params[0];
  const int64_t rows = lead.size(0), size = event_size(target);
  const double of_reduction = weight_of(reduction, rows);
  auto [nll, scale_grad, weights, gradients, norm] = evaluate(variant, params, target, constants, needs, weight, &of_reduction, 0);
  // How often the normaliser of an element is added to a row.
  const auto count = [&, &weights = weights](int64_t r) { return weights.empty() ? static_cast<double>(size) : weights[r]; };

  const auto dtype = row_dtype(lead.scalar_type());
  Tensor scalar_rows = at::empty({0}, lead.options().dtype(dtype));
  if (variant.has_scalar && (needs >> (params.size() - 1) & 1)) {
    std::vector<double> grad(rows);
    for (int64_t r = 0; r < rows; ++r) grad[r] = scalar_grad(variant, count(r), nll[r], scale_grad[r]);
    scalar_rows = from_doubles(grad, {rows}, dtype);
  }
  const auto loss_dtype = kl && kl->scalar_type() == at::kDouble ? at::kDouble : dtype;
  const double factor = beta ? to_doubles(*beta)[0] : 1.0;
  const auto of_kl = kl ? to_doubles(*kl) : std::vector<double>();
  std::vector<double> loss(reduction == kNone ? rows : 1);
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (const double n = count(r)) nll[r] += norm.per_element * n;
    const double of_row = kl ? nll[r] + factor * of_kl[r] : nll[r];
    if (reduction == kNone) loss[r] = of_row;
    sum += of_row;
  }
  if (reduction != kNone) loss[0] = reduction == kMean ? sum / static_cast<double>(rows) : sum;
  const int64_t sizes[] = {rows};
  return {from_doubles(loss, at::IntArrayRef(sizes, reduction == kNone ? 1 : 0), loss_dtype), from_doubles(nll, {rows}, dtype),
          std::move(gradients), std::move(scalar_rows)};
}

// The derivatives of the objective with respect to each row's loss and each row's nll.
struct RowGradients {
  std::vector<double> by_loss, by_nll;
  bool uniform;  // one value for all rows, stored first
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
    const auto grads = to_doubles(*scalar_rows);
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += at_row(g.by_nll, r) * grads[r];
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
                         const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, int64_t reduction, int64_t needs,
                         const OptionalTensor& weight) {
  const auto& variant = likelihood_variant(likelihood);
  check_nll(variant, params, target, constants, {}, {}, reduction, weight);
  const auto g = row_gradients(grad_loss, grad_nll, params[0].size(0), reduction);
  return evaluate(variant, params, target, constants, needs, weight, g.by_nll.data(), !g.uniform).gradients;
}

// out[i] = gradients[i] times the factors that the forward has not included.
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
    // A single factor applies to a gradient of any shape; several apply to one row each.
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
