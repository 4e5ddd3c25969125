// fastvae::nll: autograd and fake kernels of the reconstruction loss, the same on every device.
#include "nll.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "categorical.h"
#include "counts.h"
#include "likelihood_table.h"
#include "discretized.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor, Tensors, Tensor> forward_op(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                                       at::ArrayRef<double> constants, const OptionalTensor& kl,
                                                       const OptionalTensor& beta, int64_t reduction, int64_t needs,
                                                       const OptionalTensor& weight) {
  static const auto handle = op<NllForward>("fastvae::nll_forward");
  return handle.call(likelihood, params, target, constants, kl, beta, reduction, needs, weight);
}

// Multiplies the saved gradients by the factors of the backward, with torch's own ops. A compiler fuses them with the code that reads
// the gradients next, whereas our kernel would write the gradients once more.
Tensors scaled_in_torch(at::TensorList gradients, const Tensor& grad_loss, const Tensor& grad_nll, const c10::SymInt& rows,
                        int64_t reduction) {
  const bool of_each_row = reduction == kNone || grad_nll.defined();
  Tensor factor = grad_loss;
  if (grad_nll.defined()) {
    // The forward has multiplied by the weight of the reduction, which does not apply to nll itself.
    Tensor own = reduction == kMean ? grad_nll.mul(c10::Scalar(rows)) : grad_nll;
    factor = grad_loss.defined() ? grad_loss.add(own) : own;
  }
  Tensors results;
  for (const auto& gradient : gradients) {
    Tensor there = factor;
    if (of_each_row) {
      std::vector<c10::SymInt> sizes(gradient.dim(), 1);
      sizes[0] = rows;
      there = factor.view_symint(sizes);
    }
    results.push_back(gradient.mul(there).to(gradient.scalar_type()));
  }
  return results;
}

struct NllFunction : torch::autograd::Function<NllFunction> {
  static variable_list forward(AutogradContext* ctx, const std::string& likelihood, at::TensorList params, const Tensor& target,
                               at::ArrayRef<double> constants, const OptionalTensor& kl, const OptionalTensor& beta,
                               int64_t reduction, const OptionalTensor& weight) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto& variant = likelihood_variant(likelihood);
    int64_t needs = 0;
    for (size_t i = 0; i < params.size(); ++i) needs |= int64_t(params[i].requires_grad()) << i;
    const int64_t scalar_bit = variant.has_scalar ? int64_t(1) << (params.size() - 1) : 0;
    const int64_t computed = needs | int64_t(target.requires_grad());  // the target's gradient is computed from the mean's
    // The gradient of a param that all rows share is saved for a single factor; for factors per row, it is computed again.
    const int64_t shared = needs & shared_bit(variant, params);
    const bool at_once = gradient_in_forward(params[0].scalar_type()) && !(shared && reduction == kNone);
    const bool keep_inputs = !at_once || shared;
    auto [loss, nll, gradients, scalar_rows] =
        forward_op(likelihood, params, target, constants, kl, beta, reduction, at_once ? computed : computed & scalar_bit, weight);

    const bool need_kl = needs_grad(kl), need_beta = needs_grad(beta);
    ctx->set_materialize_grads(false);
    ctx->saved_data["likelihood"] = likelihood;
    ctx->saved_data["constants"] = constants.vec();
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["elementwise"] = computed & ~scalar_bit;
    ctx->saved_data["params"] = static_cast<int64_t>(params.size());
    ctx->saved_data["at_once"] = at_once;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["keep_inputs"] = keep_inputs;
    ctx->saved_data["rows"] = params[0].sym_size(0);
    ctx->saved_data["need_kl"] = need_kl;
    ctx->saved_data["need_beta"] = need_beta;
    if (target.requires_grad()) {
      ctx->saved_data["target_dtype"] = target.scalar_type();
      ctx->saved_data["target_rows"] = target.sym_size(0);
    }
    const bool with_kl = need_kl || need_beta;
    variable_list saved = {scalar_rows, with_kl ? *kl : Tensor(), with_kl ? beta.value_or(Tensor()) : Tensor()};
    if (at_once) saved.insert(saved.end(), gradients.begin(), gradients.end());
    if (keep_inputs) {
      saved.insert(saved.end(), params.begin(), params.end());
      saved.push_back(target);
      saved.push_back(weight.value_or(Tensor()));
    }
    ctx->save_for_backward(std::move(saved));
    return {loss, nll};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list results(ctx->saved_data["params"].toInt() + 7);  // likelihood, params..., target, constants, kl, beta, reduction, weight
    if (!grads[0].defined() && !grads[1].defined()) return once_differentiable(std::move(results));

