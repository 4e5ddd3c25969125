// The conversions of operands to dense arrays of the compute type, and of results from them.
#include "staging.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

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

}  // namespace

template <class C>
void convert_in(const void* data, DType type, int64_t position, C* out, int64_t n) {
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
void convert_out(const C* in, void* data, DType type, int64_t position, int64_t n) {
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

template <class C>
void read(const Operand& view, int64_t row, int64_t begin, int64_t n, C* out) {
  for_runs(view, row, begin, n, [&](int64_t position, int64_t index, int64_t length) {
    convert_in(view.data, view.type, position, out + index, length);
  });
}

template <class C>
void write(const C* in, const Result& view, int64_t row, int64_t begin, int64_t n) {
  for_runs(view, row, begin, n, [&](int64_t position, int64_t index, int64_t length) {
    convert_out(in + index, view.data, view.type, position, length);
  });
}

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

#define FASTVAE_CONVERSIONS(C)                                                    \
  template void convert_in(const void*, DType, int64_t, C*, int64_t);             \
  template void convert_out(const C*, void*, DType, int64_t, int64_t);            \
  template void read(const Operand&, int64_t, int64_t, int64_t, C*);              \
  template void write(const C*, const Result&, int64_t, int64_t, int64_t);        \
  template void read(const Weights&, int64_t, int64_t, int64_t, C*);
FASTVAE_CONVERSIONS(float)
FASTVAE_CONVERSIONS(double)

}  // namespace fastvae::cpu::FASTVAE_ISA
