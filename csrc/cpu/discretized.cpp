// The discretised logistic and mixtures of it. The parameters are read in one pass, with one pixel in each lane of a vector. What the
// gradient needs of the K components is kept only for the pixels in progress, so that it stays in the L1 cache.
#include "../math/discretized.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

// One plane of consecutive pixels for each parameter.
template <class C>
struct Planes {
  C* data;
  int64_t stride;

  C* at(int64_t plane, int64_t pixel) const { return data + plane * stride + pixel; }
};

// Memory that will be needed soon. It is prefetched plane by plane between the arithmetic, because requesting all of it at once would
// stall the arithmetic, and only into the L2 cache, because the L1 cache has no room for it.
struct Ahead {
  const char* next;
  int64_t stride, bytes, planes;

  void fetch(int64_t count) {
    for (; count > 0 && planes > 0; --count, --planes, next += stride) prefetch<true>(next, bytes);
  }
};

template <class C>
struct Tile {
  Planes<const C> params;
  Planes<const C> data;  // one plane per channel, in half bins: 2 * level - levels
  Planes<C> grads;
  Planes<const C> weights;  // one plane per channel or, for a mixture, one for all; null data if there are no weights
  int64_t pixels;
  C weight;
  Ahead results, coming;  // where the gradients will be written, and the params of the next tile
};

template <class V>
math::Bins<V> bins_of(const LogisticArgs& args) {
  using C = typename math::Primitives<V>::Scalar;
  const auto all = [](double value) { return V(static_cast<C>(value)); };
  return {all(args.levels), all(1 / args.levels), all(std::log(2 / args.levels)), all(args.log_scale_floor), all(args.min_mass)};
}

// The planes are `channels` means followed by `channels` log-scales.
template <class C>
struct Single {
  using V = Vec<C>;
  static constexpr int64_t kPixels = kBlock, kTile = 128;
  static constexpr bool kInPlace = true;

  static int64_t planes(const LogisticArgs& args) { return 2 * args.channels; }

  using Two = math::Pack<V, 2>;

  explicit Single(const LogisticArgs& args) : bins(bins_of<V>(args)), all(bins_of<Two>(args)), channels(args.channels) {}

  template <bool kGrads>
  double nll(Tile<C>& tile) {
    using P = math::Primitives<V>;
    const V weight(-tile.weight);
    const bool weighs = tile.weights.data;
    Sum<C> sum;
    for (int64_t c = 0; c < channels; ++c) {
      math::Log1pSum<V> logs;
      V over(1);
      int count = 0;
      // Handles two vectors, the second of which starts `second` elements after the first. The last few elements have no second
      // vector and are computed twice.
      const auto step = [&](int64_t i, int64_t second, auto lanes) FASTVAE_INLINE {
        Two n, distance, log_scale;
        for (int k = 0; k < 2; ++k) {
          n.lane[k] = load_lanes(tile.data.at(c, i + k * second), lanes);
          distance.lane[k] = P::fnma(load_lanes(tile.params.at(c, i + k * second), lanes), bins.levels, n.lane[k]);
          log_scale.lane[k] = load_lanes(tile.params.at(channels + c, i + k * second), lanes);
        }
        const math::LogMass<Two> mass({n, all}, {distance, log_scale, all}, all);
        if constexpr (kGrads) {
          for (int k = 0; k < 2; ++k) {
            const V own = weighs ? weight * load_lanes(tile.weights.at(c, i + k * second), lanes) : weight;
            store_lanes(mass.by_middle.lane[k] * bins.levels * own, tile.grads.at(c, i + k * second), lanes);
            store_lanes(mass.by_log_scale.lane[k] * own, tile.grads.at(channels + c, i + k * second), lanes);
          }
        }
        return mass;
      };
      constexpr auto whole = whole_vector<V>;
      const auto value = [&](const math::LogMass<Two>& mass, int k) FASTVAE_INLINE {
        return mass.linear.lane[k] + P::log(mass.over.lane[k]) + P::log1p(mass.e.lane[k]);
      };
      int64_t i = 0;
      for (; i + 2 * whole <= tile.pixels; i += 2 * whole) {
        const auto mass = step(i, whole, whole);
        if (weighs) {
          for (int k = 0; k < 2; ++k) sum.add(k, value(mass, k) * load_lanes(tile.weights.at(c, i + k * whole), whole));
          continue;
        }
        for (int k = 0; k < 2; ++k) {
          logs.add(mass.e.lane[k], V(1) + mass.e.lane[k]);
          over = over * mass.over.lane[k];
          sum.add(k, mass.linear.lane[k]);
        }
        // `over` collects 8 factors of at most 5e3 each (5e7 in fp64), `logs` 62 of at most 4 each: see LogisticLogs.
        if (++count % 4 == 0) {
          sum.add(2, P::log(over));
          over = V(1);
        }
        if (count % 31 == 0) {
          sum.add(3, logs.value());
          logs = {};
        }
      }
      sum.add(2, P::log(over));
      sum.add(3, logs.value());
      while (i < tile.pixels) {
        const int64_t rest = std::min<int64_t>(whole, tile.pixels - i);
        const auto mass = step(i, 0, rest);
        sum.add_lanes(weighs ? value(mass, 0) * load_lanes(tile.weights.at(c, i), rest) : value(mass, 0), rest);
        i += rest;
      }
    }
    return sum.total();
  }

