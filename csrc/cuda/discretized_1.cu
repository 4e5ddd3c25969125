#include "discretized.cuh"

template cudaError_t fastvae::cuda::launch_mixture<1>(const MixtureArgs&, cudaStream_t);
