// What the kernels share: the types in memory, accesses of up to 128 bits, and sums over threads and over blocks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "plan.h"
#include "primitives.cuh"

#define FASTVAE_DEVICE __device__ __forceinline__

// Tests compile these files as C++ for the CPU, with their own headers, which define launches and shared memory differently.
#ifndef FASTVAE_LAUNCH
#define FASTVAE_LAUNCH(kernel, blocks, stream, ...) \
  ((kernel)<<<(blocks), fastvae::cuda::kThreads, 0, (stream)>>>(__VA_ARGS__), cudaGetLastError())
#define FASTVAE_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace fastvae::cuda {

// ---------------------------------------------------------------------------------------------------------------------------------
// Types
// ---------------------------------------------------------------------------------------------------------------------------------

using Half = __half;
using BFloat16 = __nv_bfloat16;

// An element of uint8 data, which is read as x / 255, or of bool data.
struct Byte {
  uint8_t value;
};

// An element whose type is known only at run time, when the Converter is constructed.
struct Any {};

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

FASTVAE_DEVICE float widened(float x) { return x; }
FASTVAE_DEVICE double widened(double x) { return x; }
FASTVAE_DEVICE float widened(Half x) { return __half2float(x); }
FASTVAE_DEVICE float widened(BFloat16 x) { return __bfloat162float(x); }
FASTVAE_DEVICE int widened(uint8_t x) { return x; }  // this and the other integers are counts
FASTVAE_DEVICE int widened(uint16_t x) { return x; }
FASTVAE_DEVICE int32_t widened(int32_t x) { return x; }
FASTVAE_DEVICE int64_t widened(int64_t x) { return x; }

template <class T, class C>
FASTVAE_DEVICE T narrowed(C x) {
  if constexpr (std::is_same_v<T, Half>) return __float2half_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(static_cast<float>(x));
  else return static_cast<T>(x);
}

FASTVAE_DEVICE void narrow_two(float x, float y, Half& a, Half& b) {
  const __half2 both = __floats2half2_rn(x, y);
  a = both.x;
  b = both.y;
}
FASTVAE_DEVICE void narrow_two(float x, float y, BFloat16& a, BFloat16& b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  a = both.x;
  b = both.y;
}

// Converts values from the type T that they have in memory to the compute type C.
template <class T, class C>
struct Converter {
  explicit FASTVAE_DEVICE Converter(DType) {}
  FASTVAE_DEVICE C operator()(T x) const { return static_cast<C>(widened(x)); }
};

template <class C>
struct Converter<Byte, C> {
  int limit;
  C divisor, reciprocal;

  explicit FASTVAE_DEVICE Converter(DType type)
      : limit(type == DType::u8 ? 255 : 1), divisor(C(limit)), reciprocal(type == DType::u8 ? C(1.0 / 255) : C(1)) {}

  // Computes x / 255, correctly rounded, in three instructions.
  FASTVAE_DEVICE C operator()(Byte byte) const {
    using P = math::Primitives<C>;
    const C x = static_cast<C>(byte.value < limit ? byte.value : limit), quotient = x * reciprocal;
    return P::fma(P::fma(-quotient, divisor, x), reciprocal, quotient);
  }
};

// ---------------------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------------------

// Writes 16 bytes at once. After it has reordered code, the compiler may split a plain assignment into four stores of 4 bytes.
FASTVAE_DEVICE void store_chunk(uint4* p, uint4 x) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
#else
  *p = x;
#endif
}
template <class Chunk>
FASTVAE_DEVICE void store_chunk(Chunk* p, Chunk x) {
  *p = x;
}

// N adjacent values, which take a single access if they have 128 bits or fewer.
template <class T, int N>
struct Pack {
  static constexpr int kBytes = N * int(sizeof(T));
  static constexpr int kChunk = kBytes < 16 ? kBytes : 16;
  using Chunk = std::conditional_t<kChunk == 16, uint4, std::conditional_t<kChunk == 8, uint2,
                std::conditional_t<kChunk == 4, uint32_t, std::conditional_t<kChunk == 2, uint16_t, uint8_t>>>>;
  static constexpr int kChunks = kBytes / int(sizeof(Chunk));
  static_assert(kBytes % sizeof(Chunk) == 0);

  union {
    T value[N];
    Chunk chunk[kChunks];
  };

  FASTVAE_DEVICE Pack() {}
  // Loads from memory that this kernel does not write.
  FASTVAE_DEVICE void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunk[i] = __ldg(reinterpret_cast<const Chunk*>(p) + i);
  }
  // Loads from memory that this kernel may also write.
  FASTVAE_DEVICE void load_own(const T* p) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunk[i] = reinterpret_cast<const Chunk*>(p)[i];
  }
  // Loads from memory that other blocks have written.
  FASTVAE_DEVICE void load_written(const T* p) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunk[i] = __ldcg(reinterpret_cast<const Chunk*>(p) + i);
  }
  FASTVAE_DEVICE void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) store_chunk(reinterpret_cast<Chunk*>(p) + i, chunk[i]);
  }

  template <class C>
  FASTVAE_DEVICE void fill(const C (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // One instruction converts two values.
      if constexpr (sizeof(T) == 2 && N > 1) {
        if (i % 2 == 0) narrow_two(x[i], x[i + 1], value[i], value[i + 1]);
      } else {
        value[i] = narrowed<T>(x[i]);
      }
    }
  }
};

