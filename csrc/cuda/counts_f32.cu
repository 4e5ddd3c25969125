#include "counts.cuh"

template cudaError_t fastvae::cuda::launch_counts<float, false>(const CountArgs&, cudaStream_t);