    const variable_list saved = ctx->get_saved_variables();
    const auto& variant = likelihood_variant(ctx->saved_data["likelihood"].toStringRef());
    const int64_t needs = ctx->saved_data["needs"].toInt(), elementwise = ctx->saved_data["elementwise"].toInt();
    const int64_t reduction = ctx->saved_data["reduction"].toInt(), params = ctx->saved_data["params"].toInt();
    const bool need_kl = ctx->saved_data["need_kl"].toBool(), need_beta = ctx->saved_data["need_beta"].toBool();
    const bool need_scalar = variant.has_scalar && (needs >> (params - 1) & 1);
    const auto inputs = saved.end() - (ctx->saved_data["keep_inputs"].toBool() ? params + 2 : 0);  // the params, the target and the weight
    const Tensors ready(saved.begin() + 3, inputs);
    const bool at_once = ctx->saved_data["at_once"].toBool() && !(inputs != saved.end() && grads[1].defined());

    static const auto gradient = op<NllGradient>("fastvae::nll_gradient");
    static const auto new_tensors = op<NllBackward>("fastvae::nll_backward");
    static const auto in_place = op<NllBackward>("fastvae::nll_backward_");
    const auto scaled = [&](const auto& handle, at::TensorList gradients) {
      return handle.call(optional(grads[0]), optional(grads[1]), gradients, need_scalar ? optional(saved[0]) : OptionalTensor(),
                         optional(saved[1]), optional(saved[2]), ctx->saved_data["rows"].toSymInt(), reduction, need_kl, need_beta);
    };
    Tensors gradients, extras;
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const Tensor& any = grads[0].defined() ? grads[0] : grads[1];
      if (!at_once) {
        if (elementwise)
          gradients = gradient.call(variant.name, Tensors(inputs, inputs + params), inputs[params],
                                    ctx->saved_data["constants"].toDoubleVector(), optional(grads[0]), optional(grads[1]), reduction,
                                    elementwise, optional(saved.back()));
        extras = scaled(new_tensors, {});
      } else if (traced(any)) {
        gradients = scaled_in_torch(ready, grads[0], grads[1], ctx->saved_data["rows"].toSymInt(), reduction);
        if (need_scalar || need_kl || need_beta) extras = scaled(new_tensors, {});
      } else if (torch::autograd::get_current_graph_task_keep_graph()) {
        gradients = scaled(new_tensors, ready);
        extras.assign(gradients.begin() + ready.size(), gradients.end());
        gradients.resize(ready.size());
      } else {
        // If the graph is freed, nobody else can read the saved gradient, so it becomes the result.
        gradients = ready;
        extras = scaled(in_place, gradients);
      }
    }

    size_t next = 0, extra = 0;
    for (int64_t i = 0; i < params; ++i) {
      if (!(elementwise >> i & 1)) continue;
      if (i == 0 && ctx->saved_data.count("target_dtype")) {
        Tensor mean = gradients[next];
        if (variant.packed) mean = mean.narrow_symint(1, 0, mean.sym_size(1) / 2);
        const c10::SymInt rows = mean.sym_size(0), target_rows = ctx->saved_data["target_rows"].toSymInt();
        if (rows != target_rows) mean = mean.unflatten_symint(0, {rows / target_rows, target_rows}).sum(0);
        results[params + 1] = mean.neg().to(ctx->saved_data["target_dtype"].toScalarType());
      }
      if (needs >> i & 1) results[1 + i] = gradients[next];
      ++next;
    }
    if (need_scalar) results[params] = extras[extra++];
    if (need_kl) results[params + 3] = extras[extra++];
    if (need_beta) results[params + 4] = extras[extra++];
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
                                             int64_t reduction, const OptionalTensor& weight) {
  auto [loss, nll, gradients, scalar_rows] = forward_op(likelihood, params, target, constants, kl, beta, reduction, 0, weight);
  return {loss, nll};
}