// Returns x. The compiler does not know that, so it cannot compute what depends on x before the loop over items, where it would take up
// registers for the whole kernel.
FASTVAE_DEVICE uint32_t computed_here(uint32_t x) {
#ifdef __CUDA_ARCH__
  asm volatile("mov.u32 %0, %0;" : "+r"(x));
#endif
  return x;
}
FASTVAE_DEVICE double computed_here(double x) {
#ifdef __CUDA_ARCH__
  asm volatile("mov.f64 %0, %0;" : "+d"(x));
#endif
  return x;
}
FASTVAE_DEVICE int64_t computed_here(int64_t x) {
#ifdef __CUDA_ARCH__
  asm volatile("mov.u64 %0, %0;" : "+l"(x));
#endif
  return x;
}
template <class P>
FASTVAE_DEVICE P* computed_here(P* x) {
#ifdef __CUDA_ARCH__
  asm volatile("mov.u64 %0, %0;" : "+l"(x));
#endif
  return x;
}

// Adjacent values of a thread in shared memory.
constexpr int kQuad = 4;
template <class C>
struct alignas(16) Quad {
  C value[kQuad];
};
// Adjacent quads as an array.
template <class C>
FASTVAE_DEVICE C* flat(Quad<C>* quads) {
  return reinterpret_cast<C*>(quads);
}

// Maps the index of an element in its row to its offset in memory.
struct Runs {
  int64_t gap;       // the distance from the end of a run to the next run; 0 if the row is dense
  uint64_t inverse;  // that of the length of a run; see Weights::inverse_of

  explicit Runs(const Operand& view)
      : gap(view.run_stride ? view.run_stride - view.run : 0), inverse(view.run > 0 ? Weights::inverse_of(view.run) : 0) {}
  FASTVAE_DEVICE int64_t operator()(int64_t i) const {
    return gap == 0 ? i : i + static_cast<int64_t>(__umul64hi(2 * static_cast<uint64_t>(i), inverse)) * gap;
  }
};

// The weight of an element (or pixel, or position), which is 1 without weights.
template <class C>
FASTVAE_DEVICE C weight_of(const Weights& weights, int64_t row, int64_t element) {
  if (!weights.data) return C(1);
  int64_t at = row * weights.row_stride;
  const int last = weights.levels - 1;
#pragma unroll 1
  for (int l = 0; l < last; ++l) {
    const int64_t rest = static_cast<int64_t>(__umul64hi(2 * static_cast<uint64_t>(element), weights.inverses[l]));
    at += (element - rest * weights.sizes[l]) * weights.strides[l];
    element = rest;
  }
  at += element * weights.strides[last];
  switch (weights.type) {
    case DType::f32: return static_cast<C>(__ldg(static_cast<const float*>(weights.data) + at));
    case DType::f64: return static_cast<C>(__ldg(static_cast<const double*>(weights.data) + at));
    case DType::f16: return static_cast<C>(widened(__ldg(static_cast<const Half*>(weights.data) + at)));
    case DType::bf16: return static_cast<C>(widened(__ldg(static_cast<const BFloat16*>(weights.data) + at)));
    default: return static_cast<C>(__ldg(static_cast<const uint8_t*>(weights.data) + at));
  }
}

// Reads the number of a row, which is fp32 or fp64.
FASTVAE_DEVICE double number(const Numbers& numbers, int64_t row) {
  const int64_t i = row * numbers.stride;
  return numbers.type == DType::f64 ? static_cast<const double*>(numbers.data)[i] : static_cast<const float*>(numbers.data)[i];
}

FASTVAE_DEVICE void put(const Output& out, int64_t i, double value) {
  if (out.type == DType::f64) static_cast<double*>(out.data)[i] = value;
  else static_cast<float*>(out.data)[i] = static_cast<float>(value);
}

// The same for numbers of any floating-point type.
FASTVAE_DEVICE double number_of_any(const Numbers& numbers, int64_t row) {
  const int64_t i = row * numbers.stride;
  if (numbers.type == DType::f16) return __half2float(static_cast<const Half*>(numbers.data)[i]);
  if (numbers.type == DType::bf16) return __bfloat162float(static_cast<const BFloat16*>(numbers.data)[i]);
  return number(numbers, row);
}

FASTVAE_DEVICE void put_any(const Output& out, int64_t i, double value) {
  if (out.type == DType::f16) static_cast<Half*>(out.data)[i] = __float2half_rn(static_cast<float>(value));
  else if (out.type == DType::bf16) static_cast<BFloat16*>(out.data)[i] = __float2bfloat16_rn(static_cast<float>(value));
  else put(out, i, value);
}

// A single number of any floating-point type.
FASTVAE_DEVICE double number(const Numbers& single) { return number_of_any(single, 0); }
FASTVAE_DEVICE void put(const Output& single, double value) { put_any(single, 0, value); }

