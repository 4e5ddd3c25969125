// The normaliser of a softmax, summed by several threads.
#pragma once
#include "device.cuh"

namespace fastvae::cuda {

// The sum of exp(x) over some logits, stored as exp(top) * sum.
template <class C>
struct Scaled {
  C top = C(-3e38f), sum = C(0);  // below any logit, but finite, because -inf - -inf is NaN

  FASTVAE_DEVICE void add(const Scaled& other) {
    using P = math::Primitives<C>;
    const C higher = top < other.top ? other.top : top;
    sum = sum * P::exp(top - higher) + other.sum * P::exp(other.top - higher);
    top = higher;
  }
};

// Combines the sums of all threads of a group and returns the total to each of them. `scratch` has two numbers for each warp.
template <class C>
FASTVAE_DEVICE Scaled<C> group_total(Scaled<C> mine, int lanes, C* scratch) {
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) {
    Scaled<C> other;
    other.top = __shfl_xor_sync(0xffffffff, mine.top, offset);
    other.sum = __shfl_xor_sync(0xffffffff, mine.sum, offset);
    mine.add(other);
  }
  if (lanes <= kWarp) return mine;
  const int warp = threadIdx.x / kWarp, first = threadIdx.x / lanes * (lanes / kWarp);
  __syncthreads();  // all threads must have read what the previous call left in `scratch`
  if (threadIdx.x % kWarp == 0) scratch[2 * warp] = mine.top, scratch[2 * warp + 1] = mine.sum;
  __syncthreads();
  Scaled<C> all;
  for (int i = first; i < first + lanes / kWarp; ++i) {
    Scaled<C> one;
    one.top = scratch[2 * i], one.sum = scratch[2 * i + 1];
    all.add(one);
  }
  return all;
}

}  // namespace fastvae::cuda
