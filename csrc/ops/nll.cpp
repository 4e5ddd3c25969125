// fastvae::nll: autograd and fake kernels of the reconstruction loss, the same on every device.
#include "nll.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "likelihood_table.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor, Tensors, Tensor> forward_op(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                                       at::ArrayRef<double> constants, const OptionalTensor& kl,
                                                       const OptionalTensor& beta, int64_t reduction, int64_t needs) {
  static const auto handle = op<NllForward>("fastvae::nll_forward");
  return handle.call(likelihood, params, target, constants, kl, beta, reduction, needs);
}

struct Nll : torch::autograd::Function<Nll> {
  static variable_list forward(AutogradContext* ctx, const std::string& likelihood, at::TensorList params, const Tensor& target,
                               at::ArrayRef<double> constants, const OptionalTensor& kl, const OptionalTensor& beta,
                               int64_t reduction) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    int64_t needs = 0;
    for (size_t i = 0; i < params.size(); ++i) needs |= int64_t(params[i].requires_grad()) << i;
    // The target enters every differentiable likelihood as (target - mean): its gradient is the mean's, negated.
    const int64_t computed = needs | int64_t(target.requires_grad());
    auto [loss, nll, gradients, scalar_rows] =
        forward_op(likelihood, params, target, constants, kl, beta, reduction, computed);

    const bool need_kl = needs_grad(kl), need_beta = needs_grad(beta);
    ctx->set_materialize_grads(false);
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["computed"] = computed;
    ctx->saved_data["params"] = static_cast<int64_t>(params.size());
    ctx->saved_data["packed"] = likelihood_row(likelihood).packed;
    ctx->saved_data["scalar"] = likelihood_row(likelihood).has_scalar;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["rows"] = target.sym_size(0);
    ctx->saved_data["need_kl"] = need_kl;
    ctx->saved_data["need_beta"] = need_beta;
    if (target.requires_grad()) ctx->saved_data["target_dtype"] = target.scalar_type();
    variable_list saved = {scalar_rows, need_kl || need_beta ? *kl : Tensor(), need_kl || need_beta ? beta.value_or(Tensor()) : Tensor()};
    saved.insert(saved.end(), gradients.begin(), gradients.end());
    ctx->save_for_backward(std::move(saved));
    return {loss, nll};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t needs = ctx->saved_data["needs"].toInt(), computed = ctx->saved_data["computed"].toInt();
    const size_t params = ctx->saved_data["params"].toInt();
    const bool need_kl = ctx->saved_data["need_kl"].toBool(), need_beta = ctx->saved_data["need_beta"].toBool();
    const bool need_scalar = ctx->saved_data["scalar"].toBool() && (needs >> (params - 1) & 1);
    const bool need_target = ctx->saved_data.count("target_dtype");
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); };

    static const auto new_tensors = op<NllBackward>("fastvae::nll_backward");
    static const auto in_place = op<NllBackward>("fastvae::nll_backward_");
    variable_list results(params + 6);  // likelihood, params..., target, constants, kl, beta, reduction
    if (grads[0].defined() || grads[1].defined()) {
      variable_list gradients(saved.begin() + 3, saved.end());
      const auto run = [&](const auto& handle) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        return handle.call(optional(grads[0]), optional(grads[1]), gradients,
                                          need_scalar ? optional(saved[0]) : OptionalTensor(), optional(saved[1]),
                                          optional(saved[2]), ctx->saved_data["rows"].toSymInt(),
                                          ctx->saved_data["reduction"].toInt(), need_kl, need_beta);
      };
      variable_list extras;
      const Tensor& any = grads[0].defined() ? grads[0] : grads[1];
      // Once the graph is freed nobody else can read the saved gradient: it becomes the result. Whoever keeps the graph, or
      // traces it, gets a new tensor.
      if (traced(any) || torch::autograd::get_current_graph_task_keep_graph()) {
        Tensors all = run(new_tensors);
        extras.assign(all.begin() + gradients.size(), all.end());
        all.resize(gradients.size());
        gradients = std::move(all);
      } else {
        extras = run(in_place);
      }

      size_t next = 0, extra = 0;
      for (size_t i = 0; i < params; ++i) {
        if (!(computed >> i & 1)) continue;
        if (need_scalar && i + 1 == params) continue;
        if (i == 0 && need_target) {
          Tensor mean = gradients[next];
          if (ctx->saved_data["packed"].toBool()) mean = mean.narrow(1, 0, mean.sym_size(1).guard_int(__FILE__, __LINE__) / 2);
          results[params + 1] = mean.neg().to(ctx->saved_data["target_dtype"].toScalarType());
        }
        if (needs >> i & 1) results[1 + i] = gradients[next];
        ++next;
      }
      if (need_scalar) results[params] = extras[extra++];
      if (need_kl) results[params + 3] = extras[extra++];
      if (need_beta) results[params + 4] = extras[extra++];
    }
    return once_differentiable(std::move(results));
  }
};

