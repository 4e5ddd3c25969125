// Computes the nll of a mixture of two negative binomials and, where wanted, the gradients in one pass over the counts. As in counts.cpp,
// every lane takes the short path of a zero, and the results of other counts, which are gathered and computed in fp64, overwrite those.
#include "count_mixture.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <memory>
#include <vector>

#include "../math/count_mixture.h"
#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

using Wide = Vec<double>;
using math::below;
using math::Bounds;
constexpr int64_t kRoom = kBlock + kBufferSlack;

// The chunks of rows whose derivatives by a shared dispersion are summed, one after another. They depend only on the number of rows, so the
// result does not depend on the number of threads.
constexpr int64_t kMostChunks = 32;
int64_t rows_of_chunk(int64_t rows) { return std::max<int64_t>(8, (rows + kMostChunks - 1) / kMostChunks); }

template <class C>
Vec<C> within_bounds(Vec<C> theta) { return math::Primitives<Vec<C>>::clamp(theta, Bounds<C>::lowest, Bounds<C>::highest); }

// The dispersion of every feature, where all rows share it: as it is given, within the bounds of both types, and the parts of its log Gamma
// and digamma.
template <class C>
struct SharedDispersion {
  std::vector<C> given, theta;
  std::vector<double> exact, log_gamma, digamma;
};

template <class C>
SharedDispersion<C> prepare(const CountMixtureArgs& args) {
  SharedDispersion<C> out;
  for (auto* field : {&out.given, &out.theta}) field->resize(args.genes + kBufferSlack);
  for (auto* field : {&out.exact, &out.log_gamma, &out.digamma}) field->resize(args.genes + kBufferSlack);
  at::parallel_for(0, (args.genes + kBlock - 1) / kBlock, 4, [&](int64_t first, int64_t last) {
    Buffer<C> buffer;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(args.genes, begin + kBlock);
      const C* in = load(args.dispersion, 0, begin, end - begin, args.genes, buffer);
      std::copy(in, in + (end - begin), out.given.data() + begin);
      for (int64_t i = begin; i < end; ++i) out.exact[i] = out.given[i];
      for (int64_t i = begin; i < end; i += Vec<C>::size()) {
        const int64_t lanes = std::min<int64_t>(Vec<C>::size(), end - i);
        store_lanes(within_bounds(load_lanes(out.given.data() + i, lanes)), out.theta.data() + i, lanes);
      }
      for (int64_t i = begin; i < end; i += Wide::size()) {
        const int64_t lanes = std::min<int64_t>(Wide::size(), end - i);
        const Wide theta = within_bounds(load_lanes(out.exact.data() + i, lanes));
        const auto parts = math::dispersion_parts(theta);
        store_lanes(theta, out.exact.data() + i, lanes);
        store_lanes(parts.log_gamma, out.log_gamma.data() + i, lanes);
        store_lanes(parts.digamma, out.digamma.data() + i, lanes);
      }
    }
  });
  return out;
}

// The results of the elements of a block.
template <class C>
struct Results {
  C value[kRoom], d_mean[kRoom], d_mean2[kRoom], d_theta[kRoom], d_pi[kRoom];
};

// The formulas for elements that are gathered: those of counts above 0, as in counts.cpp, and that of zeros in fp64.
enum Case { kDispersed, kNearPoisson, kLargeDispersed, kLargeNearPoisson, kOne, kFew, kZero, kCases };

// The elements of a block that belong to one case, as dense arrays.
struct Gathered {
  int64_t count;
  bool at_ends;  // whether a mean is 0 or a dispersion is below its bound
  int32_t place[kRoom];
  double t[kRoom], mean[kRoom], mean2[kRoom], theta[kRoom], pi[kRoom], log_gamma[kRoom], digamma[kRoom];
};

template <class C>
struct Scratch {
  std::vector<C> target;  // one row, if the target is sparse
  Buffer<C> mean, mean2, dispersion, pi, counts, weights, out;
  int32_t listed[kRoom];
  Gathered gathered[kCases];
  Results<double> of_case;
  Results<C> results;
};

// n elements of a block, as dense arrays. The pointers of a shared dispersion may be null.
template <class C>
struct Block {
  int64_t n;
  const C *mean, *mean2, *pi, *target, *given, *theta;
  const double *exact, *log_gamma, *digamma;
  double eps;
};

