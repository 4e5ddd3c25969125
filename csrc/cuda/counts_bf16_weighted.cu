#include "counts.cuh"

template cudaError_t fastvae::cuda::launch_counts<fastvae::cuda::BFloat16, true>(const CountArgs&, cudaStream_t);
