// The CUDA kernels of fastvae::nll_forward and nll_backward. Nothing here reads a value of a tensor: that would make Python wait for
// the GPU, and a captured graph would keep the value.
#include <torch/library.h>

#include <variant>

#include "categorical.h"
#include "common_cuda.h"
#include "counts_cuda.h"
#include "discretized.h"
#include "nll_views.h"

namespace fastvae {
namespace {

using Args = std::variant<cuda::NllArgs, cuda::MixtureArgs, cuda::CategoricalArgs, cuda::CountArgs>;  // by family

cuda::NllArgs& common(Args& args) {
  return std::visit([](auto& of_family) -> cuda::NllArgs& { return of_family; }, args);
}

Tensors fill_elementwise(Args& args, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                         at::ArrayRef<double> constants, int64_t needs, const OptionalTensor& weight, Tensors& kept) {
  auto& elements = args.emplace<cuda::NllArgs>();
  const auto norm = normaliser(variant, constants, 0);
  std::copy_n(norm.constants, cuda::kMaxConstants, elements.constants);
  elements.normaliser = norm.per_element;
  if (variant.has_scalar) elements.scalar = number(params.back(), "params");
  return fill_elements(elements, variant, params, target, needs, weight, kept);
}

Tensors fill_discretized(Args& args, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
                      at::ArrayRef<double> constants, int64_t needs, const OptionalTensor& weight, Tensors& kept) {
  const auto found = logistic_constants(variant, constants);
  if (found.components > 0) {
    auto& mixture = args.emplace<cuda::MixtureArgs>();
    mixture.components = found.components;
    mixture.channels = target.size(1);
    mixture.pixels = event_size(target) / mixture.channels;
    mixture.alternate = memory_order(params[0]) != at::MemoryFormat::Contiguous;
  }
  const auto bins = bins_of(found);
  std::copy(bins.begin(), bins.end(), common(args).constants);
  Tensors gradients = fill_elements(common(args), variant, params, target, needs, weight, kept);
  common(args).element = cpu::Element::discretized_logistic;  // on CUDA, a single one uses the loop over elements
  return gradients;
}

Tensors fill_categorical(Args& args, const Tensor& logits, const Tensor& target, at::ArrayRef<double> constants, int64_t needs,
                         const OptionalTensor& weight, Tensors& kept) {
  auto& positions = args.emplace<cuda::CategoricalArgs>();
  positions.rows = logits.size(0);
  positions.size = positions.positions = event_size(target);
  positions.classes = logits.size(-1);
  positions.ignored = static_cast<int64_t>(constants[0]);
  kept = {dense_rows(logits, at::MemoryFormat::Contiguous), dense_rows(target, at::MemoryFormat::Contiguous)};
  positions.params[0] = operand(kept[0]);
  positions.target = operand(kept[1]);
  positions.target_rows = repeated_rows(target.size(0), positions.rows);
  positions.weights = weights_view(weight, target.sizes(), at::MemoryFormat::Contiguous, kept);
  if (!(needs & 1)) return {};
  Tensor gradient = pooled_empty(logits.sizes(), logits);
  positions.grads[0] = result(gradient);
  return {gradient};
}

// All arguments except the results of the rows.
Tensors fill(Args& args, const OnDevice& device, const LikelihoodVariant& variant, at::TensorList params, const Tensor& target,
             at::ArrayRef<double> constants, int64_t reduction, int64_t needs, const OptionalTensor& weight, Tensors& kept) {
  for (const auto& p : params) device.expect(p, "params");
  device.expect(target, "target");
  device.expect(weight, "weight");
  Tensors gradients;
  if (variant.elementwise()) {
    gradients = fill_elementwise(args, variant, params, target, constants, needs, weight, kept);
  } else {
    switch (variant.family) {
      case Family::discretized: gradients = fill_discretized(args, variant, params, target, constants, needs, weight, kept); break;
      case Family::categorical: gradients = fill_categorical(args, params[0], target, constants, needs, weight, kept); break;
      case Family::counts:
        gradients = fill_counts(args.emplace<cuda::CountArgs>(), variant, params, target, constants, needs, weight, kept);
        break;
      case Family::continuous: break;  // all of this family are elementwise
    }
  }
  common(args).weight = weight_of(reduction, common(args).rows);
  return gradients;
}

void launch(Args& args, const LikelihoodVariant& variant, const OnDevice& device) {
  if (auto* mixture = std::get_if<cuda::MixtureArgs>(&args)) launch(*mixture, cuda::mixture_scratch, cuda::mixture, device);
  else if (auto* positions = std::get_if<cuda::CategoricalArgs>(&args))
    launch(*positions, cuda::categorical_scratch, cuda::categorical, device);
  else if (auto* counts = std::get_if<cuda::CountArgs>(&args)) launch_counts(*counts, variant, device);
  else launch(common(args), cuda::nll_scratch, cuda::nll, device);
}

std::tuple<Tensor, Tensor, Tensors, Tensor> nll_forward_cuda(std::string_view likelihood, at::TensorList params,
                                                             const Tensor& target, at::ArrayRef<double> constants,
                                                             const OptionalTensor& kl, const OptionalTensor& beta,
                                                             int64_t reduction, int64_t needs, const OptionalTensor& weight) {
  const auto& variant = likelihood_variant(likelihood);
  check_nll(variant, params, target, constants, kl, beta, reduction, weight);
  const OnDevice device(target);
  device.expect(kl, "kl");
  device.expect(beta, "beta");

  Args of_family;
  Tensors kept;
  Tensors gradients = fill(of_family, device, variant, params, target, constants, reduction, needs, weight, kept);
  cuda::NllArgs& args = common(of_family);
  const auto options = target.options().dtype(row_dtype(params[0].scalar_type()));
  const bool with_scalar = variant.has_scalar && (needs >> (params.size() - 1) & 1);
  const Tensor nll = uninitialized({args.rows}, options), scalar_rows = uninitialized({with_scalar ? args.rows : 0}, options);
  const int64_t sizes[] = {args.rows};
  const Tensor loss = uninitialized(at::IntArrayRef(sizes, reduction == kNone ? 1 : 0),
                                kl && kl->scalar_type() == at::kDouble ? options.dtype(at::kDouble) : options);
  args.nll = output(nll);
  args.loss = output(loss);
  if (with_scalar) args.scalar_rows = output(scalar_rows);
  args.reduced = reduction != kNone;
  args.kl = numbers(kl, "kl");
  if (kl && beta) args.beta = number(*beta, "beta");
  launch(of_family, variant, device);
  return {loss, nll, std::move(gradients), scalar_rows};
}

Tensors nll_gradient_cuda(std::string_view likelihood, at::TensorList params, const Tensor& target, at::ArrayRef<double> constants,
                          const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, int64_t reduction, int64_t needs,
                         const OptionalTensor& weight) {
  const auto& variant = likelihood_variant(likelihood);
  check_nll(variant, params, target, constants, {}, {}, reduction, weight);
  const OnDevice device(target);
  device.expect(grad_loss, "grad_loss");
  device.expect(grad_nll, "grad_nll");
  Args of_family;
  Tensors kept;
  Tensors gradients = fill(of_family, device, variant, params, target, constants, reduction, needs, weight, kept);
  common(of_family).grad_loss = numbers(grad_loss, "grad_loss");
  common(of_family).grad_nll = numbers(grad_nll, "grad_nll");
  launch(of_family, variant, device);
  return gradients;
}

// Writes the scaled `gradients` to `results`, which may be the same tensors; returns the gradients of the scalar, kl and beta.
Tensors nll_backward_into(at::TensorList results, const OptionalTensor& grad_loss, const OptionalTensor& grad_nll,
                          at::TensorList gradients, const OptionalTensor& scalar_rows, const OptionalTensor& kl,
                          const OptionalTensor& beta, int64_t rows, int64_t reduction, bool need_kl, bool need_beta) {
  Tensors extras;
  if (gradients.empty() && !scalar_rows && !need_kl && !need_beta) return extras;
  const OnDevice device(!gradients.empty() ? gradients[0] : scalar_rows ? *scalar_rows : kl.value());
  device.expect(grad_loss, "grad_loss");
  device.expect(grad_nll, "grad_nll");
  for (const auto& g : gradients) device.expect(g, "gradients");
  device.expect(scalar_rows, "scalar_rows");
  device.expect(kl, "kl");
  device.expect(beta, "beta");

  cuda::NllBackwardArgs args;
  args.rows = rows;
  args.weight = weight_of(reduction, rows);
  // Of counts, the gradients of a shared dispersion and of the library are smaller than the others.
  const Tensor* lead = nullptr;
  for (const auto& g : gradients)
    if (!lead || g.dim() > lead->dim()) lead = &g;
  int full = 0, small = 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor& g = gradients[i];
    if (g.sizes() == lead->sizes() && g.scalar_type() == lead->scalar_type() && g.size(0) == rows && full < cuda::kMaxParams) {
      args.size = event_size(g);
      args.gradients[full] = operand(g);
      args.results[full++] = result(results[i]);
    } else {
      TORCH_CHECK_VALUE(small < 2, "fastvae::nll_backward: at most 2 gradients of other shapes, got the shape ", g.sizes());
      args.small[small++] = {output(g), output(results[i]), g.numel()};
    }
  }
  args.grad_loss = numbers(grad_loss, "grad_loss");
  args.grad_nll = numbers(grad_nll, "grad_nll");
  args.scalar_rows = numbers(scalar_rows, "scalar_rows");
  args.kl = numbers(kl, "kl");
  if (beta) args.beta = number(*beta, "beta");
  const auto extra = [&](const Tensor& like, at::IntArrayRef sizes) {
    extras.push_back(uninitialized(sizes, like.options()));
    return output(extras.back());
  };
  if (scalar_rows) args.scalar_gradient = extra(*scalar_rows, {});
  if (need_kl) args.kl_gradient = extra(*kl, {rows});
  if (need_beta) args.beta_gradient = extra(*beta, {});
  const Scratch scratch(cuda::nll_backward_scratch(args), device);
  args.workspace = scratch.workspace();
  check_launch(cuda::nll_backward(args, device));
  return extras;
}

Tensors nll_backward_cuda(const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, at::TensorList gradients,
                          const OptionalTensor& scalar_rows, const OptionalTensor& kl, const OptionalTensor& beta, c10::SymInt rows,
                          int64_t reduction, bool need_kl, bool need_beta) {
  Tensors results;
  for (const auto& gradient : gradients) results.push_back(pooled_empty(gradient.sizes(), gradient, memory_order(gradient)));
  for (auto& extra : nll_backward_into(results, grad_loss, grad_nll, gradients, scalar_rows, kl, beta, rows.expect_int(), reduction,
                                       need_kl, need_beta))
    results.push_back(std::move(extra));
  return results;
}

Tensors nll_backward_in_place_cuda(const OptionalTensor& grad_loss, const OptionalTensor& grad_nll, at::TensorList gradients,
                                   const OptionalTensor& scalar_rows, const OptionalTensor& kl, const OptionalTensor& beta,
                                   c10::SymInt rows, int64_t reduction, bool need_kl, bool need_beta) {
  return nll_backward_into(gradients, grad_loss, grad_nll, gradients, scalar_rows, kl, beta, rows.expect_int(), reduction, need_kl,
                           need_beta);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("nll_forward", nll_forward_cuda);
  m.impl("nll_gradient", nll_gradient_cuda);
  m.impl("nll_backward", nll_backward_cuda);
  m.impl("nll_backward_", nll_backward_in_place_cuda);
}

}  // namespace fastvae