std::tuple<Tensor, Tensor> nll_autograd(std::string_view likelihood, at::TensorList params, const Tensor& target,
                                        at::ArrayRef<double> constants, const OptionalTensor& kl, const OptionalTensor& beta,
                                        int64_t reduction, const OptionalTensor& weight) {
  for (const auto& p : params) refuse_tangent(p);
  refuse_tangent(target);
  refuse_tangent(kl);
  refuse_tangent(beta);
  refuse_tangent(weight);
  TORCH_CHECK_VALUE(!needs_grad(weight) || !c10::GradMode::is_enabled(),
                    "fastvae::nll: the `weight` has no gradient here; pass weight.detach()");
  if (!c10::GradMode::is_enabled() || !any_needs_grad(params, target, kl, beta)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return nll_without_graph(likelihood, params, target, constants, kl, beta, reduction, weight);
  }
  TORCH_CHECK_VALUE(!target.requires_grad() || likelihood_variant(likelihood).is_location, "fastvae::nll: the `target` of ",
                    std::string(likelihood), " has no gradient here; pass target.detach()");
  const auto out = NllFunction::apply(std::string(likelihood), params, target, constants, kl, beta, reduction, weight);
  return {out[0], out[1]};
}

Tensor empty_gradient(const LikelihoodVariant& variant, at::TensorList params, size_t i) {
  if (variant.family == Family::counts && !variant.elementwise()) return at::empty_symint(params[i].sym_sizes(), params[i].options());
  const auto order = variant.family == Family::categorical ? at::MemoryFormat::Contiguous : memory_order(params[0]);
  return at::empty_like(params[0], params[0].options(), order);
}

std::tuple<Tensor, Tensor, Tensors, Tensor> nll_forward_meta(std::string_view likelihood, at::TensorList params,
                                                             const Tensor& target, at::ArrayRef<double>, const OptionalTensor& kl,
                                                             const OptionalTensor&, int64_t reduction, int64_t needs,
                                                             const OptionalTensor&) {
  const auto& variant = likelihood_variant(likelihood);
  const Tensor& lead = params[0];
  const c10::SymInt rows = lead.sym_size(0);
  const auto nll_dtype = row_dtype(lead.scalar_type());
  const auto loss_dtype = kl && kl->scalar_type() == at::kDouble ? at::kDouble : nll_dtype;
  const auto make = [&](at::ScalarType dtype, c10::SymIntArrayRef sizes) {
    return at::empty_symint(sizes, lead.options().dtype(dtype));
  };
  Tensors gradients;
  const size_t elementwise = params.size() - variant.has_scalar;
  for (size_t i = 0; i < elementwise; ++i)
    if (needs >> i & 1) gradients.push_back(empty_gradient(variant, params, i));
  const bool scalar = variant.has_scalar && (needs >> elementwise & 1);
  return {reduction == kNone ? make(loss_dtype, {rows}) : make(loss_dtype, {}), make(nll_dtype, {rows}), gradients,
          scalar ? make(nll_dtype, {rows}) : make(nll_dtype, {0})};
}

Tensors nll_gradient_meta(std::string_view likelihood, at::TensorList params, const Tensor&, at::ArrayRef<double>, const OptionalTensor&,
                          const OptionalTensor&, int64_t, int64_t needs, const OptionalTensor&) {
  Tensors gradients;
  for (int64_t i = 0; i < int64_t(params.size()); ++i)
    if (needs >> i & 1) gradients.push_back(empty_gradient(likelihood_variant(likelihood), params, i));
  return gradients;
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

void check_elements(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants) {
  TORCH_CHECK_VALUE(int64_t(params.size()) == variant.tensors, "fastvae::nll: ", std::string(variant.name), " takes ", variant.tensors,
                    " params, got ", params.size());
  TORCH_CHECK_VALUE(int64_t(constants.size()) == variant.constants, "fastvae::nll: ", std::string(variant.name), " takes ", variant.constants,
                    " constants, got ", constants.size());
  const Tensor& lead = params[0];
  TORCH_CHECK_VALUE(lead.dim() >= 1, "fastvae::nll: `params` need a batch dimension");
  auto expected = lead.sizes().vec();
  if (variant.packed) {
    TORCH_CHECK_VALUE(lead.dim() >= 2 && expected[1] % 2 == 0, "fastvae::nll: a packed head needs an even dimension 1, got ",
                      lead.sizes());
    expected[1] /= 2;
  }
  if (target.dim() > 0 && serves_rows(target.size(0), expected[0])) expected[0] = target.size(0);
  TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef(expected), "fastvae::nll: `target` must have the shape ",
                    at::IntArrayRef(expected), ", got ", target.sizes());
  TORCH_CHECK_TYPE(c10::isFloatingType(lead.scalar_type()), "fastvae::nll: `params` must be floating point, got ",
                   lead.scalar_type());
  const auto type = target.scalar_type();
  TORCH_CHECK_TYPE(takes_target(variant, lead.scalar_type(), type),
                   "fastvae::nll: a `target` of ", type, " does not go with params of ", lead.scalar_type());
  for (size_t i = 1; i < params.size(); ++i) {
    const bool scalar = variant.has_scalar && i + 1 == params.size();
    TORCH_CHECK_VALUE(scalar ? params[i].numel() == 1 : params[i].sizes() == lead.sizes(), "fastvae::nll: params[", i,
                      "] has the shape ", params[i].sizes());
    TORCH_CHECK_TYPE(scalar || params[i].scalar_type() == lead.scalar_type(), "fastvae::nll: params[", i, "] must be ",
                     lead.scalar_type(), ", got ", params[i].scalar_type());
  }
}

