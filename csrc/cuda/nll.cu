#include "nll.cuh"

namespace fastvae::cuda {
int64_t nll_scratch(const NllArgs& args) {
  const Plan plan = with_likelihood(args.element, [&](auto likelihood) { return plan_for<decltype(likelihood)>(args); });
  return scratch_of(args, plan);
}

cudaError_t nll(const NllArgs& args, cudaStream_t stream) {
  return with_likelihood(args.element, [&](auto likelihood) { return launch_nll<decltype(likelihood)>(args, stream); });
}

}  // namespace fastvae::cuda