// Computes every element as if its count were 0. Lists those whose count is not, and those that C cannot compute, and returns their number.
template <class C>
int64_t zeros(const Block<C>& b, Results<C>& out, int32_t* listed) {
  using V = Vec<C>;
  using P = math::Primitives<V>;
  constexpr int64_t W = V::size();
  int64_t count = 0;
  const V eps(static_cast<C>(b.eps));
  const auto step = [&](int64_t i, auto lanes) FASTVAE_INLINE {
    const unsigned all = (1u << lanes) - 1, is_zero = load_lanes(b.target + i, lanes).zero_mask() & all;
    if (!is_zero) {
      for (int64_t k = 0; k < lanes; ++k) listed[count++] = static_cast<int32_t>(i + k);
      return;
    }
    const V theta = b.theta ? load_lanes(b.theta + i, lanes) : within_bounds(load_lanes(b.given + i, lanes)), inverse = V(1) / theta;
    const V pi = load_lanes(b.pi + i, lanes);
    const auto first = math::negative_binomial_zero(load_lanes(b.mean + i, lanes) + eps, theta, inverse);
    const auto second = math::negative_binomial_zero(load_lanes(b.mean2 + i, lanes) + eps, theta, inverse);
    const auto both = math::mixed_near(first.value, second.value, pi);
    both.value.store(out.value + i);
    both.d_pi.store(out.d_pi + i);
    (both.share1 * first.d_mu).store(out.d_mean + i);
    (both.share2 * second.d_mu).store(out.d_mean2 + i);
    P::fma(both.share1, first.d_theta, both.share2 * second.d_theta).store(out.d_theta + i);
    const unsigned far = math::is_near(first.value, second.value, pi).zero_mask();
    unsigned others = (~is_zero | far) & all;
    while (others) {
      listed[count++] = static_cast<int32_t>(i + __builtin_ctz(others));
      others &= others - 1;
    }
  };
  constexpr auto whole = whole_vector<V>;
  int64_t i = 0;
  for (; i + W <= b.n; i += W) step(i, whole);
  if (i < b.n) step(i, b.n - i);
  return count;
}

// t! for a whole t from 0 to 7.
Wide small_factorial(Wide t) {
  using P = math::Primitives<Wide>;
  Wide product(1);
  for (int k = 2; k < 8; ++k) product = P::select(P::less(t, Wide(k)), product, product * Wide(k));
  return product;
}

template <Case kCase>
void evaluate(Gathered& g, Results<double>& out, bool shared) {
  using P = math::Primitives<Wide>;
  constexpr int64_t W = Wide::size();
  constexpr bool kSimple = kCase == kOne || kCase == kFew, kLarge = kCase == kLargeDispersed || kCase == kLargeNearPoisson;
  constexpr bool kPoisson = kCase == kNearPoisson || kCase == kLargeNearPoisson;
  const int64_t padded = (g.count + W - 1) / W * W;
  for (int64_t i = g.count; i < padded; ++i)
    for (auto* field : {g.t, g.mean, g.mean2, g.theta, g.pi, g.log_gamma, g.digamma}) field[i] = field[g.count - 1];
  for (int64_t i = 0; i < padded; i += W) {
    const auto at = [&](const double* field) FASTVAE_INLINE { return Wide::loadu(field + i); };
    const Wide t = at(g.t), theta = at(g.theta), mean = at(g.mean), mean2 = at(g.mean2), pi = at(g.pi);
    math::CountTerm<Wide> first, second;
    math::MixedTerm<Wide> both;
    if constexpr (kCase == kZero) {
      const Wide inverse = Wide(1) / theta;
      first = math::negative_binomial_zero(mean, theta, inverse);
      second = math::negative_binomial_zero(mean2, theta, inverse);
      const auto near = math::mixed_near(first.value, second.value, pi);
      const Wide is_near = math::is_near(first.value, second.value, pi);
      both = math::mixed(first.value, second.value, pi);
      for (const auto member : {&math::MixedTerm<Wide>::value, &math::MixedTerm<Wide>::share1, &math::MixedTerm<Wide>::share2,
                                &math::MixedTerm<Wide>::d_pi})
        both.*member = P::select(is_near, near.*member, both.*member);
    } else {
      math::GammaParts<Wide> of_theta{};
      if constexpr (!kSimple) of_theta = shared ? math::GammaParts<Wide>{at(g.log_gamma), at(g.digamma)} : math::dispersion_parts(theta);
      const Wide log_factorial = kCase == kFew ? small_factorial(t).log() : kSimple || kLarge ? Wide(0) : P::log_factorial(t);
      const auto term = [&](Wide mu) FASTVAE_INLINE {
        const Wide log_mu = kSimple || (kPoisson && !kLarge) ? mu.log() : Wide(0);
        if constexpr (kSimple) return math::negative_binomial_few<kCase == kOne>(t, mu, log_mu, theta, log_factorial);
        else return math::negative_binomial_positive<kLarge, kPoisson>(t, mu, log_mu, theta, of_theta, log_factorial);
      };
      first = term(mean);
      second = term(mean2);
      both = math::mixed(first.value, second.value, pi);
      first.d_mu = first.d_mu / mean;
      second.d_mu = second.d_mu / mean2;
    }
    both.value.store(out.value + i);
    both.d_pi.store(out.d_pi + i);
    (both.share1 * first.d_mu).store(out.d_mean + i);
    (both.share2 * second.d_mu).store(out.d_mean2 + i);
    P::fma(both.share1, first.d_theta, both.share2 * second.d_theta).store(out.d_theta + i);
  }
}