  math::Bins<V> bins;
  math::Bins<Two> all;
  int64_t channels;
};

// The planes are in the order of PixelCNN++: K logits, then for each channel K means, K log-scales and, if there are three channels, K
// coefficients. The coefficients are those of channel 0 in the mean of channel 1, of channel 0 in the mean of channel 2, and of
// channel 1 in the mean of channel 2.
template <class C, int kChannels>
struct Mixture {
  using V = Vec<C>;
  static constexpr int64_t kPixels = 256;  // pixels per task
  // Pixels staged at a time. In fp32, the input and output of a hundred planes of this many pixels take 25 KiB, which fits in the L1
  // cache.
  static constexpr int64_t kTile = 32;
  // The planes are copied, because planes in the caller's memory that are a power of two apart would compete for a few cache sets.
  static constexpr bool kInPlace = false;
  static constexpr int kBlocks = kChannels == 3 ? 3 : 2;
  // Planes to prefetch for each component of each vector: enough to cover all planes by the end of a tile.
  static constexpr int64_t kFetched = ((1 + kBlocks * kChannels) * V::size() + kTile - 1) / kTile;

  using Each = math::Pack<V, kChannels>;

  struct Component {
    V logit, linear, factor;  // the logit is relative to the pixel's highest
    V by_mean[kChannels], by_log_scale[kChannels], by_coefficient[3];  // derivatives of its log-mass, with means in half bins
  };

  static int64_t planes(const LogisticArgs& args) { return args.components * (1 + kBlocks * kChannels); }

  explicit Mixture(const LogisticArgs& args) : bins(bins_of<V>(args)), all(bins_of<Each>(args)), K(args.components), first(K), second(K) {}

  template <bool kGrads>
  double nll(Tile<C>& tile) {
    constexpr auto whole = whole_vector<V>;
    Sum<C> sum;
    int64_t i = 0;
    // Two vectors are processed at a time, so that work on the second can fill the wait for the last component of the first.
    for (; i + 2 * whole <= tile.pixels; i += 2 * whole) {
      const V top[2] = {look<kGrads>(tile, i, whole, first.data()), look<kGrads>(tile, i + whole, whole, second.data())};
      sum.add(0, finish<kGrads>(tile, i, whole, first.data(), top[0]));
      sum.add(1, finish<kGrads>(tile, i + whole, whole, second.data(), top[1]));
    }
    while (i < tile.pixels) {
      const int64_t rest = std::min<int64_t>(whole, tile.pixels - i);
      sum.add_lanes(finish<kGrads>(tile, i, rest, first.data(), look<kGrads>(tile, i, rest, first.data())), rest);
      i += rest;
    }
    return sum.total();
  }

  // Evaluates all components into `components` and returns the highest `linear`.
  template <bool kGrads, class Lanes>
  V look(Tile<C>& tile, int64_t i, Lanes lanes, Component* components) {
    Each n;
    for (int c = 0; c < kChannels; ++c) n.lane[c] = load_lanes(tile.data.at(c, i), lanes);
    const math::Level<Each> level(n, all);
    if (level.any_edge) return look<kGrads>(tile, i, lanes, components, level, std::true_type());
    return look<kGrads>(tile, i, lanes, components, level, std::false_type());
  }

