#include "elementwise.cuh"

namespace fastvae::cuda {

int64_t nll_scratch(const NllArgs& args) {
  const Plan plan = with_likelihood(args.element, [&](auto likelihood) { return plan_for<decltype(likelihood)>(args); });
  return scratch_of(args, plan);
}

cudaError_t nll(const NllArgs& args, cudaStream_t stream) {
  constexpr cudaError_t (*shares[kShares])(const NllArgs&, cudaStream_t) = {launch_share<0>, launch_share<1>, launch_share<2>,
                                                                            launch_share<3>, launch_share<4>, launch_share<5>};
  if (args.element == Element::none) return cudaErrorInvalidValue;
  return shares[int(args.element) % kShares](args, stream);
}

}  // namespace fastvae::cuda
