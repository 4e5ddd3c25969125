#include "nll.cuh"

template cudaError_t fastvae::cuda::launch_nll<fastvae::math::GaussianPerElement>(const NllArgs&, cudaStream_t);