  template <bool kGrads, class Lanes, class Bool>
  V look(Tile<C>& tile, int64_t i, Lanes lanes, Component* components, const math::Level<Each>& level, Bool any_edge) {
    using P = math::Primitives<V>;
    const Each& n = level.n;
    // `next` is the distance to the next component, `block` the distance to the next block of K planes. Advancing a few pointers takes
    // fewer instructions than computing the addresses of a hundred planes.
    const int64_t next = tile.params.stride, block = K * next;
    const C* logits = tile.params.at(0, i);
    V top_logit = load_lanes(logits, lanes), top;
    for (int64_t k = 1; k < K; ++k) top_logit = P::at_least(top_logit, load_lanes(logits + k * next, lanes));
    const C* of[kChannels];
    for (int c = 0; c < kChannels; ++c) of[c] = logits + (1 + kBlocks * c) * block;
    for (int64_t k = 0; k < K; ++k) {
      if constexpr (kGrads) tile.results.fetch(kFetched);
      tile.coming.fetch(kFetched);
      Component& component = components[k];
      component.logit = load_lanes(logits, lanes) - top_logit;
      logits += next;
      component.linear = component.logit;
      component.factor = V(1);
      Each distance, log_scale, coefficient;
      for (int c = 0; c < kChannels; ++c) {
        distance.lane[c] = P::fnma(load_lanes(of[c], lanes), bins.levels, n.lane[c]);
        log_scale.lane[c] = load_lanes(of[c] + block, lanes);
        if constexpr (kChannels == 3) coefficient.lane[c] = load_lanes(of[c] + 2 * block, lanes);
        of[c] += next;
      }
      const math::Tanh<Each, false> tanh(coefficient);
      if constexpr (kChannels == 3) {
        distance.lane[1] = P::fnma(tanh.value.lane[0], n.lane[0], distance.lane[1]);
        distance.lane[2] = P::fnma(tanh.value.lane[2], n.lane[1], P::fnma(tanh.value.lane[1], n.lane[0], distance.lane[2]));
      }
      const math::LogMass<Each> mass(level, {distance, log_scale, all}, all, any_edge);
      for (int c = 0; c < kChannels; ++c) {
        component.linear = component.linear - mass.linear.lane[c];
        component.factor = component.factor * mass.one_over.lane[c];
        if constexpr (kGrads) {
          component.by_mean[c] = mass.by_middle.lane[c];
          component.by_log_scale[c] = mass.by_log_scale.lane[c];
        }
      }
      if constexpr (kGrads && kChannels == 3) {
        component.by_coefficient[0] = mass.by_middle.lane[1] * n.lane[0] * tanh.grad.lane[0];
        component.by_coefficient[1] = mass.by_middle.lane[2] * n.lane[0] * tanh.grad.lane[1];
        component.by_coefficient[2] = mass.by_middle.lane[2] * n.lane[1] * tanh.grad.lane[2];
      }
      top = k == 0 ? component.linear : P::at_least(top, component.linear);
    }
    return top;
  }

  // Writes the gradients, from what `look` left in `components`, and returns the nll.
  template <bool kGrads, class Lanes>
  V finish(Tile<C>& tile, int64_t i, Lanes lanes, Component* components, V top) {
    using P = math::Primitives<V>;
    const int64_t block = K * tile.grads.stride;
    V weights(0), masses(0);  // the sums of e^logit and of e^(linear - top) * factor
    for (int64_t k = 0; k < K; ++k) {
      Component& component = components[k];
      component.logit = P::exp_bounded(component.logit);
      component.factor = component.factor * P::exp_bounded(component.linear - top);
      weights = weights + component.logit;
      masses = masses + component.factor;
    }
    V value = (weights / masses).log() - top, weight(tile.weight);
    if (tile.weights.data) {
      const V own = load_lanes(tile.weights.at(0, i), lanes);
      value = value * own;
      weight = weight * own;
    }

    if constexpr (kGrads) {
      const V prior = weight / weights, posterior = weight / masses;
      for (int64_t k = 0; k < K; ++k) {
        const Component& component = components[k];
        const V share = P::neg(component.factor * posterior), by_mean = share * bins.levels;
        C* to = tile.grads.at(k, i);
        store_lanes(P::fma(component.logit, prior, share), to, lanes);
        to += block;
        for (int c = 0; c < kChannels; ++c, to += kBlocks * block) {
          store_lanes(component.by_mean[c] * by_mean, to, lanes);
          store_lanes(component.by_log_scale[c] * share, to + block, lanes);
          if constexpr (kChannels == 3) store_lanes(component.by_coefficient[c] * share, to + 2 * block, lanes);
        }
      }
    }
    return value;
  }

