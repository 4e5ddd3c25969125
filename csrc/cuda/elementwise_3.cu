#include "elementwise.cuh"

template cudaError_t fastvae::cuda::launch_share<3>(const NllArgs&, cudaStream_t);
