#include "nll.cuh"

template cudaError_t fastvae::cuda::launch_nll<fastvae::math::GaussianBounded>(const NllArgs&, cudaStream_t);
