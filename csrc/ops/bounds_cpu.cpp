// The importance-weighted bound on the CPU. The draws of a datum are computed one after another, so that their gradients are still in the
// cache when the weights are known and multiply them. Otherwise, the gradients would make another way through memory in the backward.
#include "bounds.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_kernels.h"
#include "likelihood_table.h"
#include "nll.h"
#include "nll_views.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A view whose first row is this one.
template <class View>
View from_row(const View& view, int64_t row) {
  return cpu::shifted(view, row * view.row_stride);
}

// How many elements stay in a core's cache together with their gradients.
constexpr int64_t kInCache = int64_t(1) << 17;

struct Datum {
  double bound, ess;
};

// Replaces the log-weights of the draws of a datum, `step` apart, by normalised weights. A weight of 0 is possible, but a NaN or infinite
// one leaves the datum without a bound.
Datum normalize(double* weights, int64_t draws, int64_t step) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double most = -infinity, sum = 0, squares = 0;
  for (int64_t i = 0; i < draws * step; i += step) most = std::isnan(weights[i]) || weights[i] > most ? weights[i] : most;
  if (most == -infinity) {
    for (int64_t i = 0; i < draws * step; i += step) weights[i] = 0;
    return {-infinity, NAN};
  }
  for (int64_t i = 0; i < draws * step; i += step) sum += weights[i] = std::exp(weights[i] - most);
  for (int64_t i = 0; i < draws * step; i += step) {
    weights[i] /= sum;
    squares += weights[i] * weights[i];
  }
  const double bound = most == infinity ? infinity : most + std::log(sum) - std::log(static_cast<double>(draws));
  return {bound, 1 / squares};
}

// As for `iwae_bound`, and the gradients of the params that `needs` selects. They are those of the reduced loss, and `scalar_rows` are
// those of each datum with respect to a 0-dim param.
struct BoundResults {
  Tensor loss, bound, nll, kl, ess, weights, scalar_rows;
  Tensors gradients;
};

