// The kernels read operands as dense arrays of the compute type (float or double). Memory that already has this form is used in place;
// everything else (half types, integers, interleaved channels) is converted through a buffer that stays in the L1 cache. The kernels are
// therefore written and compiled once per compute type, not once per combination of types.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace fastvae::cpu::FASTVAE_ISA {

constexpr int64_t kBlock = 1024;  // the number of elements of a row that a task handles at a time
constexpr int64_t kBufferSlack = 64;
constexpr int64_t kGrain = 32768;  // the number of elements that justifies another thread

// The minimum number of tasks per thread, where each task has `work` elements.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)); }

template <class C>
struct Buffer {
  alignas(64) C data[kBlock + kBufferSlack];
};

template <class C>
constexpr DType dtype_of() {
  return std::is_same_v<C, float> ? DType::f32 : DType::f64;
}

// Calls f(position in the row's memory, index in the dense array, length) for each run that [begin, begin + n) touches.
template <class View, class F>
inline void for_runs(const View& view, int64_t row, int64_t begin, int64_t n, const F& f) {
  int64_t done = 0;
  while (done < n) {
    const int64_t run = (begin + done) / view.run, within = (begin + done) % view.run;
    const int64_t length = std::min(n - done, view.run - within);
    f(row * view.row_stride + run * view.run_stride + within, done, length);
    done += length;
  }
}

inline auto widened(Vec<c10::BFloat16> v) { return at::vec::convert_bfloat16_float(v); }
inline auto widened(Vec<c10::Half> v) { return at::vec::convert_half_float(v); }
inline void narrowed(Vec<float> low, Vec<float> high, c10::BFloat16* out) { at::vec::convert_float_bfloat16(low, high).store(out); }
inline void narrowed(Vec<float> low, Vec<float> high, c10::Half* out) { at::vec::convert_float_half(low, high).store(out); }

