#include "nll.cuh"

template cudaError_t fastvae::cuda::launch_nll<fastvae::math::StudentT>(const NllArgs&, cudaStream_t);
