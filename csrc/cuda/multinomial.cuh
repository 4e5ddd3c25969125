// The multinomial. One launch computes the nll of each row, the loss and, where wanted, the gradient. csrc/cpu/multinomial.cpp has the
// formula: the nll of a row is that of Poisson counts with the means n softmax(logits), given their sum n.
//
// A row is read twice, the second time from the cache. First it gives its sums: the exponentials of its logits and the counts. Then
// follow the gradient of every logit and the terms of the counts above 0. Where rows are short, a warp takes a row, and otherwise a block.
// If there are so few rows that blocks would be idle, a block takes a part of a row: blocks take the items of a list in order, with a
// counter, first the sums of all parts, then what needs the sums of rows. A block whose item is of the second kind waits until all sums
// are there. They have all been taken, by blocks that are running, so it cannot wait for ever.
//
// Most counts are zeros, whose term and gradient follow from an exponential in the compute type. The others are listed and occupy the lanes
// of a warp one after the other: small whole counts are computed in the compute type, and the rest, whose terms cancel, in fp64.
#pragma once
#include "count_segments.cuh"
#include "rows.cuh"
#include "softmax.cuh"

namespace fastvae::cuda {

template <class C>
constexpr int multinomial_resident() {
  return sizeof(C) == 8 ? 1 : 2;
}
constexpr int kShort = 8;  // the segments of the longest rows that single warps take

struct MultinomialPlan {
  bool of_warps;                         // whether each warp takes a row
  int64_t rows_each, segments, parts;    // the rows of an item, if warps take them; the segments and the parts of a row
  int64_t part_segments, warp_segments;  // the segments of a part, and those of them that one warp takes
  uint32_t first, items;                 // items before the second kind, and all
  int64_t of_lists, of_losses, bytes;    // offsets in the scratch
  int blocks;
  bool wide;
};

// The logits of counts above 0 and of zeros are clamped to these, because inf - inf would be NaN. A lane that has none starts at `kNone`.
constexpr double kNone = -3e38, kLowest = -2.99e38, kHighest = 2.99e38;

// The larger of two numbers, of which the second may be NaN.
FASTVAE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
FASTVAE_DEVICE double larger(double a, double b) { return fmax(a, b); }

// Sums over elements of a row.
template <class C>
struct alignas(16) RowSums {
  double n = 0;                // of the counts
  double own = 0, others = 0;  // the weighted count of the feature at `place`, and the sum of the others
  int64_t place = -1;          // the likeliest of the features with a count above 0
  Scaled<C> zeros;             // the exponentials of the features with a count of 0
  C top = C(kNone), rest = 0;  // the logit at `place`; the sum of exp(logit - top) over the other features with a count above 0
};

// Reads the sums that another block has written.
template <class C>
FASTVAE_DEVICE RowSums<C> written_sums(const RowSums<C>* from) {
  RowSums<C> sums;
  sums.n = load_written(&from->n);
  sums.own = load_written(&from->own);
  sums.others = load_written(&from->others);
  sums.place = load_written(&from->place);
  sums.zeros.top = load_written(&from->zeros.top);
  sums.zeros.sum = load_written(&from->zeros.sum);
  sums.top = load_written(&from->top);
  sums.rest = load_written(&from->rest);
  return sums;
}

// Adds up `count` sums, of which load(i) returns one, as the threads of a warp, and returns the total to all of them.
template <class C, class F>
FASTVAE_DEVICE RowSums<C> total_of_sums(int64_t count, const F& load) {
  using P = math::Primitives<C>;
  const auto warp_max = [](C x) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const C other = __shfl_xor_sync(0xffffffff, x, offset);
      x = x < other ? other : x;
    }
    return x;
  };
  const int lane = threadIdx.x % kWarp;
  RowSums<C> total;
  for (int64_t i = lane; i < count; i += kWarp) {
    const RowSums<C> one = load(i);
    total.zeros.top = total.zeros.top < one.zeros.top ? one.zeros.top : total.zeros.top;
    if (total.top < one.top) total.top = one.top, total.place = one.place;  // the first of equal ones has the lowest place
  }
  const C own_top = total.top;
  total.top = warp_max(own_top);
  total.zeros.top = warp_max(total.zeros.top);
  int64_t place = own_top == total.top && total.place >= 0 ? total.place : INT64_MAX;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffff, place, offset);
    place = other < place ? other : place;
  }
  total.place = place == INT64_MAX ? -1 : place;
  for (int64_t i = lane; i < count; i += kWarp) {
    const RowSums<C> one = load(i);
    const bool is_top = one.place >= 0 && one.place == total.place, is_other = one.place >= 0 && !is_top;
    total.n += one.n;
    total.others += is_other ? one.others + one.own : one.others;
    total.own += is_top ? one.own : 0;
    total.rest = P::fma(one.rest + (is_other ? C(1) : C(0)), P::exp(one.top - total.top), total.rest);
    total.zeros.sum = P::fma(one.zeros.sum, P::exp(one.zeros.top - total.zeros.top), total.zeros.sum);
  }
  total.n = warp_sum(total.n);
  total.others = warp_sum(total.others);
  total.own = warp_sum(total.own);
  total.rest = warp_sum(total.rest);
  total.zeros.sum = warp_sum(total.zeros.sum);
  return total;
}

