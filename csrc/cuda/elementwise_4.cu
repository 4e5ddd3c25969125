#include "elementwise.cuh"

template cudaError_t fastvae::cuda::launch_share<4>(const NllArgs&, cudaStream_t);
