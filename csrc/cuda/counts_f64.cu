#include "counts.cuh"

template cudaError_t fastvae::cuda::launch_counts<double, false>(const CountArgs&, cudaStream_t);