// What the elements of a row need. The mean of a count is scale * exp(logit - top).
template <class C>
struct alignas(16) RowNumbers {
  bool empty;  // without counts the nll is 0, whatever the logits are, but a NaN must not go unseen
  C nothing;   // the gradient and the nll of such a row
  C top, factor_of_zeros;
  int64_t place;  // see RowSums
  double n, log_n, scale, log_offset, mean_weight, factor;
  double own_grad;  // the derivative at `place`
  double zeros;     // the nll of all zeros

  FASTVAE_DEVICE RowNumbers(const RowSums<C>& sums, double row_weight) {
    empty = sums.n == 0;
    nothing = sums.zeros.sum == sums.zeros.sum ? C(0) : C(NAN);
    top = sums.zeros.top < sums.top ? sums.top : sums.zeros.top;
    place = sums.place;
    n = sums.n;
    factor = row_weight;
    const double own = place < 0 ? 0 : ::exp(static_cast<double>(sums.top) - static_cast<double>(top));
    const double of_zeros = static_cast<double>(sums.zeros.sum) * ::exp(static_cast<double>(sums.zeros.top) - static_cast<double>(top));
    // The likeliest of the counted features is left out of `rest`. If it has nearly all of the probability, its nll and its derivative
    // follow from the little that is left for the others.
    const double rest = of_zeros + static_cast<double>(sums.rest) * own, sum = rest + own;
    const double total = top > C(kLowest) && top < C(kHighest) && n == n ? sum : NAN;
    const double weighted_n = sums.others + sums.own;
    mean_weight = weighted_n / n;
    scale = n / total;
    log_n = ::log(n);
    log_offset = log_n - ::log(total);
    own_grad = factor * (sums.others * (own / total) - sums.own * (rest / total));
    zeros = weighted_n * (of_zeros / total);
    factor_of_zeros = static_cast<C>(factor * weighted_n / total);
  }
};

template <class C>
struct MultinomialScratch {
  RowSums<C>* sums;  // of each row and part, if rows have several; the nlls of the parts follow
  double* totals;
  // Of each row and segment: if the target is dense, kWarp bytes with the bits of list_others, one of each lane; otherwise the first of the
  // segment's positions, and the one after its last.
  char* lists;
  double* losses;  // of each item

  FASTVAE_DEVICE MultinomialScratch(const CountArgs& args, const MultinomialPlan& plan) {
    char* bytes = computed_here(static_cast<char*>(args.workspace.scratch));
    sums = reinterpret_cast<RowSums<C>*>(bytes);
    totals = reinterpret_cast<double*>(sums + args.rows * plan.parts);
    lists = bytes + plan.of_lists;
    losses = reinterpret_cast<double*>(bytes + plan.of_losses);
  }
};

