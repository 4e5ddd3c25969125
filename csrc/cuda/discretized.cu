#include "discretized.cuh"

namespace fastvae::cuda {

int64_t mixture_scratch(const MixtureArgs& args) { return scratch_of(args, plan_for(args)); }

cudaError_t mixture(const MixtureArgs& args, cudaStream_t stream) {
  return args.channels == 3 ? launch_mixture<3>(args, stream) : launch_mixture<1>(args, stream);
}

}  // namespace fastvae::cuda
