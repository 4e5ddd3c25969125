#include "nll.cuh"

namespace fastvae::cuda {

int64_t nll_scratch(const NllArgs& args) {
  const Plan plan = plan_for(args);
  if (!args.loss.data || plan.blocks == 1) return 0;
  return (plan.splits > 1 ? plan.items : args.reduced ? plan.blocks : 0) * int64_t(sizeof(double));
}

cudaError_t nll(const NllArgs& args, cudaStream_t stream) {
  switch (args.element) {
    case Element::bernoulli: return launch_nll<math::Bernoulli>(args, stream);
    case Element::gaussian: return launch_nll<math::Gaussian>(args, stream);
    case Element::gaussian_per_element: return launch_nll<math::GaussianPerElement>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastvae::cuda
