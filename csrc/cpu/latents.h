// What the loops over a posterior share: the division into tiles, noise, and the form of the scale.
#pragma once
#include <ATen/Parallel.h>

#include <vector>

#include "../math/latents.h"
#include "noise.h"
#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

// Rows are cut into blocks of kBlock elements. Short rows are processed several at a time, so that their noise, which comes from
// consecutive counters, is drawn in one sweep.
struct Tiling {
  int64_t size, counters_per_row, blocks, group, tasks;

  explicit Tiling(const Latents& args)
      : size(args.size),
        counters_per_row((args.size + 3) / 4),
        blocks((args.size + kBlock - 1) / kBlock),
        group(blocks == 1 ? kBlock / (4 * counters_per_row) : 1),
        tasks(blocks ? (args.rows + group - 1) / group * blocks : 0) {}
};

struct Tile {
  int64_t first_row, rows, begin, n, stride;  // stride: the distance between rows of the tile in a buffer

  Tile(const Tiling& tiling, const Latents& args, int64_t task)
      : first_row(task / tiling.blocks * tiling.group),
        rows(std::min(tiling.group, args.rows - first_row)),
        begin(task % tiling.blocks * kBlock),
        n(std::min(kBlock, args.size - begin)),
        stride(4 * tiling.counters_per_row) {}
};

template <class F>
void for_tiles(const Latents& args, const F& f, int64_t draws = 1) {
  const Tiling tiling(args);
  const int64_t work = 4 * tiling.group * std::min(args.size, kBlock) * draws;  // noise makes it four times the work of a likelihood
  at::parallel_for(0, tiling.tasks, grain(work), [&](int64_t first, int64_t last) { f(tiling, first, last); });
}

// The noise of a tile for draw k, either given by the user or drawn here.
template <class C>
class Noise {
 public:
  Noise(const Latents& args, const Tiling& tiling) : args_(args), tiling_(tiling) {}

  // `next` lists operands that are read for the same tile afterwards; they are prefetched while the noise is drawn.
  void draw(const Tile& tile, int64_t k, std::initializer_list<Operand> next) {
    given_ = shifted(args_.eps, k * args_.eps_draw_stride);
    if (given_.data) return;
    const uint64_t counter = (args_.key.row_offset + tile.first_row) * tiling_.counters_per_row + tile.begin / 4;
    const int64_t counters = tile.rows > 1 ? tile.rows * tiling_.counters_per_row : (tile.n + 3) / 4;
    const auto stride = static_cast<uint32_t>(tile.stride);
    normals(args_.key.seed, args_.key.offset / 4 + k, counter, counters, buffer_.data, [&](int64_t i, int64_t n) FASTVAE_INLINE {
      const int64_t row = tile.rows > 1 ? static_cast<uint32_t>(i) / stride : 0;
      for (const Operand& operand : next)
        if (operand.data) {
          const int64_t position = (tile.first_row + row) * operand.row_stride + tile.begin + i - row * tile.stride;
          prefetch(static_cast<const char*>(operand.data) + position * item_size(operand.type), n * item_size(operand.type));
        }
    });
  }

  const C* row(const Tile& tile, int64_t i) {
    if (given_.data) return load(given_, tile.first_row + i, tile.begin, tile.n, args_.size, buffer_);
    return buffer_.data + i * tile.stride;
  }

 private:
  const Latents& args_;
  const Tiling& tiling_;
  Operand given_;
  Buffer<C> buffer_;
};

// Calls f(index, lanes) for each vector of n elements. `lanes` is a compile-time constant except for an incomplete last vector.
template <class C, class F>
inline void for_lanes(int64_t n, const F& f) {
  constexpr int64_t W = Vec<C>::size();
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, whole_vector<Vec<C>>);
  if (i < n) f(i, n - i);
}

// Replaces the n numbers `v` of an encoder by log sigma^2 in `out`, which is returned, and writes the derivatives to `grads` unless that is
// null. Like the next two functions, it is not inlined: the kernels would have a loop for every form in every place.
template <class C>
__attribute__((noinline)) const C* log_variances(const ScaleForm& form, const C* v, int64_t n, C* out, C* grads) {
  using V = Vec<C>;
  if (!v) return v;
  math::with_log_variance<V>(form, [&](const auto& log_variance) FASTVAE_INLINE {
    for_lanes<C>(n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
      V x = load_lanes(v + j, lanes), grad(1);
      if (form.soft != 0) {
        const auto soft = math::soft_clamp(x, C(form.soft));
        x = soft.value;
        grad = soft.grad;
      }
      const math::LogVariance<V> of_x = log_variance(x);
      store_lanes(of_x.value, out + j, lanes);
      if (grads) store_lanes(grad * of_x.grad, grads + j, lanes);
    });
  });
  return out;
}

// The same for the n means `mu`, which only a soft clamp changes.
template <class C>
__attribute__((noinline)) const C* means(const ScaleForm& form, const C* mu, int64_t n, C* out, C* grads) {
  if (!mu || form.soft == 0) return mu;
  for_lanes<C>(n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
    const auto soft = math::soft_clamp(load_lanes(mu + j, lanes), C(form.soft));
    store_lanes(soft.value, out + j, lanes);
    if (grads) store_lanes(soft.grad, grads + j, lanes);
  });
  return out;
}

// Multiplies the gradients of n elements by the derivatives of the form.
template <class C>
__attribute__((noinline)) void chain(C* grads, const C* factors, int64_t n) {
  if (!grads) return;
  for_lanes<C>(n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
    store_lanes(math::chained(load_lanes(grads + j, lanes), load_lanes(factors + j, lanes)), grads + j, lanes);
  });
}

}  // namespace
}  // namespace fastvae::cpu::FASTVAE_ISA
