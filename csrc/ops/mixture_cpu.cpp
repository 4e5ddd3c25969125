// The CPU kernels of fastvae::gaussian_mixture_log_prob_*.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <cmath>

#include "cpu_kernels.h"
#include "mixture.h"

namespace fastvae {
namespace {

// The arguments in the type of the computation. These tensors are small beside the work, so they are simply converted.
struct MixtureViews {
  at::ScalarType type;
  Tensor z, mu, logvar, log_weight;

  MixtureViews(const Tensor& z_, const Tensor& mu_, const Tensor& logvar_, const OptionalTensor& log_weight_)
      : type(row_dtype(z_.scalar_type())) {
    check_mixture(z_, mu_, logvar_, log_weight_);
    z = view(z_);
    mu = view(mu_);
    logvar = view(logvar_);
    const int64_t components = mu.size(0);
    log_weight = log_weight_ ? view(*log_weight_) : at::full({components}, -std::log(double(components)), z.options());
  }

  Tensor view(const Tensor& t) const { return t.to(type).contiguous(); }
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, z.options()); }

  void fill(cpu::MixtureArgs& args) const {
    args.in_double = type == at::kDouble;
    args.points = z.size(0);
    args.components = mu.size(0);
    args.dims = z.size(1);
    args.z = z.const_data_ptr();
    args.mu = mu.const_data_ptr();
    args.logvar = logvar.const_data_ptr();
    args.log_weight = log_weight.const_data_ptr();
    args.log_weight_stride = log_weight.dim() == 2 ? args.components : 0;
  }
};

std::tuple<Tensor, Tensor> mixture_cpu(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weight,
                                       bool joint, bool per_dimension) {
  const MixtureViews views(z, mu, logvar, log_weight);
  Tensor joint_value = views.empty({joint ? z.size(0) : 0}), each_value = per_dimension ? views.empty(z.sizes()) : views.empty({0});
  cpu::MixtureValueArgs args{};
  views.fill(args);
  if (joint) args.joint = joint_value.mutable_data_ptr();
  if (per_dimension) args.per_dimension = each_value.mutable_data_ptr();
  if (z.size(0) && (joint || z.size(1))) cpu::kernels().mixture(args);
  return {joint_value, each_value};
}

Tensors mixture_grad_cpu(const OptionalTensor& grad_joint, const OptionalTensor& grad_each, const Tensor& z, const Tensor& mu,
                         const Tensor& logvar, const OptionalTensor& log_weight, const Tensor& joint, const Tensor& each,
                         int64_t needs) {
  const MixtureViews views(z, mu, logvar, log_weight);
  const auto view = [&](const OptionalTensor& t) { return t ? views.view(*t) : Tensor(); };
  const Tensor joint_view = view(joint), each_view = view(each), grad_joint_view = view(grad_joint), grad_each_view = view(grad_each);
  const Tensor d_z = views.empty(z.sizes()), d_mu = views.empty(mu.sizes()), d_logvar = views.empty(mu.sizes());
  const Tensor d_log_weight = needs & kLogWeights ? views.empty(views.log_weight.sizes()) : Tensor();
  cpu::MixtureGradArgs args{};
  views.fill(args);
  if (grad_joint) {
    args.joint = joint_view.const_data_ptr();
    args.grad_joint = grad_joint_view.const_data_ptr();
  }
  if (grad_each) {
    args.per_dimension = each_view.const_data_ptr();
    args.grad_per_dimension = grad_each_view.const_data_ptr();
  }
  args.grad_z = d_z.mutable_data_ptr();
  args.grad_mu = d_mu.mutable_data_ptr();
  args.grad_logvar = d_logvar.mutable_data_ptr();
  if (d_log_weight.defined()) args.grad_log_weight = d_log_weight.mutable_data_ptr();
  if (z.size(0) && (grad_joint || z.size(1))) cpu::kernels().mixture_grad(args);
  else for (const Tensor& t : {d_z, d_mu, d_logvar, d_log_weight}) if (t.defined()) t.zero_();
  Tensors gradients;
  const auto wanted = [&](int64_t bit, const Tensor& gradient, at::ScalarType dtype) {
    if (needs & bit) gradients.push_back(gradient.to(dtype));
  };
  wanted(kPoints, d_z, z.scalar_type());
  wanted(kMeans, d_mu, mu.scalar_type());
  wanted(kLogvars, d_logvar, logvar.scalar_type());
  if (needs & kLogWeights) wanted(kLogWeights, d_log_weight, log_weight->scalar_type());
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("gaussian_mixture_log_prob_forward", mixture_cpu);
  m.impl("gaussian_mixture_log_prob_backward", mixture_grad_cpu);
}

}  // namespace fastvae