bool any_needs_grad(at::TensorList params, const Tensor& target, const OptionalTensor& kl, const OptionalTensor& beta) {
  bool needed = target.requires_grad() || needs_grad(kl) || needs_grad(beta);
  for (const auto& p : params) needed |= p.requires_grad();
  return needed;
}

std::tuple<Tensor, Tensor> nll_without_graph(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                             at::ArrayRef<double> constants, const OptionalTensor& kl, const OptionalTensor& beta,
                                             int64_t reduction) {
  auto [loss, nll, gradients, scalar_rows] = forward_op(likelihood, params, target, constants, kl, beta, reduction, 0);
  return {loss, nll};
}

std::tuple<Tensor, Tensor> nll_autograd(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                        at::ArrayRef<double> constants, const OptionalTensor& kl, const OptionalTensor& beta,
                                        int64_t reduction) {
  for (const auto& p : params) refuse_tangent(p);
  refuse_tangent(target);
  refuse_tangent(kl);
  refuse_tangent(beta);
  if (!c10::GradMode::is_enabled() || !any_needs_grad(params, target, kl, beta)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return nll_without_graph(likelihood, params, target, constants, kl, beta, reduction);
  }
  TORCH_CHECK_VALUE(!target.requires_grad() || likelihood_row(likelihood).element != cpu::Element::bernoulli,
                    "fastvae::nll: `target` of a Bernoulli has no gradient here; pass target.detach()");
  const auto out = Nll::apply(std::string(likelihood), params, target, constants, kl, beta, reduction);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor, Tensors, Tensor> nll_forward_meta(std::string_view likelihood, at::TensorList params,
                                                             const Tensor& target, at::ArrayRef<double>, const OptionalTensor& kl,
                                                             const OptionalTensor&, int64_t reduction, int64_t needs) {
  const auto& row = likelihood_row(likelihood);
  const Tensor& lead = params[0];
  const c10::SymInt rows = lead.sym_size(0);
  const auto nll_dtype = row_dtype(lead.scalar_type());
  const auto loss_dtype = kl && kl->scalar_type() == at::kDouble ? at::kDouble : nll_dtype;
  const auto make = [&](at::ScalarType dtype, c10::SymIntArrayRef sizes) {
    return at::empty_symint(sizes, lead.options().dtype(dtype));
  };
  Tensors gradients;
  const size_t elementwise = params.size() - row.has_scalar;
  for (size_t i = 0; i < elementwise; ++i)
    if (needs >> i & 1) gradients.push_back(at::empty_like(lead, lead.options(), memory_order(lead)));
  const bool scalar = row.has_scalar && (needs >> elementwise & 1);
  return {reduction == kNone ? make(loss_dtype, {rows}) : make(loss_dtype, {}), make(nll_dtype, {rows}), gradients,
          scalar ? make(nll_dtype, {rows}) : make(nll_dtype, {0})};
}

Tensors nll_backward_extras_meta(const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, at::TensorList,
                                 const OptionalTensor& scalar_rows, const OptionalTensor& kl, const OptionalTensor& beta,
                                 c10::SymInt, int64_t, bool need_kl, bool need_beta) {
  Tensors extras;
  if (scalar_rows) extras.push_back(at::empty_symint({}, scalar_rows->options()));
  if (need_kl) extras.push_back(at::empty_symint(kl->sym_sizes(), kl->options()));
  if (need_beta) extras.push_back(at::empty_symint({}, beta->options()));
  return extras;
}

Tensors nll_backward_meta(const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, at::TensorList gradients,
                          const OptionalTensor& scalar_rows, const OptionalTensor& kl, const OptionalTensor& beta,
                          c10::SymInt rows, int64_t reduction, bool need_kl, bool need_beta) {
  Tensors all;
  for (const auto& g : gradients) all.push_back(at::empty_like(g));
  for (auto& e : nll_backward_extras_meta(grad_loss, grad_nll, gradients, scalar_rows, kl, beta, rows, reduction, need_kl, need_beta))
    all.push_back(std::move(e));
  return all;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CompositeExplicitAutograd, m) { m.impl("nll", nll_without_graph); }
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("nll", nll_autograd); }
TORCH_LIBRARY_IMPL(fastvae, Meta, m) {
  m.impl("nll_forward", nll_forward_meta);
  m.impl("nll_backward", nll_backward_meta);
  m.impl("nll_backward_", nll_backward_extras_meta);
}

}  // namespace fastvae