template <class C>
void listed(const Block<C>& b, Scratch<C>& scratch, int64_t count) {
  const bool shared = b.theta;
  for (auto& g : scratch.gathered) g.count = 0, g.at_ends = false;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t i = scratch.listed[k];
    const double t = b.target[i], given = b.given[i];
    const double theta = shared ? b.exact[i] : std::max(std::min(given, Bounds<double>::highest), Bounds<double>::lowest);
    const bool large = t >= math::kStirlingFrom;
    const int whole = t >= 1 && !large ? static_cast<int>(t) : 0;
    const bool simple = whole == t && theta >= math::kFewFrom;
    Gathered& g = scratch.gathered[t == 0 ? kZero : simple ? whole == 1 ? kOne : kFew : 2 * large + (theta >= math::kStirlingFrom)];
    const int64_t j = g.count++;
    g.place[j] = i;
    g.t[j] = t;
    g.mean[j] = b.mean[i] + b.eps;
    g.mean2[j] = b.mean2[i] + b.eps;
    g.theta[j] = theta;
    g.pi[j] = b.pi[i];
    g.at_ends |= t != 0 && (g.mean[j] == 0 || g.mean2[j] == 0 || given < Bounds<double>::lowest);
    if (shared && !simple) {
      g.log_gamma[j] = b.log_gamma[i];
      g.digamma[j] = b.digamma[i];
    }
  }
  constexpr void (*const evaluators[])(Gathered&, Results<double>&, bool) = {
      evaluate<kDispersed>, evaluate<kNearPoisson>, evaluate<kLargeDispersed>, evaluate<kLargeNearPoisson>,
      evaluate<kOne>,       evaluate<kFew>,         evaluate<kZero>,
  };
  Results<double>& from = scratch.of_case;
  Results<C>& out = scratch.results;
  for (int c = 0; c < kCases; ++c) {
    Gathered& g = scratch.gathered[c];
    if (!g.count) continue;
    evaluators[c](g, from, shared);
    if (g.at_ends)
      for (int64_t j = 0; j < g.count; ++j) {
        if (g.mean[j] == 0) from.d_mean[j] = math::slope_at_mean_0(from.value[j], 1 / (1 + std::exp(-g.pi[j])), g.t[j]);
        if (g.mean2[j] == 0) from.d_mean2[j] = math::slope_at_mean_0(from.value[j], 1 / (1 + std::exp(g.pi[j])), g.t[j]);
        from.value[j] += below(b.given[g.place[j]], false);
      }
    for (int64_t j = 0; j < g.count; ++j) {
      const int32_t i = g.place[j];
      out.value[i] = static_cast<C>(from.value[j]);
      out.d_mean[i] = static_cast<C>(from.d_mean[j]);
      out.d_mean2[i] = static_cast<C>(from.d_mean2[j]);
      out.d_theta[i] = static_cast<C>(from.d_theta[j]);
      out.d_pi[i] = static_cast<C>(from.d_pi[j]);
    }
  }
}

