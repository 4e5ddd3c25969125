// The kernels read operands as dense arrays of the compute type (float or double). Memory that already has this form is used in place;
// everything else (half types, integers, interleaved channels) is converted through a buffer that stays in the L1 cache. The kernels are
// therefore written and compiled once per compute type, not once per combination of types.
#pragma once
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

// staging.cpp has the conversions. They are compiled there once for each instruction set, because inlined code for all types would be most of
// the code of the kernels.

// Elements [position, position + n) of `data` as dense numbers.
template <class C>
void convert_in(const void* data, DType type, int64_t position, C* out, int64_t n);

template <class C>
void convert_out(const C* in, void* data, DType type, int64_t position, int64_t n);

// Elements [begin, begin + n) of `row` as dense numbers, and back.
template <class C>
void read(const Operand& view, int64_t row, int64_t begin, int64_t n, C* out);

template <class C>
void write(const C* in, const Result& view, int64_t row, int64_t begin, int64_t n);

// The weights of elements [begin, begin + n) of `row` as a dense array, for n up to kBlock.
template <class C>
void read(const Weights& view, int64_t row, int64_t begin, int64_t n, C* out);

template <class C, class View>
inline bool in_place(const View& view, int64_t size) {
  return view.type == dtype_of<C>() && view.run >= size;
}

// Elements [begin, begin + n) of `row` as a dense array: the operand's own memory, or `buffer`.
template <class C>
inline const C* load(const Operand& view, int64_t row, int64_t begin, int64_t n, int64_t size, Buffer<C>& buffer) {
  if (!view.data) return nullptr;
  if (in_place<C>(view, size)) return static_cast<const C*>(view.data) + row * view.row_stride + begin;
  read(view, row, begin, n, buffer.data);
  return buffer.data;
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
  if (view.data && !in_place<C>(view, size)) write(buffer.data, view, row, begin, n);
}

// Adds the stored values of a row of a CSR target to `out`, a dense row.
template <class Args, class C>
inline void add_stored(const Args& args, int64_t row, Buffer<C>& buffer, C* out) {
  const int64_t first = args.starts[row], last = args.starts[row + 1];
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t n = std::min(kBlock, last - begin);
    convert_in(args.target_values.data, args.target_values.type, begin, buffer.data, n);
    for (int64_t i = 0; i < n; ++i) out[args.columns[begin + i]] += buffer.data[i];
  }
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