template <class Half>
inline void widen(const Half* in, float* out, int64_t n) {
  constexpr int64_t W = Vec<Half>::size();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const auto [low, high] = widened(Vec<Half>::loadu(in + i));
    low.store(out + i);
    high.store(out + i + W / 2);
  }
  for (; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

template <class Half>
inline void narrow(const float* in, Half* out, int64_t n) {
  constexpr int64_t W = Vec<Half>::size();
  int64_t i = 0;
  for (; i + W <= n; i += W) narrowed(Vec<float>::loadu(in + i), Vec<float>::loadu(in + i + W / 2), out + i);
  for (; i < n; ++i) out[i] = static_cast<Half>(in[i]);
}

template <class T, class C>
inline void read_numbers(const void* data, int64_t position, C* out, int64_t n) {
  const T* in = static_cast<const T*>(data) + position;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<C>(in[i]);
}

template <class C>
inline void convert_in(const void* data, DType type, int64_t position, C* out, int64_t n) {
  switch (type) {
    case DType::f32: read_numbers<float>(data, position, out, n); break;
    case DType::f64: read_numbers<double>(data, position, out, n); break;
    case DType::byte: read_numbers<uint8_t>(data, position, out, n); break;
    case DType::u16: read_numbers<uint16_t>(data, position, out, n); break;
    case DType::i32: read_numbers<int32_t>(data, position, out, n); break;
    case DType::i64: read_numbers<int64_t>(data, position, out, n); break;
    case DType::u8: {
      const uint8_t* in = static_cast<const uint8_t*>(data) + position;
      for (int64_t i = 0; i < n; ++i) out[i] = C(in[i]) / C(255);
      break;
    }
    case DType::boolean: {
      const uint8_t* in = static_cast<const uint8_t*>(data) + position;
      for (int64_t i = 0; i < n; ++i) out[i] = in[i] ? C(1) : C(0);
      break;
    }
    case DType::f16:
      if constexpr (std::is_same_v<C, float>) widen(static_cast<const c10::Half*>(data) + position, out, n);
      else read_numbers<c10::Half>(data, position, out, n);  // only weights are half while params are double
      break;
    case DType::bf16:
      if constexpr (std::is_same_v<C, float>) widen(static_cast<const c10::BFloat16*>(data) + position, out, n);
      else read_numbers<c10::BFloat16>(data, position, out, n);
      break;
  }
}

template <class C>
inline void convert_out(const C* in, void* data, DType type, int64_t position, int64_t n) {
  switch (type) {
    case DType::f32: {
      float* out = static_cast<float*>(data) + position;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
      break;
    }
    case DType::f64: {
      double* out = static_cast<double*>(data) + position;
      for (int64_t i = 0; i < n; ++i) out[i] = in[i];
      break;
    }
    case DType::f16:
      if constexpr (std::is_same_v<C, float>) narrow(in, static_cast<c10::Half*>(data) + position, n);
      break;
    case DType::bf16:
      if constexpr (std::is_same_v<C, float>) narrow(in, static_cast<c10::BFloat16*>(data) + position, n);
      break;
    default: break;
  }
}

template <class C, class View>
inline bool in_place(const View& view, int64_t size) {
  return view.type == dtype_of<C>() && view.run >= size;
}

// Elements [begin, begin + n) of `row` as a dense array: the operand's own memory, or `buffer`.
template <class C>
inline const C* load(const Operand& view, int64_t row, int64_t begin, int64_t n, int64_t size, Buffer<C>& buffer) {
  if (!view.data) return nullptr;
  if (in_place<C>(view, size)) return static_cast<const C*>(view.data) + row * view.row_stride + begin;
  for_runs(view, row, begin, n, [&](int64_t position, int64_t index, int64_t length) {
    convert_in(view.data, view.type, position, buffer.data + index, length);
  });
  return buffer.data;
}

// The weights of elements [begin, begin + n) of `row` as a dense array, for n up to kBlock.
template <class C>
void read(const Weights& view, int64_t row, int64_t begin, int64_t n, C* out) {
  const int64_t size = view.sizes[0], stride = view.strides[0];
  if (stride == 0 && view.levels > 1) {  // each weight serves `size` elements
    Weights outer = view;
    std::copy(view.sizes + 1, view.sizes + view.levels, outer.sizes);
    std::copy(view.strides + 1, view.strides + view.levels, outer.strides);
    --outer.levels;
    Buffer<C> weights;
    const int64_t first = begin / size;
    read(outer, row, first, (begin + n - 1) / size - first + 1, weights.data);
    int64_t left = size - begin % size;
    for (int64_t i = 0, k = 0; i < n; ++i, --left) {
      if (left == 0) ++k, left = size;
      out[i] = weights.data[k];
    }
    return;
  }
  for (int64_t done = 0; done < n;) {
    const int64_t within = (begin + done) % size, length = std::min(n - done, size - within);
    int64_t position = row * view.row_stride + within * stride;
    for (int64_t l = 1, rest = (begin + done) / size; l < view.levels; rest /= view.sizes[l++]) position += rest % view.sizes[l] * view.strides[l];
    C* to = out + done;
    if (stride == 1) {
      convert_in(view.data, view.type, position, to, length);
    } else {
      for (int64_t i = 0; i < (stride ? length : 1); ++i) convert_in(view.data, view.type, position + i * stride, to + i, 1);
      if (stride == 0) std::fill(to + 1, to + length, *to);
    }
    done += length;
  }
}

// The same in `buffer`, or null if there are no weights.
template <class C>
inline const C* load(const Weights& view, int64_t row, int64_t begin, int64_t n, Buffer<C>& buffer) {
  if (!view.data) return nullptr;
  read(view, row, begin, n, buffer.data);
  return buffer.data;
}

// `x` times the weight; 0 where the weight is 0, whatever x is.
template <class C>
inline __attribute__((always_inline)) Vec<C> weighted(Vec<C> x, Vec<C> weight) {
  return math::Primitives<Vec<C>>::select(weight == Vec<C>(0), Vec<C>(0), x * weight);
}

// Where to write those elements. If that is the buffer, `store` must be called afterwards to copy them to the result.
template <class C>
inline C* destination(const Result& view, int64_t row, int64_t begin, int64_t size, Buffer<C>& buffer) {
  if (!view.data) return nullptr;
  return in_place<C>(view, size) ? static_cast<C*>(view.data) + row * view.row_stride + begin : buffer.data;
}

template <class C>
inline void store(const Result& view, int64_t row, int64_t begin, int64_t n, int64_t size, const Buffer<C>& buffer) {
  if (!view.data || in_place<C>(view, size)) return;
  for_runs(view, row, begin, n, [&](int64_t position, int64_t index, int64_t length) {
    convert_out(buffer.data + index, view.data, view.type, position, length);
  });
}

// The number of lanes of a whole vector. As a compile-time constant it gets code of its own, beside that of the incomplete last vector.
// Where kernels are compiled for size, they have only the latter.
#ifdef FASTVAE_SMALL
template <class V>
constexpr int64_t whole_vector = V::size();
#else
template <class V>
constexpr std::integral_constant<int64_t, V::size()> whole_vector;
#endif

// Loads `n` lanes from p and sets the others to zero.
template <class C>
inline Vec<C> load_lanes(const C* p, int64_t n) {
  return n >= Vec<C>::size() ? Vec<C>::loadu(p) : Vec<C>::loadu(p, n);
}

template <class C>
inline void store_lanes(Vec<C> v, C* p, int64_t n) {
  if (n >= Vec<C>::size()) v.store(p);
  else v.store(p, static_cast<int>(n));
}

// Prefetches the cache lines of [p, p + bytes) into the L1 cache, or only into the L2 cache.
template <bool kL2 = false>
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(p) + line, 0, kL2 ? 2 : 3);
}

// A sum whose value does not depend on how a row is split among threads. Block boundaries are fixed, four vectors of partial sums are
// added in a fixed order, and the sums of blocks are added in double precision.
template <class C>
struct Sum {
  Vec<C> part[4] = {Vec<C>(0), Vec<C>(0), Vec<C>(0), Vec<C>(0)};

  void add(int slot, Vec<C> v) { part[slot] = part[slot] + v; }
  // Adds only the first n lanes of v.
  void add_lanes(Vec<C> v, int64_t n) { part[0] = part[0] + (n < Vec<C>::size() ? Vec<C>::set(Vec<C>(0), v, n) : v); }
  double total() const {
    const Vec<C> folded = (part[0] + part[1]) + (part[2] + part[3]);
    C lanes[Vec<C>::size()];
    folded.store(lanes);
    double sum = 0;
    for (C lane : lanes) sum += static_cast<double>(lane);
    return sum;
  }
};

}  // namespace fastvae::cpu::FASTVAE_ISA
