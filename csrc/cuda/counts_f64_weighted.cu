#include "counts.cuh"

template cudaError_t fastvae::cuda::launch_counts<double, true>(const CountArgs&, cudaStream_t);
