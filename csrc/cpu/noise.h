// A vectorised version of math/philox.h, which handles one vector of counters at a time.
#pragma once
#include "../math/normals.h"
#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {

// A vector of W 32-bit words, one for each of W consecutive counters.
constexpr int64_t kWords = Vec<float>::size();
using Words = uint32_t __attribute__((vector_size(4 * kWords)));
using Integers = int32_t __attribute__((vector_size(4 * kWords)));
using Floats = float __attribute__((vector_size(4 * kWords)));
using Wide = uint64_t __attribute__((vector_size(4 * kWords)));  // half as many lanes of 64 bits

inline Vec<float> to_vec(Floats x) { return Vec<float>::loadu(&x); }

// The 64-bit products of the low 32 bits of each lane. The high halves of a and b may hold anything.
inline Wide multiply(Wide a, Wide b) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Interleaves the low halves of `even` and `odd`.
inline Words interleave(Wide even, Wide odd) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Words)_mm512_mask_blend_epi32(0xAAAA, (__m512i)even, (__m512i)(odd << 32));
#elif defined(CPU_CAPABILITY_AVX2)
  return (Words)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
#else
  return (Words)((even & 0xffffffff) | (odd << 32));
#endif
}

// The keys of all rounds. They are stored in 64 bits, so that broadcasting one is a load and does not compete for the execution ports
// that the rounds keep busy.
struct KeySchedule {
  uint64_t key[math::kPhiloxRounds][2];

  explicit KeySchedule(uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (auto& round : key) {
      round[0] = k0;
      round[1] = k1;
      k0 += math::kPhiloxWeyl0;
      k1 += math::kPhiloxWeyl1;
    }
  }
};

// Which of the W consecutive counters is in lane i of a Words. This order makes the results contiguous in memory once the 4 x 4 blocks
// of four Words are transposed (store_in_order).
constexpr int64_t counter_of_lane(int64_t i) { return kWords / 4 * (i % 4) + i / 4; }

// Writes word i of W consecutive counters, starting at (low, high), to word[i]. Even and odd lanes go through the rounds separately, as
// 64-bit lanes, because the products need 64 bits.
inline void philox(const KeySchedule& keys, uint64_t low, uint64_t high, Words (&word)[4]) {
  Wide c[2][4];
  for (int half = 0; half < 2; ++half) {
    Wide counter;
    for (int i = 0; i < kWords / 2; ++i) counter[i] = counter_of_lane(2 * i + half);
    counter += high;
    c[half][0] = Wide{} + low;
    c[half][1] = Wide{} + (low >> 32);
    c[half][2] = counter;
    c[half][3] = counter >> 32;
  }
  const Wide m0 = Wide{} + math::kPhiloxMultiplier0, m1 = Wide{} + math::kPhiloxMultiplier1;
  for (const auto& key : keys.key) {
    const Wide key0 = Wide{} + key[0], key1 = Wide{} + key[1];
    for (auto& x : c) {
      const Wide p0 = multiply(x[0], m0), p1 = multiply(x[2], m1);
      x[0] = (p1 >> 32) ^ x[1] ^ key0;
      x[1] = p1;
      x[2] = (p0 >> 32) ^ x[3] ^ key1;
      x[3] = p0;
    }
  }
  for (int i = 0; i < 4; ++i) word[i] = interleave(c[0][i], c[1][i]);
}

// Within each 128-bit block, low_words and high_words interleave the two low or high words of a and b; low_pairs and high_pairs
// concatenate the low or high pair of words of a and that of b.
#if defined(CPU_CAPABILITY_AVX512)
inline Floats low_words(Floats a, Floats b) { return (Floats)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
inline Floats high_words(Floats a, Floats b) { return (Floats)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
inline Floats low_pairs(Floats a, Floats b) { return (Floats)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
inline Floats high_pairs(Floats a, Floats b) { return (Floats)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
#elif defined(CPU_CAPABILITY_AVX2)
inline Floats low_words(Floats a, Floats b) { return (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
inline Floats high_words(Floats a, Floats b) { return (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
inline Floats low_pairs(Floats a, Floats b) { return (Floats)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
inline Floats high_pairs(Floats a, Floats b) { return (Floats)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
#endif

// Stores the four normals of each counter next to each other, by transposing a 4 x 4 matrix within each 128-bit block.
inline void store_in_order(const Floats (&n)[4], float* out) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  const Floats low01 = low_words(n[0], n[1]), low23 = low_words(n[2], n[3]);
  const Floats high01 = high_words(n[0], n[1]), high23 = high_words(n[2], n[3]);
  const Floats rows[4] = {low_pairs(low01, low23), high_pairs(low01, low23), low_pairs(high01, high23), high_pairs(high01, high23)};
  for (int i = 0; i < 4; ++i) to_vec(rows[i]).store(out + i * kWords);
#else
  for (int64_t lane = 0; lane < kWords; ++lane)
    for (int i = 0; i < 4; ++i) out[4 * counter_of_lane(lane) + i] = n[i][lane];
#endif
}

// The template argument N of math/normals.h, for vectors.
struct Lanes {
  using Floats = cpu::FASTVAE_ISA::Floats;
  using Words = cpu::FASTVAE_ISA::Words;
  using Integers = cpu::FASTVAE_ISA::Integers;

  static FASTVAE_HD Floats as_floats(Words x) { return (Floats)x; }
  static FASTVAE_HD Words as_words(Floats x) { return (Words)x; }
  static FASTVAE_HD Floats to_floats(Integers x) { return __builtin_convertvector(x, Floats); }
  static FASTVAE_HD Integers to_integers(Floats x) { return __builtin_convertvector(x, Integers); }
  static FASTVAE_HD Floats sqrt(Floats x) {
    to_vec(x).sqrt().store(&x);
    return x;
  }
};

// Writes four normals for each of `counters` consecutive counters, starting at `high`, and up to 4 * kWords - 4 numbers past their end.
// fetch(i, n) is called before the numbers [i, i + n) are generated, so that it can prefetch memory during the arithmetic.
template <class Fetch>
inline void normals(uint64_t seed, uint64_t low, uint64_t high, int64_t counters, float* out, const Fetch& fetch) {
  static_assert(4 * kWords <= kBufferSlack);
  const KeySchedule keys(seed);
  for (int64_t i = 0; i < counters; i += kWords) {
    fetch(4 * i, 4 * kWords);
    Words word[4];
    philox(keys, low, high + i, word);
    Floats n[4];
    for (int pair = 0; pair < 2; ++pair) {
      Floats cosine, sine;
      math::circle<Lanes>(word[2 * pair + 1], cosine, sine);
      const Floats r = math::radius<Lanes>(word[2 * pair]);
      n[2 * pair] = r * cosine;
      n[2 * pair + 1] = r * sine;
    }
    store_in_order(n, out + 4 * i);
  }
}

template <class Fetch>
inline void normals(uint64_t seed, uint64_t low, uint64_t high, int64_t counters, double* out, const Fetch& fetch) {
  for (int64_t i = 0; i < counters; ++i) {
    if (i % 2 == 0) fetch(4 * i, 8);
    const math::PhiloxWords w = math::philox(seed, low, high + i);
    math::box_muller(w.x[0], w.x[1], out[4 * i], out[4 * i + 1]);
    math::box_muller(w.x[2], w.x[3], out[4 * i + 2], out[4 * i + 3]);
  }
}

}  // namespace fastvae::cpu::FASTVAE_ISA
