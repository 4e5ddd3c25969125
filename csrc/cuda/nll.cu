#include "nll.cuh"

namespace fastvae::cuda {
namespace {

template <class F>
auto with_likelihood(Element element, F f) {
  switch (element) {
    case Element::bernoulli: return f(math::Bernoulli());
    case Element::gaussian: return f(math::Gaussian());
    case Element::gaussian_per_element: return f(math::GaussianPerElement());
    case Element::laplace: return f(math::Laplace());
    case Element::laplace_per_element: return f(math::LaplacePerElement());
    case Element::continuous_bernoulli: return f(math::ContinuousBernoulli());
    case Element::poisson: return f(math::Poisson());
    case Element::student_t: return f(math::StudentT());
    default: return f(math::StudentTPerElement());
  }
}

}  // namespace

int64_t nll_scratch(const NllArgs& args) {
  const Plan plan = with_likelihood(args.element, [&](auto likelihood) { return plan_for<decltype(likelihood)>(args); });
  if (!args.loss.data || plan.blocks == 1) return 0;
  return (plan.splits > 1 ? plan.items : args.reduced ? plan.blocks : 0) * int64_t(sizeof(double));
}

cudaError_t nll(const NllArgs& args, cudaStream_t stream) {
  return with_likelihood(args.element, [&](auto likelihood) { return launch_nll<decltype(likelihood)>(args, stream); });
}

}  // namespace fastvae::cuda