  math::Bins<V> bins;
  math::Bins<Each> all;
  int64_t K;
  std::vector<Component> first, second;  // the components of the two vectors in progress
};

// This replaces one memcpy per plane, which would spend more time on the call than on the copy.
template <int64_t kTile, class C>
void copy_tile(const C* from, int64_t from_stride, C* to, int64_t to_stride, int64_t planes) {
  for (; planes > 0; --planes, from += from_stride, to += to_stride)
    for (int64_t i = 0; i < kTile; i += Vec<C>::size()) Vec<C>::loadu(from + i).store(to + i);
}

// Copies pixels [begin, begin + n) of a row into planes. In the source the planes are stored one after another or, in channels_last
// layout, interleaved.
template <class Model, class C>
void gather(const Operand& view, int64_t row, int64_t begin, int64_t n, int64_t planes, int64_t pixels, bool alternate, C* out,
            C* line) {
  constexpr int64_t kTile = Model::kTile;
  if (!alternate && n == kTile && view.type == dtype_of<C>()) {
    copy_tile<kTile>(static_cast<const C*>(view.data) + row * view.row_stride + begin, pixels, out, kTile, planes);
    return;
  }
  if (!alternate) {
    for (int64_t p = 0; p < planes; ++p)
      convert_in(view.data, view.type, row * view.row_stride + p * pixels + begin, out + p * kTile, n);
    return;
  }
  const int64_t start = row * view.row_stride + begin * planes;
  for (int64_t i = 0; i < n; ++i) {
    convert_in(view.data, view.type, start + i * planes, line, planes);
    for (int64_t p = 0; p < planes; ++p) out[p * kTile + i] = line[p];
  }
}

template <class Model, class C>
void scatter(const C* in, const Result& view, int64_t row, int64_t begin, int64_t n, int64_t planes, int64_t pixels,
             bool alternate, C* line) {
  constexpr int64_t kTile = Model::kTile;
  if (!alternate && n == kTile && view.type == dtype_of<C>()) {
    copy_tile<kTile>(in, kTile, static_cast<C*>(view.data) + row * view.row_stride + begin, pixels, planes);
    return;
  }
  if (!alternate) {
    for (int64_t p = 0; p < planes; ++p)
      convert_out(in + p * kTile, view.data, view.type, row * view.row_stride + p * pixels + begin, n);
    return;
  }
  const int64_t start = row * view.row_stride + begin * planes;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t p = 0; p < planes; ++p) line[p] = in[p * kTile + i];
    convert_out(line, view.data, view.type, start + i * planes, planes);
  }
}

// Converts levels to half bins. Levels above the highest count as the highest.
template <class C>
void half_bins(const Operand& view, int64_t row, int64_t begin, int64_t n, int64_t channels, int64_t pixels, bool alternate,
               int levels, int64_t stride, C* out) {
  const uint8_t* in = static_cast<const uint8_t*>(view.data) + row * view.row_stride;
  for (int64_t c = 0; c < channels; ++c) {
    const uint8_t* first = alternate ? in + begin * channels + c : in + c * pixels + begin;
    const int64_t step = alternate ? channels : 1;
    for (int64_t i = 0; i < n; ++i) out[c * stride + i] = static_cast<C>(2 * std::min<int>(first[i * step], levels) - levels);
  }
}

// Replaces the params of what has the weight 0 by 0, so that its value and its derivatives are finite. Plane p has the weights of plane
// p % weight_planes.
template <class C>
void leave_out(const C* weights, int64_t weight_planes, int64_t n, int64_t stride, C* params, int64_t planes) {
  for (int64_t p = 0; p < planes; ++p) {
    const C* weight = weights + p % weight_planes * stride;
    C* to = params + p * stride;
    for (int64_t i = 0; i < n; ++i) to[i] = weight[i] == C(0) ? C(0) : to[i];
  }
}

