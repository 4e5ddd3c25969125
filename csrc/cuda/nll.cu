#include "nll.cuh"

namespace fastvae::cuda {
int64_t nll_scratch(const NllArgs& args) {
  const Plan plan = with_likelihood(args.element, [&](auto likelihood) { return plan_for<decltype(likelihood)>(args); });
  if (!args.loss.data) return 0;
  return (plan.splits > 1 ? (args.scalar_rows.data ? 2 : 1) * plan.items : args.reduced && plan.blocks > 1 ? plan.blocks : 0) * int64_t(sizeof(double));
}

cudaError_t nll(const NllArgs& args, cudaStream_t stream) {
  return with_likelihood(args.element, [&](auto likelihood) { return launch_nll<decltype(likelihood)>(args, stream); });
}

}  // namespace fastvae::cuda