// A row, as the threads of one warp see it, of which they process a segment at a time.
template <class T, bool kWeighted>
struct MultinomialRow {
  using C = Compute<T>;
  const CountArgs& args;
  bool wide;
  int64_t row, source;
  uint8_t* list;  // in shared memory
  const T* row_logits;
  const char* row_target;  // all values of a sparse target
  char* row_lists;         // see MultinomialScratch

  // What follows belongs to the current segment.
  int64_t begin = 0;
  int count = 0;
  const T* logits = nullptr;
  const char* target = nullptr;
  char* of_scratch = nullptr;

  FASTVAE_DEVICE MultinomialRow(const CountArgs& args, const MultinomialPlan& plan, char* lists, uint8_t* list, int64_t row)
      : args(args), wide(plan.wide), row(row), source(cpu::target_row(args, row)), list(list) {
    row_logits = static_cast<const T*>(args.params[0].data) + row * args.params[0].row_stride;
    row_target = static_cast<const char*>(args.target.data);
    if (!args.starts) row_target += source * args.target.row_stride * cpu::item_size(args.target.type);
    row_lists = lists + row * plan.segments * kWarp;
  }
  FASTVAE_DEVICE void go_to(int64_t segment) {
    begin = segment * kSegment;
    count = static_cast<int>(begin + kSegment < args.size ? kSegment : args.size - begin);
    logits = row_logits + begin;
    target = args.starts ? row_target : row_target + begin * cpu::item_size(args.target.type);
    of_scratch = row_lists + segment * kWarp;
  }
  FASTVAE_DEVICE Some some(int g) const {
    const int left = count - g;
    return {wide, left < 0 ? 0 : left < kQuad ? left : kQuad};
  }
  FASTVAE_DEVICE C weight(int g) const { return kWeighted ? weight_of<C>(args.weights, source, begin + g) : C(1); }
  FASTVAE_DEVICE C logit(int g) const { return static_cast<C>(load_one(logits + g)); }
  FASTVAE_DEVICE double count_at(int64_t i) const { return load_count<double>(target, args.target.type, i); }

  // Adds the segment to the sums of this lane.
  FASTVAE_DEVICE void add_to(RowSums<C>& sums, uint32_t* bits) const {
    using P = math::Primitives<C>;
    const int lane = threadIdx.x % kWarp;
    const bool sparse = args.starts;
    C x[kQuads][kQuad], t[kQuads][kQuad];
#pragma unroll
    for (int u = 0; u < kQuads; ++u) {
      const int g = kQuad * (u * kWarp + lane);
      load_quad(logits + g, some(g), C(-INFINITY), x[u]);
    }
    if (!sparse) {
      with_count_type(args.target.type, [&](auto* as) {
#pragma unroll
        for (int u = 0; u < kQuads; ++u) {
          const int g = kQuad * (u * kWarp + lane);
          load_quad(reinterpret_cast<decltype(as)>(target) + g, some(g), C(0), t[u]);
        }
      });
    }
    Stored stored;
    if (sparse) {
      stored = Stored(args, source, begin, count, bits);
      if (!stored.valid) sums.n = NAN;
      if (lane == 0) reinterpret_cast<int64_t*>(of_scratch)[0] = stored.first, reinterpret_cast<int64_t*>(of_scratch)[1] = stored.last;
    }
    uint32_t others = 0;
    C top = sums.zeros.top;
#pragma unroll
    for (int u = 0; u < kQuads; ++u) {
      const int g = kQuad * (u * kWarp + lane);
      uint32_t of_quad = 0;
      if (sparse) {
        of_quad = bits[g / 32] >> g % 32 & 15;
      } else {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) of_quad |= t[u][j] == C(0) ? 0 : 1u << j;
      }
      uint32_t removed = of_quad;  // from the sum of exponentials
      if constexpr (kWeighted) {
        uint32_t without_weight = 0;
#pragma unroll
        for (int j = 0; j < kQuad; ++j)
          if (g + j < count && weight(g + j) == C(0)) without_weight |= 1u << j;
        removed |= without_weight;
        of_quad &= ~without_weight;
      }
      others |= of_quad << kQuad * u;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        x[u][j] = removed >> j & 1 ? C(-INFINITY) : x[u][j];
        top = larger(top, x[u][j]);
      }
    }
    top = top < C(kHighest) ? top : C(kHighest);
    C more(0);
