#include "nll.cuh"

template cudaError_t fastvae::cuda::launch_nll<fastvae::math::DiscretizedLogistic>(const NllArgs&, cudaStream_t);
