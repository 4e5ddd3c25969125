#include "counts.cuh"

template cudaError_t fastvae::cuda::launch_counts<fastvae::cuda::Half, true>(const CountArgs&, cudaStream_t);