#pragma unroll
    for (int u = 0; u < kQuads; ++u)
#pragma unroll
      for (int j = 0; j < kQuad; ++j) more += P::exp_bounded(x[u][j] - top);
    sums.zeros.sum = P::fma(sums.zeros.sum, P::exp(sums.zeros.top - top), more);
    sums.zeros.top = top;

    int listed = static_cast<int>(stored.last - stored.first);
    if (!sparse) {
      reinterpret_cast<uint8_t*>(of_scratch)[lane] = static_cast<uint8_t>(others);
      listed = __ballot_sync(0xffffffff, others != 0) ? list_others(others, list) : 0;
      __syncwarp();
    }
#pragma unroll 1
    for (int i = lane; i < listed; i += kWarp) {
      const int g = sparse ? static_cast<int>(args.columns[stored.first + i] - begin) : list[i];
      const double count = count_at(sparse ? stored.first + i : g);
      const C own = weight(g);
      if (count == 0 || own == C(0)) continue;
      const double weighted = kWeighted ? count * static_cast<double>(own) : count;
      C a = logit(g);
      a = a < C(kLowest) ? C(kLowest) : a > C(kHighest) ? C(kHighest) : a;
      const C difference = a - sums.top, e = P::exp(P::neg_abs(difference));
      sums.n += count;
      if (difference > C(0)) {
        sums.rest = P::fma(sums.rest, e, e);
        sums.others += sums.own;
        sums.own = weighted;
        sums.top = a;
        sums.place = begin + g;
      } else {
        sums.rest += e;
        sums.others += weighted;
      }
    }
    __syncwarp();
  }

  // Writes the gradient and returns the nll of this lane's counts above 0.
  FASTVAE_DEVICE double finish(const RowNumbers<C>& of_row) const {
    using P = math::Primitives<C>;
    const int lane = threadIdx.x % kWarp;
    const bool sparse = args.starts, wants_grad = args.grads[0].data;
    const int64_t cell = row * args.size + begin;
    const bool empty = of_row.empty;
    if (wants_grad) {
      const C nothing = of_row.nothing, top = of_row.top, factor = of_row.factor_of_zeros;
      C x[kQuads][kQuad];
#pragma unroll
      for (int u = 0; u < kQuads; ++u) {
        const int g = kQuad * (u * kWarp + lane);
        load_quad(logits + g, some(g), C(0), x[u]);
      }
#pragma unroll
      for (int u = 0; u < kQuads; ++u) {
        const int g = kQuad * (u * kWarp + lane);
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          x[u][j] = empty ? nothing : P::exp_bounded(x[u][j] - top) * factor;
          if (kWeighted && g + j < count && weight(g + j) == C(0)) x[u][j] = C(0);
        }
        store_quad<To<T, true>>(args.grads[0], cell + g, some(g), x[u]);
      }
    }
    if (empty) return 0;

    int64_t first = 0;
    int listed;
    if (sparse) {
      first = load_written(reinterpret_cast<const int64_t*>(of_scratch));
      listed = static_cast<int>(load_written(reinterpret_cast<const int64_t*>(of_scratch) + 1) - first);
    } else {
      const uint32_t others = load_written(reinterpret_cast<const uint8_t*>(of_scratch) + lane);
      listed = __ballot_sync(0xffffffff, others != 0) ? list_others(others, list) : 0;
    }
    __syncwarp();  // also orders the stores above before those below, by other lanes
    const auto place_of = [&](int i) { return sparse ? static_cast<int>(args.columns[first + i] - begin) : int(list[i]); };
    const auto write = [&](int g, C grad) {
      if (wants_grad) store_one<To<T, true>>(args.grads[0], cell + g, grad);
    };
    double sum = 0;
    int rest = listed;
    if constexpr (sizeof(C) == 4) {
      rest = 0;  // entries that are left for fp64 move to the front of the list
      const float scale = static_cast<float>(of_row.scale), mean_weight = static_cast<float>(of_row.mean_weight);
      // The rounding of the offset would be an error of the whole row, so that a second number has what the first one lacks.
      const float offset = static_cast<float>(of_row.log_offset);
      const float lacks = static_cast<float>(of_row.log_offset - static_cast<double>(offset));
      const float factor = static_cast<float>(of_row.factor);
      float values = 0;
#pragma unroll 1
      for (int base = 0; base < listed; base += kWarp) {
        const int i = base + lane;
        bool left = false;
        int entry = 0;
        if (i < listed) {
          const int g = place_of(i);
          entry = sparse ? i : g;
          const double count = count_at(sparse ? first + i : g);
          const float t = static_cast<float>(count);
          left = begin + g == of_row.place || !(t < 8.0f) || !(t >= 1.0f) || truncf(t) != t;
          const float own = weight(g);
          if (count == 0 || own == 0.0f) {
            left = false;
          } else if (!left) {
            const float difference = logit(g) - of_row.top, mu = P::exp(difference) * scale, log_mu = difference + offset + lacks;
            float factorial = 1;
#pragma unroll 1
            for (float k = 2; k <= t; ++k) factorial *= k;
            float value = P::fma(-t, log_mu, mu) + logf(factorial);
            // The terms are those of a row in which every count has the mean weight, and what the count's own weight changes.
            if constexpr (kWeighted) value = P::fma(value, own, (own - mean_weight) * (t - mu));
            values += value;
            write(g, factor * (kWeighted ? P::fma(mu, mean_weight, -t * own) : mu - t));
          }
        }
        const uint32_t all = __ballot_sync(0xffffffff, left);
        __syncwarp();
        if (left) list[rest + __popc(all & ((1u << lane) - 1))] = static_cast<uint8_t>(entry);
        rest += __popc(all);
        __syncwarp();
      }
      sum = values;
    }
    // Where one feature has all counts, its term and that of the sum n cancel to the last bit, because the same instructions compute them.
    const bool has_place = of_row.place >= begin && of_row.place < begin + count;