template <class View>
Ahead ahead(const View& view, int64_t row, int64_t begin, int64_t n, int64_t planes, int64_t pixels) {
  const int64_t width = item_size(view.type);
  return {static_cast<const char*>(view.data) + (row * view.row_stride + begin) * width, pixels * width, n * width, planes};
}

template <class C, class Model>
void run(const LogisticArgs& args) {
  constexpr int64_t kTile = Model::kTile;
  const int64_t planes = Model::planes(args);
  const int64_t blocks = (args.pixels + Model::kPixels - 1) / Model::kPixels, tasks = args.rows * blocks;
  const bool wanted = args.grads.data != nullptr, weighs = args.weights.data;
  const auto dense = [&](const auto& view) { return Model::kInPlace && !args.alternate && view.type == dtype_of<C>() && !weighs; };
  const int64_t weight_planes = args.components ? 1 : args.channels;
  std::vector<double> sums(tasks);

  at::parallel_for(0, tasks, grain(std::min(args.pixels, Model::kPixels) * planes), [&](int64_t first, int64_t last) {
    Model model(args);
    std::vector<C> params(dense(args.params) ? 0 : planes * kTile), grads(!wanted || dense(args.grads) ? 0 : planes * kTile);
    std::vector<C> data(args.channels * kTile), line(args.alternate ? planes : 0), weights(weighs ? weight_planes * kTile : 0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / blocks, end = std::min(args.pixels, (task % blocks + 1) * Model::kPixels);
      double sum = 0;
      for (int64_t begin = task % blocks * Model::kPixels; begin < end; begin += kTile) {
        const int64_t n = std::min(kTile, end - begin);
        Tile<C> tile{{params.data(), kTile}, {data.data(), kTile}, {grads.data(), kTile}, {}, n, 0, {}, {}};
        tile.weight = static_cast<C>(args.weight[row * args.weight_stride]);
        if (dense(args.params))
          tile.params = {static_cast<const C*>(args.params.data) + row * args.params.row_stride + begin, args.pixels};
        else
          gather<Model>(args.params, row, begin, n, planes, args.pixels, args.alternate, params.data(), line.data());
        if (!dense(args.params) && !args.alternate && (end > begin + kTile || task + 1 < last)) {
          const bool here = end > begin + kTile;
          const int64_t next_row = here ? row : (task + 1) / blocks, next = here ? begin + kTile : (task + 1) % blocks * Model::kPixels;
          tile.coming = ahead(args.params, next_row, next, std::min(kTile, args.pixels - next), planes, args.pixels);
        }
        if (weighs) {
          for (int64_t c = 0; c < weight_planes; ++c)
            read(args.weights, target_row(args, row), c * args.pixels + begin, n, weights.data() + c * kTile);
          tile.weights = {weights.data(), kTile};
          leave_out(weights.data(), weight_planes, n, kTile, params.data(), planes);
        }
        half_bins(args.target, target_row(args, row), begin, n, args.channels, args.pixels, args.alternate, int(args.levels), kTile, data.data());
        if (!wanted) {
          sum += model.template nll<false>(tile);
          continue;
        }
        const bool there = dense(args.grads);
        if (there) tile.grads = {static_cast<C*>(args.grads.data) + row * args.grads.row_stride + begin, args.pixels};
        else if (!args.alternate) tile.results = ahead(args.grads, row, begin, n, planes, args.pixels);
        sum += model.template nll<true>(tile);
        if (!there) scatter<Model>(grads.data(), args.grads, row, begin, n, planes, args.pixels, args.alternate, line.data());
      }
      sums[task] = sum;
    }
  });

  for (int64_t row = 0; row < args.rows; ++row) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += sums[row * blocks + b];
    args.row_nll[row] = sum;
  }
}

template <class C>
void run(const LogisticArgs& args) {
  if (args.components == 0) run<C, Single<C>>(args);
  else if (args.channels == 3) run<C, Mixture<C, 3>>(args);
  else run<C, Mixture<C, 1>>(args);
}

}  // namespace

void discretized_logistic(const LogisticArgs& args) { args.in_double ? run<double>(args) : run<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
