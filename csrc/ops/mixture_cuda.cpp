// The CUDA kernels of fastvae::gaussian_mixture_log_prob_*.
#include <torch/library.h>

#include "buffer_pool.h"
#include "common_cuda.h"
#include "mixture.h"

namespace fastvae {
namespace {

// All arguments but the results. `kept` owns copies that had to be made, and must live until the launch.
void fill(cuda::GaussianMixtureArgs& args, const OnDevice& device, const Tensor& z, const Tensor& mu, const Tensor& logvar,
          const OptionalTensor& log_weight, Tensors& kept) {
  check_mixture(z, mu, logvar, log_weight);
  device.expect(mu, "mu");
  device.expect(logvar, "logvar");
  device.expect(log_weight, "log_weight");
  const auto view = [&](const Tensor& t) { return operand(kept.emplace_back(dense_rows(t, at::MemoryFormat::Contiguous))); };
  args.points = z.size(0);
  args.components = mu.size(0);
  args.dims = z.size(1);
  args.z = view(z);
  args.mu = view(mu);
  args.logvar = view(logvar);
  if (!log_weight) return;
  if (log_weight->dim() == 2) args.log_weight = view(*log_weight);
  else args.log_weight = {kept.emplace_back(log_weight->contiguous()).const_data_ptr(), dtype_of(*log_weight), 0, args.components, 0};
}

std::tuple<Tensor, Tensor> mixture_cuda(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weight,
                                        bool joint, bool per_dimension) {
  const OnDevice device(z);
  Tensors kept;
  cuda::GaussianMixtureValueArgs args;
  fill(args, device, z, mu, logvar, log_weight, kept);
  const auto options = z.options().dtype(row_dtype(z.scalar_type()));
  const int64_t none = 0;
  Tensor joint_value = uninitialized({joint ? args.points : 0}, options);
  Tensor each_value = uninitialized(per_dimension ? z.sizes() : at::IntArrayRef(&none, 1), options);
  if (joint) args.joint = output(joint_value);
  if (per_dimension) args.per_dimension = output(each_value);
  if (args.points && (joint || args.dims)) launch(args, cuda::gaussian_mixture_scratch, cuda::gaussian_mixture, device);
  return {std::move(joint_value), std::move(each_value)};
}

Tensors mixture_grad_cuda(const OptionalTensor& grad_joint, const OptionalTensor& grad_each, const Tensor& z, const Tensor& mu,
                          const Tensor& logvar, const OptionalTensor& log_weight, const Tensor& joint, const Tensor& each,
                          int64_t needs) {
  const OnDevice device(z);
  device.expect(grad_joint, "grad_joint");
  device.expect(grad_each, "grad_per_dimension");
  device.expect(joint, "joint");
  device.expect(each, "per_dimension");
  Tensors kept, gradients;
  cuda::GaussianMixtureGradArgs args;
  fill(args, device, z, mu, logvar, log_weight, kept);
  const auto wanted = [&](int64_t bit, const Tensor& like, cuda::Output& out) {
    if (!(needs & bit)) return;
    gradients.push_back(uninitialized(like.sizes(), like.options()));
    out = output(gradients.back());
  };
  wanted(kPoints, z, args.grad_z);
  wanted(kMeans, mu, args.grad_mu);
  wanted(kLogvars, logvar, args.grad_logvar);
  if (log_weight) wanted(kLogWeights, *log_weight, args.grad_log_weight);
  args.of_rows = log_weight && log_weight->dim() == 2;
  const auto type = row_dtype(z.scalar_type());
  const auto dense = [&](const Tensor& t, at::IntArrayRef sizes, const char* name) -> const void* {
    TORCH_CHECK_VALUE(t.sizes() == sizes, "fastvae::gaussian_mixture_log_prob_backward: `", name, "` must have shape ", sizes, ", got ",
                      t.sizes());
    return kept.emplace_back(t.to(type).contiguous()).const_data_ptr();
  };
  const int64_t points[] = {args.points};
  if (grad_joint) {
    args.joint = dense(joint, points, "joint");
    TORCH_CHECK_VALUE(grad_joint->sizes() == at::IntArrayRef(points),
                      "fastvae::gaussian_mixture_log_prob_backward: `grad_joint` must have shape ", at::IntArrayRef(points), ", got ",
                      grad_joint->sizes());
    args.grad_joint = numbers(grad_joint, "grad_joint");
  }
  if (grad_each) {
    args.per_dimension = dense(each, z.sizes(), "per_dimension");
    args.grad_per_dimension = dense(*grad_each, z.sizes(), "grad_per_dimension");
  }
  const bool works = args.points && (grad_joint || (grad_each && args.dims));
  if (works && !gradients.empty()) {
    launch(args, cuda::gaussian_mixture_grad_scratch, cuda::gaussian_mixture_grad, device);
  } else {
    for (const Tensor& gradient : gradients) gradient.zero_();
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  m.impl("gaussian_mixture_log_prob_forward", mixture_cuda);
  m.impl("gaussian_mixture_log_prob_backward", mixture_grad_cuda);
}

}  // namespace fastvae
