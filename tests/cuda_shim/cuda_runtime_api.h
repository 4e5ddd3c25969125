// CUDA for a CPU: what csrc/cuda uses of it, so that the kernels' bodies compile as C++ and run with a thread for every thread of a
// block. A launch runs the blocks of its grid on kTeams teams of threads at a time and returns when they are done.
#pragma once
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

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
inline int processors = 1;  // of the device; the driver sets it
inline int launches = 0;

struct Team {
  std::barrier<> block;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint64_t> exchange;

  explicit Team(int threads) : block(threads), exchange(threads) {
    for (int i = 0; i < threads; i += kWarp) warps.push_back(std::make_unique<std::barrier<>>(kWarp));
  }
};

inline thread_local Team* team;
inline thread_local int team_index;

}  // namespace shim

inline thread_local dim3 threadIdx, blockIdx, gridDim;

namespace shim {

// Threads are made once: they outlive the launches.
class Device {
 public:
  explicit Device(int threads) : threads_(threads), start_(kTeams * threads + 1), end_(kTeams * threads + 1) {
    for (int t = 0; t < kTeams; ++t) teams_.push_back(std::make_unique<Team>(threads));
    for (int t = 0; t < kTeams; ++t)
      for (int i = 0; i < threads; ++i) workers_.emplace_back([this, t, i] { work(t, i); });
  }
  ~Device() {
    stop_ = true;
    start_.arrive_and_wait();
    for (auto& worker : workers_) worker.join();
  }

  template <class F>
  void launch(dim3 grid, const F& body) {
    ++launches;
    grid_ = grid;
    run_ = [](const void* f) { (*static_cast<const F*>(f))(); };
    body_ = &body;
    next_ = 0;
    start_.arrive_and_wait();
    end_.arrive_and_wait();
  }

 private:
  void work(int t, int i) {
    team = teams_[t].get();
    team_index = t;
    threadIdx = dim3(i);
    while (true) {
      start_.arrive_and_wait();
      if (stop_) return;
      gridDim = grid_;
      const unsigned blocks = grid_.x * grid_.y;
      while (true) {
        if (i == 0) block_of_[t] = next_++;
        team->block.arrive_and_wait();
        const unsigned block = block_of_[t];
        if (block >= blocks) break;
        blockIdx = dim3(block % grid_.x, block / grid_.x);
        run_(body_);
        team->block.arrive_and_wait();
      }
      end_.arrive_and_wait();
    }
  }

  const int threads_;
  std::barrier<> start_, end_;
  std::vector<std::unique_ptr<Team>> teams_;
  std::vector<std::thread> workers_;
  bool stop_ = false;
  dim3 grid_;
  void (*run_)(const void*) = nullptr;
  const void* body_ = nullptr;
  std::atomic<unsigned> next_{0};
  unsigned block_of_[kTeams] = {};
};

inline Device& device(int threads) {
  static Device one(threads);
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
  static type name##_of[shim::kTeams][count]; \
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

// SHIM_WITHOUT_BARRIERS is there to see that the thread sanitizer notices.
inline void __syncthreads() {
  static const bool without = std::getenv("SHIM_WITHOUT_BARRIERS");
  if (!without) shim::team->block.arrive_and_wait();
}

inline uint32_t atomicInc(uint32_t* p, uint32_t limit) {
  std::atomic_ref<uint32_t> value(*p);
  uint32_t old = value.load();
  while (!value.compare_exchange_weak(old, old >= limit ? 0 : old + 1)) {
  }
  return old;
}

template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  auto& warp = *shim::team->warps[threadIdx.x / shim::kWarp];
  uint64_t* words = shim::team->exchange.data();
  std::memcpy(&words[threadIdx.x], &value, sizeof value);
  warp.arrive_and_wait();
  std::memcpy(&value, &words[threadIdx.x ^ mask], sizeof value);
  warp.arrive_and_wait();
  return value;
}

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

// Where the hardware approximates, as far off as its manual allows (PTX ISA: 2^-22, 1 unit in the last place, 2^-22.4), all in one
// direction, and with no results below 2^-126.
inline float approximate(float x, float error) { return std::abs(x) < 1.17549435e-38f ? 0.0f : x + x * error; }
inline float shim_exp2f(float x) { return approximate(std::exp2(x), 2.4e-7f); }
#define exp2f shim_exp2f
inline float __frcp_rn(float x) { return approximate(1.0f / x, 1.2e-7f); }
inline float rsqrtf(float x) { return approximate(1.0f / std::sqrt(x), 1.9e-7f); }

inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(x * 3.141592653589793238);
  *cosine = std::cos(x * 3.141592653589793238);
}