BoundResults evaluate_bound(std::string_view likelihood, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                            const Tensor& log_q, const Tensor& log_p, double beta, int64_t reduction, int64_t needs,
                            const OptionalTensor& weight) {
  const auto& variant = likelihood_variant(likelihood);
  check_nll(variant, params, target, constants, {}, {}, reduction, weight);
  const int64_t draws = log_q.size(0), data = log_q.size(1), size = event_size(target);
  const auto norm = normaliser(variant, constants, variant.has_scalar ? to_doubles(params.back())[0] : 0);
  const double of_reduction = weight_of(reduction, data);
  const auto of_q = to_doubles(log_q.reshape(-1)), of_p = to_doubles(log_p.reshape(-1));

  cpu::NllArgs args{};
  args.in_double = params[0].scalar_type() == at::kDouble;
  std::copy_n(norm.constants, cpu::kMaxConstants, args.constants);
  args.weight = &of_reduction;
  Tensors kept;
  BoundResults out;
  out.gradients = fill_elements(args, variant, params, target, needs, weight, kept);
  const int64_t rows = draws * data;
  std::vector<double> nll(rows), kl(rows), weights(rows), scale_grad(variant.has_scalar ? rows : 0), row_weights(weight ? rows : 0);
  std::vector<double> bound(data), ess(data), scalar_rows(variant.has_scalar ? data : 0);

  const auto compute = [&](int64_t first, int64_t last) {
    const bool all = last - first == data;  // the draws then follow one another
    const int64_t step = all ? rows : data, count = all ? rows : last - first;
    for (int64_t row = first; row < rows; row += step) {
      cpu::NllArgs own = args;
      own.rows = count;
      for (auto& view : own.params) view = from_row(view, row);
      for (auto& view : own.grads) view = from_row(view, row);
      own.target = from_row(own.target, first);
      own.weights = from_row(own.weights, first);
      own.target_rows = all ? args.target_rows : 0;
      own.row_nll = nll.data() + row;
      own.row_scale_grad = variant.has_scalar ? scale_grad.data() + row : nullptr;
      own.row_weights = weight ? row_weights.data() + row : nullptr;
      cpu::kernels().nll(own);
    }
    for (int64_t b = first; b < last; ++b) {
      for (int64_t row = b; row < rows; row += data) {
        const double n = weight ? row_weights[row] : static_cast<double>(size);
        if (variant.has_scalar) scale_grad[row] = scalar_grad(variant, n, nll[row], scale_grad[row]);
        if (n) nll[row] += norm.per_element * n;
        kl[row] = of_q[row] - of_p[row];
        weights[row] = -(nll[row] + beta * kl[row]);
      }
      const Datum datum = normalize(weights.data() + b, draws, data);
      bound[b] = datum.bound;
      ess[b] = datum.ess;
      for (int64_t row = b; variant.has_scalar && row < rows; row += data)
        if (weights[row] != 0) scalar_rows[b] += of_reduction * weights[row] * scale_grad[row];
    }
    for (const Tensor& g : out.gradients)
      for (int64_t row = first; draws > 1 && row < rows; row += step)
        cpu::kernels().scale_rows({count, event_size(g), from_row(operand(g), row), from_row(result(g), row), weights.data() + row, 1});
  };
  const int64_t threads = at::get_num_threads(), elements = std::max<int64_t>(1, draws * size);
  if (data < threads) {
    compute(0, data);  // the kernels divide the draws among threads
  } else {
    const int64_t chunk = std::clamp<int64_t>(kInCache / elements, 1, (data + threads - 1) / threads), chunks = (data + chunk - 1) / chunk;
    at::parallel_for(0, chunks, std::max<int64_t>(1, kInCache / 4 / (chunk * elements)), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) compute(i * chunk, std::min(data, (i + 1) * chunk));
    });
  }

  const auto dtype = row_dtype(params[0].scalar_type()), of_kl = log_q.scalar_type();
  const auto of_bound = dtype == at::kDouble ? dtype : of_kl;
  double sum = 0;
  std::vector<double> loss(bound);
  for (double& value : loss) sum += value = -value;
  out.loss = reduction == kNone ? from_doubles(loss, {data}, of_bound)
                                : from_doubles({reduction == kMean ? sum / static_cast<double>(data) : sum}, {}, of_bound);
  out.bound = from_doubles(bound, {data}, of_bound);
  out.nll = from_doubles(nll, {draws, data}, dtype);
  out.kl = from_doubles(kl, {draws, data}, of_kl);
  out.ess = from_doubles(ess, {data}, of_bound);
  out.weights = from_doubles(weights, {draws, data}, of_bound);
  if (variant.has_scalar) out.scalar_rows = from_doubles(scalar_rows, {data}, dtype);
  return out;
}

