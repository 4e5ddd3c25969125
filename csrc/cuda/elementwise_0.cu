#include "elementwise.cuh"

template cudaError_t fastvae::cuda::launch_share<0>(const NllArgs&, cudaStream_t);
