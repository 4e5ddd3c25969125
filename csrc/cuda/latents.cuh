// What the forward and the backward kernel of a posterior share: noise, and access to rows.
#pragma once
#include "device.cuh"
//
#include "../math/latents.h"
#include "../math/normals.h"

namespace fastvae::cuda {

constexpr uint64_t kSeedMask = ~uint64_t(0) >> 1;  // seeds and offsets fit a positive int64

struct NoiseKey {
  uint64_t seed, offset;

  explicit FASTVAE_DEVICE NoiseKey(const NoiseSource& source) {
    if (source.tensor) {
      seed = static_cast<uint64_t>(source.tensor[0]);
      offset = static_cast<uint64_t>(source.tensor[1]);
    } else {
      seed = source.captured ? static_cast<uint64_t>(*source.seed_pointer) : source.seed;
      offset = source.captured ? static_cast<uint64_t>(*source.offset_pointer) + source.offset_intragraph : source.offset;
    }
    seed &= kSeedMask;
    offset &= kSeedMask;
  }
};

// The template argument N of math/normals.h, for a single lane.
struct Lane {
  using Floats = float;
  using Words = uint32_t;
  using Integers = int32_t;

  static FASTVAE_DEVICE float as_floats(uint32_t x) { return __uint_as_float(x); }
  static FASTVAE_DEVICE uint32_t as_words(float x) { return __float_as_uint(x); }
  static FASTVAE_DEVICE float to_floats(int32_t x) { return static_cast<float>(x); }
  static FASTVAE_DEVICE int32_t to_integers(float x) { return static_cast<int32_t>(x); }
  static FASTVAE_DEVICE float sqrt(float x) { return x * math::inverse_root_approximately(x); }  // x is never 0
};

FASTVAE_DEVICE void box_muller(uint32_t x0, uint32_t x1, float& n0, float& n1) {
  float sine, cosine;
  math::circle<Lane>(x1, cosine, sine);
  const float radius = math::radius<Lane>(x0);
  n0 = radius * cosine;
  n1 = radius * sine;
}
// sincospi avoids the slow path that a cosine has for large angles.
FASTVAE_DEVICE void box_muller(uint32_t x0, uint32_t x1, double& n0, double& n1) {
  const double radius = sqrt(-2.0 * log(math::open_unit<double>(x0)));
  double sine, cosine;
  sincospi(2.0 * math::open_unit<double>(x1), &sine, &cosine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

// The normals of N adjacent elements, where `counter` belongs to the first one. `keys` are derived from `key.seed`.
template <class C, int N>
FASTVAE_DEVICE void normals(const NoiseKey& key, const math::PhiloxKeys& keys, int64_t draw, uint64_t counter, C (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const math::PhiloxWords words = math::philox(keys, key.offset / 4 + static_cast<uint64_t>(draw), counter + i / 4);
    box_muller(words.x[0], words.x[1], out[i], out[i + 1]);
    box_muller(words.x[2], words.x[3], out[i + 2], out[i + 3]);
  }
}

// Reads N adjacent values of type T. If kWhole, this takes one access; otherwise only the `left` values that remain in the row are read,
// and the others are 0.
template <class T, int N, bool kWhole>
FASTVAE_DEVICE void read(const T* p, uint32_t left, Compute<T> (&out)[N]) {
  Pack<T, N> pack;
  if constexpr (kWhole) {
    pack.load(p);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) pack.value[j] = uint32_t(j) < left ? p[j] : narrowed<T>(0.0f);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = widened(pack.value[j]);
}

template <class T, int N, bool kWhole, class C>
FASTVAE_DEVICE void write(T* p, uint32_t left, const C (&in)[N]) {
  Pack<T, N> pack;
  pack.fill(in);
  if constexpr (kWhole) {
    pack.store(p);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (uint32_t(j) < left) p[j] = pack.value[j];
  }
}

// Calls x[j] = f(j, x[j]) for one element after the other. Side by side, they would take registers that the kernels do not have, and the
// code of every form would be there N times. An array in registers has no variable index, so the elements are selected.
template <class C, int N, class F>
FASTVAE_DEVICE void one_by_one(C (&x)[N], const F& f) {
#pragma unroll 1
  for (int j = 0; j < N; ++j) {
    C value = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) value = i == j ? x[i] : value;
    value = f(j, value);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = i == j ? value : x[i];
  }
}

// log sigma^2 and its derivative for what an encoder gives.
template <class C>
FASTVAE_DEVICE math::LogVariance<C> log_variance(const ScaleForm& form, C v) {
  math::LogVariance<C> soft{v, C(1)}, out;
  if (form.soft != 0) soft = math::soft_clamp(v, C(form.soft));
  math::with_log_variance<C>(form, [&](const auto& of) { out = of(soft.value); });
  return {out.value, out.grad * soft.grad};
}

// Replaces what an encoder gives by the mean and log sigma^2.
template <class C, int N>
FASTVAE_DEVICE void apply(const ScaleForm& form, C (&mu)[N], C (&v)[N]) {
  if (form.is_plain()) return;
  one_by_one(v, [&](int, C x) { return log_variance(form, x).value; });
  if (form.soft != 0) one_by_one(mu, [&](int, C x) { return math::soft_clamp(x, C(form.soft)).value; });
}

// Multiplies the gradients by the derivatives of the form. It reads what the encoder gives again: to keep the derivatives would take
// registers that the rest of the kernel needs.
template <class T, class C, int N>
FASTVAE_DEVICE void chain(const ScaleForm& form, const T* mu, const T* v, uint32_t left, C (&d_mu)[N], C (&d_v)[N]) {
  if (form.is_plain()) return;
  const auto at = [&](const T* p, int j) { return uint32_t(j) < left ? C(widened(p[j])) : C(0); };
  one_by_one(d_v, [&](int j, C grad) { return math::chained(grad, log_variance(form, at(v, j)).grad); });
  if (form.soft == 0) return;
  one_by_one(d_mu, [&](int j, C grad) { return math::chained(grad, math::soft_clamp(at(mu, j), C(form.soft)).grad); });
}

// Where a part of a row begins.
template <class T, class View>
FASTVAE_DEVICE auto row_of(const View& view, const Part& part) {
  using P = std::conditional_t<std::is_same_v<View, Operand>, const T*, T*>;
  return view.data ? static_cast<P>(view.data) + part.row * view.row_stride + part.begin : nullptr;
}

// The high half of the first noise counter of a part of a row.
FASTVAE_DEVICE uint64_t first_counter(const Latents& args, const Part& part) {
  const uint64_t row = static_cast<uint64_t>(args.noise.row_offset + part.row);
  return row * static_cast<uint64_t>((args.size + 3) / 4) + static_cast<uint64_t>(part.begin / 4);
}

// The number of elements that a thread processes at a time: those of one counter, or of two counters if that makes a 128-bit access.
constexpr int whole_unit(int64_t item_size) { return item_size == 2 ? 8 : 4; }

// If there are enough rows, a thread processes 32 elements of one. Finding the row and summing and writing its KL takes as long as some
// ten elements.
constexpr int turns(int unit) { return 32 / unit; }

inline bool allows(const Latents& args, int unit) {
  return allows(args.mu, args.size, unit) && allows(args.logvar, args.size, unit) && allows(args.prior_mu, args.size, unit) &&
         allows(args.prior_logvar, args.size, unit) && allows(args.eps, args.size, unit) && args.eps_draw_stride % unit == 0;
}

// Calls f(type, whole), where `whole` says whether whole units are read and written.
template <class T, class F>
cudaError_t with_access(bool whole, const F& f) {
  return whole ? f(T(), std::true_type()) : f(T(), std::false_type());
}
template <class F>
cudaError_t with_types(DType type, bool whole, const F& f) {
  switch (type) {
    case DType::f32: return with_access<float>(whole, f);
    case DType::f64: return with_access<double>(whole, f);
    case DType::f16: return with_access<Half>(whole, f);
    default: return with_access<BFloat16>(whole, f);
  }
}

}  // namespace fastvae::cuda