#pragma unroll 1
    for (int i = lane; i < rest + has_place; i += kWarp) {
      double t = of_row.n, mu = t, log_mu = of_row.log_n, own = -of_row.mean_weight, grad = 0;
      int g = -1;
      if (i < rest) {
        const int entry = sizeof(C) == 4 && sparse ? list[i] : i;
        g = sizeof(C) == 4 && !sparse ? list[i] : place_of(entry);
        t = count_at(sparse ? first + entry : g);
        own = static_cast<double>(weight(g));
        if (t == 0 || own == 0) continue;
        const double difference = static_cast<double>(logit(g)) - static_cast<double>(of_row.top);
        mu = ::exp(difference) * of_row.scale;
        log_mu = difference + of_row.log_offset;
        grad = begin + g == of_row.place ? of_row.own_grad : of_row.factor * (mu * of_row.mean_weight - t * own);
      }
      double value;
      if (t < math::kStirlingFrom) value = mu - t * log_mu + math::gamma_parts(t + 1).log_gamma;
      else value = math::poisson_large(t, mu, log_mu);
      value *= own;
      if (kWeighted && g >= 0) value += (own - of_row.mean_weight) * (t - mu);
      sum += value;
      if (g >= 0) write(g, static_cast<C>(grad));
    }
    __syncwarp();
    return sum;
  }
};

