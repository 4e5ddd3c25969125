#include "elementwise.cuh"

template cudaError_t fastvae::cuda::launch_share<1>(const NllArgs&, cudaStream_t);
