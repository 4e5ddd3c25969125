#include "nll.cuh"

template cudaError_t fastvae::cuda::launch_nll<fastvae::math::ContinuousBernoulli>(const NllArgs&, cudaStream_t);
