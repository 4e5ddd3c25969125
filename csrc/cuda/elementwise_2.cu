#include "elementwise.cuh"

template cudaError_t fastvae::cuda::launch_share<2>(const NllArgs&, cudaStream_t);
