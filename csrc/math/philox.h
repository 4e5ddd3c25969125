// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based generator. The noise
// of an element is a function of its position, so nothing needs to be stored and the backward can draw the same numbers again.
//
// The noise for (seed, offset), draw k, row r and element d of D uses
//   key     = seed
//   counter = low 64 bits  offset / 4 + k
//             high 64 bits (row_offset + r) * ceil(D / 4) + d / 4
//   lane    = d % 4
// Lanes (0, 1) and (2, 3) each give two normals by Box & Muller (1958). Their uniforms u = (2 (x >> 9) + 1) 2^-24 are strictly inside
// (0, 1) and exact in fp32, so that every precision starts from the same number.
#pragma once
#include <cmath>
#include <cstdint>

#include "elementary.h"

namespace fastvae::math {
inline namespace FASTVAE_ISA {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t x[4];
};

FASTVAE_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  // nvcc would spend additions and multiplications on the zero high halves of a and b.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

// The keys of all rounds, which are computed once for many counters.
struct PhiloxKeys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];

  explicit FASTVAE_HD PhiloxKeys(uint64_t seed) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      k0[round] = uint32_t(seed) + uint32_t(round) * kPhiloxWeyl0;
      k1[round] = uint32_t(seed >> 32) + uint32_t(round) * kPhiloxWeyl1;
#ifdef __CUDA_ARCH__
      // Without this, nvcc would recompute the keys in every loop, at one instruction per key.
      asm volatile("" : "+r"(k0[round]), "+r"(k1[round]));
#endif
    }
  }
};

FASTVAE_HD PhiloxWords philox(const PhiloxKeys& keys, uint64_t low, uint64_t high) {
  PhiloxWords c = {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = wide_product(c.x[0], kPhiloxMultiplier0), p1 = wide_product(c.x[2], kPhiloxMultiplier1);
    c = {{uint32_t(p1 >> 32) ^ c.x[1] ^ keys.k0[round], uint32_t(p1), uint32_t(p0 >> 32) ^ c.x[3] ^ keys.k1[round], uint32_t(p0)}};
  }
  return c;
}
FASTVAE_HD PhiloxWords philox(uint64_t seed, uint64_t low, uint64_t high) { return philox(PhiloxKeys(seed), low, high); }

template <class T>
FASTVAE_HD T open_unit(uint32_t x) {
  return T(2 * (x >> 9) + 1) * T(5.9604644775390625e-08);
}

// Converts two random words to two normals.
template <class T>
FASTVAE_HD void box_muller(uint32_t x0, uint32_t x1, T& n0, T& n1) {
  const T radius = std::sqrt(T(-2) * std::log(open_unit<T>(x0)));
  const T angle = T(6.283185307179586) * open_unit<T>(x1);
  n0 = radius * std::cos(angle);
  n1 = radius * std::sin(angle);
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae::math