// Multiplies the results by the weights of the elements, if there are any, and returns the sum of the values.
template <class C>
double weighted_sum(Results<C>& out, const C* weights, int64_t n) {
  constexpr int64_t W = Vec<C>::size();
  Sum<C> sum;
  for (int64_t i = 0; i < n; i += W) {
    const int64_t lanes = std::min<int64_t>(W, n - i);
    if (weights) {
      const Vec<C> weight = load_lanes(weights + i, lanes);
      for (auto* field : {out.value, out.d_mean, out.d_mean2, out.d_theta, out.d_pi})
        store_lanes(weighted<C>(load_lanes(field + i, lanes), weight), field + i, lanes);
    }
    const Vec<C> value = load_lanes(out.value + i, lanes);
    if (lanes < W) sum.add_lanes(value, lanes);
    else sum.add(i / W % 4, value);
  }
  return sum.total();
}

// Writes n numbers times `factor` to a result, if that is requested.
template <class C>
void write(const Result& to, int64_t r, int64_t begin, int64_t n, int64_t size, const C* from, C factor, Buffer<C>& buffer) {
  C* __restrict out = destination(to, r, begin, size, buffer);
  if (!out) return;
  for (int64_t i = 0; i < n; ++i) out[i] = from[i] * factor;
  store(to, r, begin, n, size, buffer);
}

template <class C>
void one_row(const CountMixtureArgs& args, const SharedDispersion<C>& shared, int64_t r, double* d_shared, Scratch<C>& scratch) {
  const int64_t size = args.genes, source = target_row(args, r);
  const C factor = static_cast<C>(args.weight[r * args.weight_stride]);
  if (args.starts) add_stored(args, source, scratch.counts, scratch.target.data());
  double nll = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    Block<C> b{};
    b.n = std::min(kBlock, size - begin);
    b.eps = args.eps;
    b.mean = load(args.mean, r, begin, b.n, size, scratch.mean);
    b.mean2 = load(args.mean2, r, begin, b.n, size, scratch.mean2);
    b.pi = load(args.mixture_logits, r, begin, b.n, size, scratch.pi);
    b.target = args.starts ? scratch.target.data() + begin : load(args.target, source, begin, b.n, size, scratch.counts);
    if (args.shared_dispersion) {
      b.given = shared.given.data() + begin;
      b.theta = shared.theta.data() + begin;
      b.exact = shared.exact.data() + begin;
      b.log_gamma = shared.log_gamma.data() + begin;
      b.digamma = shared.digamma.data() + begin;
    } else {
      b.given = load(args.dispersion, r, begin, b.n, size, scratch.dispersion);
    }
    Results<C>& out = scratch.results;
    if (const int64_t count = zeros(b, out, scratch.listed)) listed(b, scratch, count);
    nll += weighted_sum(out, load(args.weights, source, begin, b.n, scratch.weights), b.n);
    write(args.values, r, begin, b.n, size, out.value, factor, scratch.out);
    write(args.d_mean, r, begin, b.n, size, out.d_mean, factor, scratch.out);
    write(args.d_mean2, r, begin, b.n, size, out.d_mean2, factor, scratch.out);
    write(args.d_mixture_logits, r, begin, b.n, size, out.d_pi, factor, scratch.out);
    write(args.d_dispersion, r, begin, b.n, size, out.d_theta, factor, scratch.out);
    if (d_shared)
      for (int64_t i = 0; i < b.n; ++i) d_shared[begin + i] += out.d_theta[i] * factor;
  }
  args.row_nll[r] = nll;
  if (args.starts)
    for (int64_t i = args.starts[source]; i < args.starts[source + 1]; ++i) scratch.target[args.columns[i]] = 0;
}

template <class C>
void run(const CountMixtureArgs& args) {
  const int64_t rows = args.rows, size = args.genes, step = rows_of_chunk(rows), chunks = (rows + step - 1) / step;
  SharedDispersion<C> shared;
  if (args.shared_dispersion) shared = prepare<C>(args);
  std::vector<double> sums(args.d_shared_dispersion ? chunks * size : 0);
  at::parallel_for(0, chunks, grain(4 * step * size), [&](int64_t first, int64_t last) {
    auto scratch = std::make_unique<Scratch<C>>();
    if (args.starts) scratch->target.resize(size + kBufferSlack);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double* d_shared = args.d_shared_dispersion ? sums.data() + chunk * size : nullptr;
      for (int64_t r = chunk * step; r < std::min(rows, (chunk + 1) * step); ++r) one_row(args, shared, r, d_shared, *scratch);
    }
  });
  if (!args.d_shared_dispersion) return;
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * size + i];
    args.d_shared_dispersion[i] = sum;
  }
}

}  // namespace

void count_mixture(const CountMixtureArgs& args) { args.in_double ? run<double>(args) : run<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
