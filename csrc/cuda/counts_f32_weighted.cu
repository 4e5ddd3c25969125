#include "counts.cuh"

template cudaError_t fastvae::cuda::launch_counts<float, true>(const CountArgs&, cudaStream_t);