// d objective / d nll of a row: weight * grad_loss + grad_nll, where a gradient that is not given counts as 0.
FASTVAE_DEVICE double row_factor(const Numbers& grad_loss, const Numbers& grad_nll, double weight, int64_t row) {
  double factor = 0;
  if (grad_loss.data) factor = weight * number(grad_loss, row);
  if (grad_nll.data) factor += number(grad_nll, row);
  return factor;
}

// The part of a row that a thread processes together with the other threads of its group.
struct Part {
  int64_t row, begin;
  uint32_t count;

  FASTVAE_DEVICE Part(const Plan& plan, int64_t item, int64_t size) {
    if (plan.splits > 1) {
      row = uint32_t(item) / uint32_t(plan.splits);
      begin = (uint32_t(item) - uint32_t(row) * uint32_t(plan.splits)) * plan.split_size;
      count = static_cast<uint32_t>(begin + plan.split_size < size ? plan.split_size : size - begin);
    } else {
      row = item * (kThreads >> plan.lanes_log2) + (threadIdx.x >> plan.lanes_log2);
      begin = 0;
      count = static_cast<uint32_t>(size);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------------
// Sums
// ---------------------------------------------------------------------------------------------------------------------------------

// Sums `value` over groups of `lanes` adjacent threads, a power of two, and returns the sum to the first thread of each group. All
// threads of a block must call it. `scratch` has one number for each warp; two calls in succession must not use the same one.
template <class C>
FASTVAE_DEVICE C group_sum(C value, int lanes, C* scratch) {
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
  if (lanes <= kWarp) return value;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[warp] = value;
  __syncthreads();
  if (threadIdx.x % lanes == 0)
    for (int i = 1; i < lanes / kWarp; ++i) value += scratch[warp + i];
  return value;
}

// Increments a counter that wraps around to 0 after `last`, and returns its previous value. A thread sees everything that was written
// by the threads that incremented the counter before it. This acquire-release ordering costs less than two __threadfence(), which
// would order all of the device's memory accesses.
FASTVAE_DEVICE uint32_t take_number(uint32_t* counter, uint32_t last) {
#ifdef __CUDA_ARCH__
  uint32_t number;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(number)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
  return number;
#else
  return atomicInc(counter, last);
#endif
}

// Waits until a counter of take_number has reached `count`. All threads of a block call it, and can then read, with load_written, what was
// written before the counter was incremented. The work for which a block waits must have been begun by then, by blocks that do not wait
// for this one.
FASTVAE_DEVICE void wait_for(const uint32_t* counter, uint32_t count) {
  FASTVAE_SHARED(bool, reached, 1);
  while (true) {
    if (threadIdx.x == 0) {
      uint32_t number;
#ifdef __CUDA_ARCH__
      for (int tries = 0; tries < 64; ++tries) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(number) : "l"(__cvta_generic_to_global(counter)) : "memory");
        if (number >= count) break;
        __nanosleep(100);
      }
#else
      number = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
#endif
      reached[0] = number >= count;
    }
    __syncthreads();
    const bool done = reached[0];
    __syncthreads();
    if (done) return;
  }
}

// Whether this block is the last of `blocks` to get here. If so, it can read, with load_written, what the first threads of the other
// blocks wrote before.
FASTVAE_DEVICE bool is_last_block(uint32_t* counter, uint32_t blocks) {
  FASTVAE_SHARED(bool, last, 1);
  if (threadIdx.x == 0) last[0] = take_number(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  return last[0];
}

// Bypasses the L1 cache, which may hold stale data.
template <class C>
FASTVAE_DEVICE C load_written(const C* p) {
  return __ldcg(p);
}

// Sums `count` numbers that other blocks wrote, with all threads of this block, and returns the sum to the first thread.
FASTVAE_DEVICE double sum_written(const double* numbers, int count, double* scratch) {
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) sum += load_written(numbers + i);
  return group_sum(sum, kThreads, scratch);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------------------

// The number of blocks that the current device runs at a time, given the number per multiprocessor.
inline int64_t slots(int per_processor) {
  static int processors[64];  // the multiprocessors of each device; concurrent writers store the same number
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return 64 * per_processor;
  int count = __atomic_load_n(&processors[device], __ATOMIC_RELAXED);
  if (!count) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1) count = 64;
    __atomic_store_n(&processors[device], count, __ATOMIC_RELAXED);
  }
  return int64_t(count) * per_processor;
}

// Whether rows of `size` elements can be read or written `unit` elements at a time.
template <class View>
bool allows(const View& view, int64_t size, int unit) {
  if (!view.data) return true;
  const int64_t bytes = unit * cpu::item_size(view.type), aligned = bytes < 16 ? bytes : 16;
  const int64_t run = view.run_stride ? view.run : size;
  return reinterpret_cast<uintptr_t>(view.data) % aligned == 0 && size % unit == 0 && run % unit == 0 &&
         view.row_stride * cpu::item_size(view.type) % aligned == 0 && view.run_stride * cpu::item_size(view.type) % aligned == 0;
}

}  // namespace fastvae::cuda
