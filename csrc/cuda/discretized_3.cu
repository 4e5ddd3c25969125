#include "discretized.cuh"

template cudaError_t fastvae::cuda::launch_mixture<3>(const MixtureArgs&, cudaStream_t);