struct IwaeFunction : torch::autograd::Function<IwaeFunction> {
  static variable_list forward(AutogradContext* ctx, const std::string& likelihood, at::TensorList params, const Tensor& target,
                               at::ArrayRef<double> constants, const Tensor& log_q, const Tensor& log_p, double beta, int64_t reduction,
                               const OptionalTensor& weight) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto& variant = likelihood_variant(likelihood);
    int64_t needs = 0;
    for (size_t i = 0; i < params.size(); ++i) needs |= int64_t(params[i].requires_grad()) << i;
    const int64_t scalar_bit = variant.has_scalar ? int64_t(1) << (params.size() - 1) : 0;
    BoundResults out = evaluate_bound(likelihood, params, target, constants, log_q, log_p, beta, reduction, needs & ~scalar_bit, weight);
    ctx->set_materialize_grads(false);
    ctx->saved_data["params"] = static_cast<int64_t>(params.size());
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["needs_scalar"] = (needs & scalar_bit) != 0;
    ctx->saved_data["factor"] = beta * weight_of(reduction, log_q.size(1));
    ctx->saved_data["need_q"] = log_q.requires_grad();
    ctx->saved_data["need_p"] = log_p.requires_grad();
    variable_list saved = {out.weights, out.scalar_rows};
    saved.insert(saved.end(), out.gradients.begin(), out.gradients.end());
    ctx->save_for_backward(std::move(saved));
    const variable_list rest = {out.bound, out.nll, out.kl, out.ess, out.weights};
    ctx->mark_non_differentiable(rest);
    return {out.loss, out.bound, out.nll, out.kl, out.ess, out.weights};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const int64_t params = ctx->saved_data["params"].toInt(), needs = ctx->saved_data["needs"].toInt();
    variable_list results(params + 8);  // likelihood, params..., target, constants, log_q, log_p, beta, reduction, weight
    const Tensor& grad = grads[0];
    if (!grad.defined()) return once_differentiable(std::move(results));
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &weights = saved[0], &scalar_rows = saved[1];
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const bool per_row = grad.dim() > 0;
      Tensors gradients(saved.begin() + 2, saved.end());
      const Tensor factor = per_row ? grad.expand_as(weights).reshape(-1) : grad;
      if (traced(grad)) {
        for (Tensor& g : gradients) {
          std::vector<int64_t> sizes(g.dim(), 1);
          sizes[0] = factor.numel();
          g = g.mul(per_row ? factor.view(sizes) : factor).to(g.scalar_type());
        }
      } else if (!gradients.empty()) {
        static const auto new_tensors = op<NllBackward>("fastvae::nll_backward"), in_place = op<NllBackward>("fastvae::nll_backward_");
        const bool keep = torch::autograd::get_current_graph_task_keep_graph();
        Tensors scaled = (keep ? new_tensors : in_place)
                             .call(factor, {}, gradients, {}, {}, {}, weights.numel(), per_row ? kNone : kSum, false, false);
        if (keep) gradients = std::move(scaled);
      }
      size_t next = 0;
      for (int64_t i = 0; i < params; ++i) {
        if (!(needs >> i & 1)) continue;
        const bool scalar = i == params - 1 && ctx->saved_data["needs_scalar"].toBool();
        results[1 + i] = scalar ? scalar_rows.mul(grad).sum() : gradients[next++];
      }
      const bool need_q = ctx->saved_data["need_q"].toBool(), need_p = ctx->saved_data["need_p"].toBool();
      if (need_q || need_p) {
        const Tensor of_q = weights.mul(grad).mul_(ctx->saved_data["factor"].toDouble());
        if (need_q) results[params + 3] = of_q;
        if (need_p) results[params + 4] = of_q.neg();
      }
    }
    return once_differentiable(std::move(results));
  }
};

}  // namespace

bool serves_iwae_bound(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, const Tensor& log_q,
                       const Tensor& log_p, const Tensor& beta, const OptionalTensor& weight) {
  const auto is_exact = [](const Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble; };
  if (!variant.elementwise() || params.empty() || params[0].dim() == 0 || !gradient_in_forward(params[0].scalar_type())) return false;
  if (variant.has_scalar && (params.back().dim() != 0 || params.back().scalar_type() != params[0].scalar_type())) return false;
  if (log_q.dim() != 2 || log_q.sizes() != log_p.sizes() || !is_exact(log_q) || log_q.scalar_type() != log_p.scalar_type()) return false;
  if (log_q.numel() == 0 || params[0].size(0) != log_q.numel() || target.dim() == 0 || target.size(0) != log_q.size(1)) return false;
  return beta.numel() == 1 && is_exact(beta) && !beta.requires_grad() && !target.requires_grad() && !needs_grad(weight);
}

Tensors iwae_bound(std::string_view likelihood, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                   const Tensor& log_q, const Tensor& log_p, const Tensor& beta, int64_t reduction, const OptionalTensor& weight) {
  bool needed = log_q.requires_grad() || log_p.requires_grad();
  for (const auto& p : params) needed |= p.requires_grad();
  const double factor = to_doubles(beta)[0];
  if (c10::GradMode::is_enabled() && needed)
    return IwaeFunction::apply(std::string(likelihood), params, target, constants, log_q, log_p, factor, reduction, weight);
  const at::AutoDispatchBelowADInplaceOrView guard;
  BoundResults out = evaluate_bound(likelihood, params, target, constants, log_q, log_p, factor, reduction, 0, weight);
  return {out.loss, out.bound, out.nll, out.kl, out.ess, out.weights};
}

}  // namespace fastvae