template <class T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, multinomial_resident<Compute<T>>())
    multinomial_kernel(const __grid_constant__ CountArgs args, const __grid_constant__ MultinomialPlan plan) {
  using C = Compute<T>;
  FASTVAE_SHARED(uint8_t, lists, kWarps * kSegment);
  FASTVAE_SHARED(uint32_t, all_bits, kWarps * kSegment / 32);
  FASTVAE_SHARED(Quad<float>, memory, kWarps * sizeof(RowSums<C>) / sizeof(Quad<float>));
  FASTVAE_SHARED(Quad<float>, more_memory, kWarps * sizeof(RowNumbers<C>) / sizeof(Quad<float>));
  FASTVAE_SHARED(double, losses, kWarps);
  FASTVAE_SHARED(uint32_t, number, 2);
  auto* of_warps = reinterpret_cast<RowSums<C>*>(memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint8_t* list = lists + warp * kSegment;
  uint32_t* bits = all_bits + warp * (kSegment / 32);
  uint32_t *taken = args.workspace.counter, *done = args.workspace.counter + 1;

  while (true) {
    if (threadIdx.x == 0) number[0] = take_number(taken, plan.items + gridDim.x - 1);
    __syncthreads();
    const uint32_t item = number[0];
    if (item >= plan.items) break;
    const MultinomialScratch<C> scratch(args, plan);
    // The rows of this warp, and the segments of each.
    int64_t row, last_row, first = 0, last = plan.segments;
    const bool is_second = item >= plan.first, split = plan.parts > 1;
    uint32_t part = 0;
    if (plan.of_warps) {
      row = item * plan.rows_each + warp;
      last_row = (item + 1) * plan.rows_each < args.rows ? (item + 1) * plan.rows_each : args.rows;
    } else {
      const uint32_t own = split && is_second ? item - plan.first : item;
      row = own / static_cast<uint32_t>(plan.parts);
      last_row = row + 1 < args.rows ? row + 1 : args.rows;
      part = own - static_cast<uint32_t>(row) * static_cast<uint32_t>(plan.parts);
      const int64_t end = (part + 1) * plan.part_segments;
      first = part * plan.part_segments + warp * plan.warp_segments;
      last = first + plan.warp_segments < end ? first + plan.warp_segments : end;
      last = last < plan.segments ? last : plan.segments;
    }
    if (split && is_second) wait_for(done, plan.first);
    double loss = 0;
#pragma unroll 1
    for (; row < last_row; row += kWarps) {
      MultinomialRow<T, kWeighted> here(args, plan, scratch.lists, list, row);
      RowSums<C> sums;
      if (!split || !is_second) {
#pragma unroll 1
        for (int64_t segment = first; segment < last; ++segment) {
          here.go_to(segment);
          here.add_to(sums, bits);
        }
        const RowSums<C> mine = sums;
        sums = total_of_sums<C>(kWarp, [&](int64_t) { return mine; });
        if (!plan.of_warps) {
          if (lane == 0) of_warps[warp] = sums;
          __syncthreads();
          sums = total_of_sums<C>(kWarps, [&](int64_t i) { return of_warps[i]; });
        }
        if (split) {
          if (threadIdx.x == 0) scratch.sums[item] = sums;
          continue;
        }
      } else {
        sums = total_of_sums<C>(plan.parts, [&](int64_t i) { return written_sums(scratch.sums + row * plan.parts + i); });
      }
      RowNumbers<C>& of_row = reinterpret_cast<RowNumbers<C>*>(more_memory)[warp];
      if (lane == 0) of_row = RowNumbers<C>(sums, weight_of_row<double>(args, row));
      __syncwarp();
      double value = 0;
#pragma unroll 1
      for (int64_t segment = first; segment < last; ++segment) {
        here.go_to(segment);
        value += here.finish(of_row);
      }
      value = warp_sum(value);
      if (!plan.of_warps) {
        if (lane == 0) losses[warp] = value;
        __syncthreads();
        for (int i = 1; threadIdx.x == 0 && i < kWarps; ++i) value += losses[i];
      }
      if (lane != 0 || (warp != 0 && !plan.of_warps)) continue;
      if (part == 0) value = of_row.empty ? static_cast<double>(of_row.nothing) : value + of_row.zeros;
      if (split) scratch.totals[item - plan.first] = value;
      else if (args.loss.data) loss += put_row(args, row, value, beta_of(args) * kl_of(args, row));
    }
    if (!split && args.loss.data) {
      __syncthreads();
      if (lane == 0) losses[warp] = loss;
      __syncthreads();
      for (int i = 1; threadIdx.x == 0 && i < kWarps; ++i) loss += losses[i];
      if (threadIdx.x == 0) scratch.losses[item] = loss;
    }
    __syncthreads();
    if (threadIdx.x == 0) number[1] = take_number(done, plan.items - 1);
    __syncthreads();
    if (number[1] != plan.items - 1 || !args.loss.data) continue;
    loss = 0;
    if (split) {
      int lanes = 1;
      while (lanes < kWarp && lanes < plan.parts) lanes *= 2;
      for (int64_t base = 0; base < args.rows; base += kThreads / lanes) {
        const int64_t own = base + threadIdx.x / lanes;
        const double* totals = scratch.totals + own * plan.parts;
        double value = 0;
        for (int64_t i = threadIdx.x % lanes; own < args.rows && i < plan.parts; i += lanes) value += load_written(totals + i);
        value = group_sum(value, lanes, losses);
        if (threadIdx.x % lanes == 0 && own < args.rows) loss += put_row(args, own, value, beta_of(args) * kl_of(args, own));
      }
      if (args.reduced) loss = group_sum(loss, kThreads, losses);
    } else if (args.reduced) {
      loss = sum_written(scratch.losses, static_cast<int>(plan.items), losses);
    }
    if (args.reduced && threadIdx.x == 0) put(args.loss, 0, args.weight * loss);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------

inline MultinomialPlan multinomial_plan(const CountArgs& args) {
  const int64_t rows = args.rows, size = args.size;
  const bool in_double = args.params[0].type == DType::f64;
  const int64_t slots = fastvae::cuda::slots(in_double ? multinomial_resident<double>() : multinomial_resident<float>());
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  MultinomialPlan plan{};
  plan.segments = up(size, kSegment);
  plan.of_warps = plan.segments <= kShort && rows >= slots * kWarps / 2;
  plan.rows_each = kWarps * std::max<int64_t>(1, std::min<int64_t>(64, up(rows, kWarps) / (16 * slots)));
  plan.parts = 1;
  plan.items = static_cast<uint32_t>(std::max<int64_t>(1, plan.of_warps ? up(rows, plan.rows_each) : rows));
  // Parts cost a second phase. They pay if blocks would be idle for more than a quarter of the time.
  if (!plan.of_warps && rows && 4 * rows < 3 * slots * up(rows, slots))
    plan.parts = std::max<int64_t>(1, std::min(up(plan.segments, kWarps), up(4 * slots, rows)));
  plan.part_segments = up(plan.segments, plan.parts);
  if (plan.segments) plan.parts = up(plan.segments, plan.part_segments);
  plan.warp_segments = up(plan.part_segments, kWarps);
  if (plan.parts > 1) {
    plan.first = static_cast<uint32_t>(rows * plan.parts);
    plan.items = 2 * plan.first;
  }
  plan.blocks = static_cast<int>(std::min<int64_t>(plan.items, slots));
  plan.wide = allows(args.params[0], size, kQuad) && allows(args.grads[0], size, kQuad);
  plan.wide = plan.wide && (args.starts || allows(args.target, size, kQuad));
  const int64_t of_sums = in_double ? sizeof(RowSums<double>) : sizeof(RowSums<float>);
  if (plan.parts > 1) plan.bytes = up(int64_t(plan.first) * (of_sums + int64_t(sizeof(double))), 16) * 16;
  plan.of_lists = plan.bytes;
  plan.bytes += rows * plan.segments * kWarp;
  plan.of_losses = plan.bytes;
  if (plan.parts == 1) plan.bytes += up(plan.items * int64_t(sizeof(double)), 16) * 16;
  return plan;
}

}  // namespace fastvae::cuda