void check_weight(const Tensor& weight, at::IntArrayRef expected) {
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(type == at::kBool || type == at::kByte || type == at::kFloat || type == at::kDouble || type == at::kHalf ||
                       type == at::kBFloat16,
                   "fastvae::nll: `weight` must be bool, uint8 or floating point, got ", type);
  bool fits = weight.dim() == int64_t(expected.size());
  for (int64_t i = 0; fits && i < weight.dim(); ++i) fits = weight.size(i) == 1 || weight.size(i) == expected[i];
  TORCH_CHECK_VALUE(fits, "fastvae::nll: `weight` must have the shape ", expected, " or sizes of 1, got ", weight.sizes());
}

}  // namespace

c10::SmallVector<int64_t, 5> weighted_sizes(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target) {
  c10::SmallVector<int64_t, 5> sizes(target.sizes().begin(), target.sizes().end());
  if (variant.family == Family::counts && !variant.elementwise()) {
    // A sparse target is a list of values. It comes with two more params, the first of which has an entry for each row and one more.
    const bool sparse = int64_t(params.size()) > variant.tensors;
    return {sparse ? params[variant.tensors].size(0) - 1 : target.size(0), params[0].size(1)};
  }
  if (variant.family == Family::discretized && variant.constants == 4) sizes[1] = 1;
  return sizes;
}

void check_nll(const LikelihoodVariant& variant, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
               const OptionalTensor& kl, const OptionalTensor& beta, int64_t reduction, const OptionalTensor& weight) {
  TORCH_CHECK_VALUE(reduction >= kNone && reduction <= kMean, "fastvae::nll: `reduction` must be 0, 1 or 2, got ", reduction);
  if (variant.elementwise()) {
    check_elements(variant, params, target, constants);
  } else {
    switch (variant.family) {
      case Family::counts: check_counts(variant, params, target, constants); break;
      case Family::categorical: check_categorical(params[0], target, constants); break;
      case Family::discretized: check_discretized(variant, params[0], target, constants); break;
      case Family::continuous: break;  // all of this family are elementwise
    }
  }
  const int64_t rows = params[0].size(0);
  TORCH_CHECK_VALUE(!kl || (kl->dim() == 1 && kl->size(0) == rows), "fastvae::nll: `kl` must have the shape (", rows, ",)");
  TORCH_CHECK_VALUE(!beta || beta->numel() == 1, "fastvae::nll: `beta` must be a single number");
  if (weight) check_weight(*weight, weighted_sizes(variant, params, target));
}

TORCH_LIBRARY_IMPL(fastvae, CompositeExplicitAutograd, m) { m.impl("nll", nll_without_graph); }
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("nll", nll_autograd); }
TORCH_LIBRARY_IMPL(fastvae, Meta, m) {
  m.impl("nll_forward", nll_forward_meta);
  m.impl("nll_gradient", nll_gradient_meta);
  m.impl("nll_backward", nll_backward_meta);
  m.impl("nll_backward_", nll_backward_extras_meta);
}

}  // namespace fastvae
