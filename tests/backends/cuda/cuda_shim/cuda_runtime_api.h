// The part of CUDA that csrc/cuda uses, for a CPU, so that the kernels' bodies compile as C++ and run with a thread for every thread of a
// block. The threads are fibers, which one processor runs in turn from barrier to barrier. Under a sanitizer, they are threads of the
// operating system (threads.h), whose races it can see. Two blocks of the grid run at a time, each on its own team.
#pragma once
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

namespace shim {

constexpr int kTeams = 2;
constexpr int kWarp = 32;
inline int processors = 1;  // of the device, set by the driver
inline int launches = 0;

}  // namespace shim

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace shim {

inline Device& device(int threads) {
  static SHIM_OF_EACH Device one(threads);
  return one;
}

template <class Kernel, class... Args>
cudaError_t launch(int threads, Kernel kernel, dim3 grid, const Args&... args) {
  device(threads).launch(grid, [&] { kernel(args...); });
  return cudaSuccess;
}

}  // namespace shim

#define FASTVAE_LAUNCH(kernel, blocks, stream, ...) shim::launch(fastvae::cuda::kThreads, kernel, blocks, __VA_ARGS__)
#define FASTVAE_SHARED(type, name, count)   \
  static SHIM_OF_EACH type name##_of[shim::kTeams][count]; \
  type* const name = name##_of[shim::team_index]

inline cudaError_t cudaGetDevice(int* device) {
  *device = shim::processors;  // device n has n processors
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// SHIM_WITHOUT_BARRIERS serves to check that the thread sanitizer detects races.
inline void __syncthreads() {
  static const bool without = std::getenv("SHIM_WITHOUT_BARRIERS");
  if (!without) shim::team->wait_for_block();
}

inline uint32_t atomicInc(uint32_t* p, uint32_t limit) {
  std::atomic_ref<uint32_t> value(*p);
  uint32_t old = value.load();
  while (!value.compare_exchange_weak(old, old >= limit ? 0 : old + 1)) {
  }
  return old;
}

inline uint32_t atomicOr(uint32_t* p, uint32_t bits) { return std::atomic_ref<uint32_t>(*p).fetch_or(bits); }

inline void __syncwarp() { shim::team->wait_for_warp(threadIdx.x); }

// Returns the value of the thread `source`, counted in the block.
template <class T>
T shim_exchange(T value, unsigned source) {
  uint64_t* words = shim::team->exchange.data();
  std::memcpy(&words[threadIdx.x], &value, sizeof value);
  __syncwarp();
  std::memcpy(&value, &words[source], sizeof value);
  __syncwarp();
  return value;
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return shim_exchange(value, threadIdx.x ^ mask);
}
template <class T>
T __shfl_up_sync(uint32_t, T value, unsigned distance) {
  return shim_exchange(value, threadIdx.x % shim::kWarp < distance ? threadIdx.x : threadIdx.x - distance);
}
template <class T>
T __shfl_sync(uint32_t, T value, unsigned lane) {
  return shim_exchange(value, threadIdx.x / shim::kWarp * shim::kWarp + lane);
}
inline uint32_t __ballot_sync(uint32_t, bool bit) {
  uint32_t bits = uint32_t(bit) << threadIdx.x % shim::kWarp;
  for (int mask = 1; mask < shim::kWarp; mask *= 2) bits |= __shfl_xor_sync(0xffffffff, bits, mask);
  return bits;
}
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }

// The approximations of the hardware have the maximum error that its manual allows (PTX ISA: 2^-22, 1 unit in the last place, 2^-22.4, 2^-22.6),
// always in one direction, and flush results below 2^-126.
inline float approximate(float x, float error) { return std::abs(x) < 1.17549435e-38f ? 0.0f : x + x * error; }
inline float shim_exp2f(float x) { return x == 0 ? 1.0f : approximate(std::exp2(x), 2.4e-7f); }  // exact at 0
#define exp2f shim_exp2f
inline float __log2f(float x) {  // the error is absolute around 1 (2^-22.6)
  const float y = std::log2(x);
  return y + 1.6e-7f * std::fmax(1.0f, std::abs(y));
}
inline float __frcp_rn(float x) { return approximate(1.0f / x, 1.2e-7f); }
inline float rsqrtf(float x) { return approximate(1.0f / std::sqrt(x), 1.9e-7f); }

inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(x * 3.141592653589793238);
  *cosine = std::cos(x * 3.141592653589793238);
}
