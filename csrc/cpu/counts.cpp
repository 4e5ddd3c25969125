// Computes the nll of a cell and, where wanted, the gradients in one pass over its counts. Most counts are zeros, so every lane takes the
// short path of a zero. The few other counts are gathered and computed in fp64, and their results overwrite those of the short path.
#include "../math/counts.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "staging.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

using Wide = Vec<double>;
using math::below;
using math::Bounds;

// Rows are split into chunks in a way that depends only on the number of rows. Each chunk sums the derivatives of its own rows by a
// shared dispersion, and these sums are added in order, so the result does not depend on the number of threads.
constexpr int64_t kMostChunks = 32;
int64_t rows_of_chunk(int64_t rows) { return std::max<int64_t>(8, (rows + kMostChunks - 1) / kMostChunks); }

// The dispersion of every gene, where all rows share it.
template <class C>
struct SharedDispersion {
  std::vector<C> theta, inverse, given;  // `given` is the input, which may be below the bound
  std::vector<double> exact, log_gamma, digamma;
  bool any_below = false;
};

// Clamps theta to the bounds; a NaN stays NaN.
template <class C>
double within(double theta) {
  return std::max<double>(std::min<double>(theta, Bounds<C>::highest), Bounds<C>::lowest);
}

template <class C>
SharedDispersion<C> prepare(const CountArgs& args) {
  SharedDispersion<C> out;
  const int64_t genes = args.genes, room = genes + kBufferSlack;
  for (auto* field : {&out.theta, &out.inverse, &out.given}) field->resize(room);
  for (auto* field : {&out.exact, &out.log_gamma, &out.digamma}) field->resize(room);
  at::parallel_for(0, (genes + kBlock - 1) / kBlock, 4, [&](int64_t first, int64_t last) {
    Buffer<C> buffer;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, n = std::min(kBlock, genes - begin);
      const C* in = load(args.dispersion, 0, begin, n, genes, buffer);
      double* exact = out.exact.data() + begin;
      std::copy(in, in + n, out.given.data() + begin);
      for (int64_t i = 0; i < n; ++i) exact[i] = in[i];
      for (int64_t i = 0; i < n; i += Wide::size()) {
        const int64_t lanes = std::min<int64_t>(Wide::size(), n - i);
        Wide theta = load_lanes(exact + i, lanes);
        using B = Bounds<double>;
        theta = args.raw ? math::Primitives<Wide>::clamp(theta, B::lowest_log, B::highest_log).exp()
                         : math::Primitives<Wide>::clamp(theta, B::lowest, B::highest);
        store_lanes(theta, exact + i, lanes);
        const auto parts = math::dispersion_parts(theta);
        store_lanes(parts.log_gamma, out.log_gamma.data() + begin + i, lanes);
        store_lanes(parts.digamma, out.digamma.data() + begin + i, lanes);
      }
      for (int64_t i = 0; i < n; ++i) {
        const double theta = within<C>(exact[i]);
        out.theta[begin + i] = static_cast<C>(theta);
        out.inverse[begin + i] = static_cast<C>(1 / theta);
      }
    }
  });
  for (int64_t g = 0; g < genes; ++g) out.any_below |= below(out.given[g], args.raw) > 0;
  return out;
}

// The cases that counts above zero are sorted into, according to the formula for them. The first four differ in the sides of
// kStirlingFrom that t and theta lie on.
enum Case { kDispersed, kNearPoisson, kLargeDispersed, kLargeNearPoisson, kOne, kFew, kCases };

// The counts of a block that belong to one case, as dense arrays.
struct Gathered {
  int64_t count;
  int32_t place[kBlock];
  double t[kBlock + kBufferSlack], mean[kBlock + kBufferSlack], theta[kBlock + kBufferSlack], pi[kBlock + kBufferSlack];
  double log_gamma[kBlock + kBufferSlack], digamma[kBlock + kBufferSlack], log_factorial[kBlock + kBufferSlack];
  double value[kBlock + kBufferSlack], d_mean[kBlock + kBufferSlack], d_theta[kBlock + kBufferSlack], d_pi[kBlock + kBufferSlack];
};

template <class C>
struct Scratch {
  std::vector<C> exponentials, grads, target;  // each holds one row, where it is needed
  Buffer<C> mean, dispersion, pi, counts, weights, values, d_mean, d_dispersion, d_pi;
  int32_t positive[kBlock + kBufferSlack];
  Gathered gathered[kCases];
};

// The values that all elements of a row share. Inputs are raw if the means come as logits and the dispersions as logarithms.
template <class C>
struct Row {
  C mean_scale;       // if raw: the factor that turns the exponentials of the logits into means
  double sum;         // if raw: the sum of those exponentials
  double log_offset;  // if raw: the summand that turns a logit into the logarithm of the mean
  C weight;        // of the derivatives
  C value_weight;  // of the values
  double eps;      // if not raw: this is added to the mean
};

// n elements of a block, as dense arrays. The pointers to outputs, and to inputs that the likelihood does not have, may be null.
template <class C>
struct Block {
  int64_t n;
  const C *mean, *logits, *theta, *inverse, *log_theta, *given, *pi, *target;
  const double *exact, *log_gamma, *digamma;  // these belong to a shared dispersion
  C *values, *d_mean, *d_theta, *d_pi;
  bool sums_theta;  // whether derivatives are added to d_theta instead of overwriting it
  bool any_below;   // whether a shared dispersion is below the bound for any gene
};

double log_factorial(double t) {
  constexpr double table[] = {0, 0, 0.693147180559945309, 1.79175946922805500, 3.17805383034794562, 4.78749174278204599,
                              6.57925121201010100, 8.52516136106541430};
  const int i = t >= 0 && t < 8 ? static_cast<int>(t) : 0;
  if (i == t) return table[i];
  int sign;
  return ::lgamma_r(t + 1, &sign);
}

struct Sums {
  double nll, grad;  // `grad` is the sum of the derivatives by the log means
};

// How the counts of `Gathered` are to be read.
struct Reading {
  bool raw, inflated, shared;
  double log_offset;
};

template <Case kCase>
Sums evaluate(Gathered& g, const Reading& read) {
  constexpr bool kSimple = kCase == kOne || kCase == kFew, kLarge = kCase == kLargeDispersed || kCase == kLargeNearPoisson;
  constexpr bool kPoisson = kCase == kNearPoisson || kCase == kLargeNearPoisson;
  using P = math::Primitives<Wide>;
  constexpr int64_t L = Wide::size();
  Sum<double> nll, grad;
  const int64_t padded = (g.count + L - 1) / L * L;
  for (int64_t i = g.count; i < padded; ++i)
    for (auto* field : {g.t, g.mean, g.theta, g.pi, g.log_gamma, g.digamma, g.log_factorial}) field[i] = field[g.count - 1];
  for (int64_t i = 0; i < padded; i += L) {
    const auto at = [&](const double* field) FASTVAE_INLINE { return Wide::loadu(field + i); };
    Wide theta = at(g.theta), mu = at(g.mean), log_mu(0), underflow(0);
    if (read.raw) {
      const Wide unbounded = mu + Wide(read.log_offset);
      log_mu = P::clamp(unbounded, -670, 670);
      underflow = P::relu(log_mu - unbounded);  // below the clamp the nll is -t log mu plus a constant
      mu = log_mu.exp();
    } else if (kSimple || (kPoisson && !kLarge)) {
      log_mu = mu.log();
    }
    math::GammaParts<Wide> of_theta{at(g.log_gamma), at(g.digamma)};
    if (!read.shared) {
      using B = Bounds<double>;
      theta = read.raw ? P::clamp(theta, B::lowest_log, B::highest_log).exp() : P::clamp(theta, B::lowest, B::highest);
      // The case was chosen by the logarithm of theta, so theta itself may lie an ulp on the other side.
      if (kPoisson) theta = at::vec::clamp_min(theta, Wide(math::kStirlingFrom));
      if constexpr (!kSimple) of_theta = math::dispersion_parts(theta);
    }
    math::CountTerm<Wide> term;
    if constexpr (kSimple) term = math::negative_binomial_few<kCase == kOne>(at(g.t), mu, log_mu, theta, at(g.log_factorial));
    else term = math::negative_binomial_positive<kLarge, kPoisson>(at(g.t), mu, log_mu, theta, of_theta, at(g.log_factorial));
    if (read.inflated) {
      math::without_additional_zero(term, at(g.pi));
      term.d_pi.store(g.d_pi + i);
    }
    (read.raw ? term.d_mu : term.d_mu / mu).store(g.d_mean + i);
    (read.raw ? term.d_theta * theta : term.d_theta).store(g.d_theta + i);
    const Wide value = read.raw ? at::vec::fmadd(at(g.t), underflow, term.value) : term.value;
    value.store(g.value + i);
    nll.add_lanes(value, g.count - i);
    grad.add_lanes(term.d_mu, g.count - i);
  }
  return {nll.total(), grad.total()};
}

// Multiplies the values and the derivatives of a block by the weights of its elements, and returns the sums of the values and of what is in
// d_mean. The derivatives by a shared dispersion are added to `d_shared`.
template <class C>
Sums weigh(const Block<C>& b, const C* weights, C* d_shared) {
  using V = Vec<C>;
  Sum<C> nll, grad;
  for (int64_t i = 0; i < b.n; i += V::size()) {
    const int64_t lanes = std::min<int64_t>(V::size(), b.n - i);
    const V own = load_lanes(weights + i, lanes);
    const auto weighted_in = [&](C* data) {
      const V x = weighted<C>(load_lanes(data + i, lanes), own);
      store_lanes(x, data + i, lanes);
      return x;
    };
    nll.add(0, weighted_in(b.values));
    if (b.d_mean) grad.add(0, weighted_in(b.d_mean));
    if (b.d_pi) weighted_in(b.d_pi);
    if (b.d_theta) {
      const V d = weighted_in(b.d_theta);
      if (d_shared) store_lanes(load_lanes(d_shared + i, lanes) + d, d_shared + i, lanes);
    }
  }
  return {nll.total(), grad.total()};
}

template <class C, bool kRaw, bool kInflated, bool kShared>
struct Kernel {
  using V = Vec<C>;
  using P = math::Primitives<V>;
  static constexpr int64_t W = V::size();

  // Computes every element as if its count were zero, and lists those whose count is not. From raw inputs, it stores values only if
  // kValues: the pointer to them would slow down all other calls.
  template <bool kValues = !kRaw>
  static Sums zeros(const Block<C>& b, const Row<C>& row, int32_t* positive, int64_t& positives) {
    const V scale(row.mean_scale), weight(row.weight), value_weight(row.value_weight), eps(static_cast<C>(row.eps));
    Sum<C> nll, grad;
    positives = 0;
    const auto step = [&](int64_t i, auto lanes, int slot) FASTVAE_INLINE {
      V mu = load_lanes(b.mean + i, lanes), theta, inverse;
      mu = kRaw ? mu * scale : mu + eps;
      if constexpr (kShared) {
        theta = load_lanes(b.theta + i, lanes);
        inverse = load_lanes(b.inverse + i, lanes);
      } else {
        if constexpr (kRaw) theta = P::exp_bounded(P::clamp(load_lanes(b.log_theta + i, lanes), Bounds<C>::lowest_log, Bounds<C>::highest_log));
        else theta = P::at_most(load_lanes(b.theta + i, lanes), V(Bounds<C>::highest));
        inverse = V(1) / theta;
      }
      const V t = load_lanes(b.target + i, lanes), is_zero = t == V(0);
      auto term = math::negative_binomial_zero(mu, theta, inverse);
      if constexpr (kInflated) term = math::with_additional_zeros(term, load_lanes(b.pi + i, lanes));
      const V value = P::select(is_zero, term.value, V(0));
      const V d_log_mu = kRaw ? P::select(is_zero, term.d_mu * mu, V(0)) : V(0);
      if (kValues && b.values) store_lanes(value * value_weight, b.values + i, lanes);
      if (b.d_mean) store_lanes(kRaw ? d_log_mu : term.d_mu * weight, b.d_mean + i, lanes);
      if (b.d_theta) {
        const V d = (kRaw ? term.d_theta * theta : term.d_theta) * weight;
        if (kShared && b.sums_theta) store_lanes(load_lanes(b.d_theta + i, lanes) + P::select(is_zero, d, V(0)), b.d_theta + i, lanes);
        else store_lanes(d, b.d_theta + i, lanes);
      }
      if (kInflated && b.d_pi) store_lanes(term.d_pi * weight, b.d_pi + i, lanes);
      if (lanes < W) {
        nll.add_lanes(value, lanes);
        if constexpr (kRaw) grad.add_lanes(d_log_mu, lanes);
      } else {
        nll.add(slot, value);
        if constexpr (kRaw) grad.add(slot, d_log_mu);
      }
      unsigned others = ~static_cast<unsigned>(t.zero_mask()) & ((1u << W) - 1);
      while (others) {
        positive[positives++] = static_cast<int32_t>(i + __builtin_ctz(others));
        others &= others - 1;
      }
    };
    constexpr auto whole = whole_vector<V>;
    int64_t i = 0;
    for (; i + W <= b.n; i += W) step(i, whole, i / W % 4);
    if (i < b.n) step(i, b.n - i, 0);
    return {nll.total(), grad.total()};
  }

  static Sums positives(const Block<C>& b, const Row<C>& row, Scratch<C>& scratch, int64_t count) {
    constexpr bool kLogTheta = kRaw && !kShared;
    Sums sums{0, 0};
    for (auto& g : scratch.gathered) g.count = 0;
    bool any_below = false;
    for (int64_t k = 0; k < count; ++k) {
      const int32_t i = scratch.positive[k];
      const double t = b.target[i], theta = kShared ? b.exact[i] : kRaw ? b.log_theta[i] : b.theta[i];
      if (!kShared || b.any_below) {
        const double rest = below(b.given[i], kRaw);
        sums.nll += rest;
        any_below |= rest > 0;
      }
      // If the log of theta is read, the bounds apply to the log.
      constexpr double few_from = kLogTheta ? -92 : math::kFewFrom, poisson_from = kLogTheta ? 2.0794415416798359 : math::kStirlingFrom;
      const bool large = t >= math::kStirlingFrom, near_poisson = theta >= poisson_from;
      const int whole = t >= 1 && !large ? static_cast<int>(t) : 0;
      const bool simple = whole == t && theta >= few_from;
      const int which = simple ? whole == 1 ? kOne : kFew : 2 * large + near_poisson;
      Gathered& g = scratch.gathered[which];
      const int64_t j = g.count++;
      g.place[j] = i;
      g.t[j] = t;
      g.mean[j] = kRaw ? b.logits[i] : b.mean[i] + row.eps;
      g.theta[j] = theta;
      if (which != kOne) g.log_factorial[j] = large ? 0 : log_factorial(t);
      if (kShared && !simple) {
        g.log_gamma[j] = b.log_gamma[i];
        g.digamma[j] = b.digamma[i];
      }
      if constexpr (kInflated) g.pi[j] = b.pi[i];
    }
    const Reading read{kRaw, kInflated, kShared, row.log_offset};
    constexpr Sums (*const evaluators[])(Gathered&, const Reading&) = {
        evaluate<kDispersed>, evaluate<kNearPoisson>, evaluate<kLargeDispersed>, evaluate<kLargeNearPoisson>, evaluate<kOne>, evaluate<kFew>,
    };
    for (int c = 0; c < kCases; ++c) {
      Gathered& g = scratch.gathered[c];
      if (!g.count) continue;
      const Sums part = evaluators[c](g, read);
      sums.nll += part.nll;
      sums.grad += part.grad;
      const double weight = row.weight;
      if (b.values)
        for (int64_t j = 0; j < g.count; ++j) b.values[g.place[j]] = static_cast<C>(g.value[j] * row.value_weight);
      if (b.d_mean)
        for (int64_t j = 0; j < g.count; ++j) b.d_mean[g.place[j]] = static_cast<C>(kRaw ? g.d_mean[j] : g.d_mean[j] * weight);
      if (b.d_theta)
        for (int64_t j = 0; j < g.count; ++j) {
          C& d = b.d_theta[g.place[j]];
          d = static_cast<C>((b.sums_theta ? d : 0) + g.d_theta[j] * weight);
        }
      if (kInflated && b.d_pi)
        for (int64_t j = 0; j < g.count; ++j) b.d_pi[g.place[j]] = static_cast<C>(g.d_pi[j] * weight);
    }
    if (b.values && any_below)
      for (int64_t k = 0; k < count; ++k) {
        const int32_t i = scratch.positive[k];
        b.values[i] += static_cast<C>(below(b.given[i], kRaw)) * row.value_weight;
      }
    return sums;
  }

  // Finds the largest logit, subtracts it from all logits, and computes their exponentials and the sum of these.
  static void softmax(const CountArgs& args, int64_t r, Row<C>& row, Scratch<C>& scratch) {
    V largest(-std::numeric_limits<C>::infinity());
    for (int64_t begin = 0; begin < args.genes; begin += kBlock) {
      const int64_t n = std::min(kBlock, args.genes - begin);
      const C* logits = load(args.mean, r, begin, n, args.genes, scratch.mean);
      for (int64_t i = 0; i < n; i += W) {
        const int64_t lanes = std::min(W, n - i);
        const V x = load_lanes(logits + i, lanes);
        largest = at::vec::maximum(largest, lanes < W ? V::set(largest, x, lanes) : x);
      }
    }
    C lanes_of[W];
    largest.store(lanes_of);
    C top = lanes_of[0];
    for (const C x : lanes_of) top = x > top || x != x ? x : top;
    const V shift(top);
    double sum = 0;
    for (int64_t begin = 0; begin < args.genes; begin += kBlock) {
      const int64_t n = std::min(kBlock, args.genes - begin);
      const C* logits = load(args.mean, r, begin, n, args.genes, scratch.mean);
      C* out = scratch.exponentials.data() + begin;
      Sum<C> part;
      int64_t i = 0;
      for (; i + W <= n; i += W) {
        const V e = P::exp_bounded(V::loadu(logits + i) - shift);
        e.store(out + i);
        part.add(i / W % 4, e);
      }
      if (i < n) {
        const V e = P::exp_bounded(V::loadu(logits + i, n - i) - shift);
        store_lanes(e, out + i, n - i);
        part.add_lanes(e, n - i);
      }
      sum += part.total();
    }
    const double library = args.library[r];
    row.sum = sum;
    row.mean_scale = static_cast<C>(std::min<double>(library / sum, std::numeric_limits<C>::max()));
    row.log_offset = std::log(library) - static_cast<double>(top) - std::log(sum);
  }

  static void one_row(const CountArgs& args, const SharedDispersion<C>& shared, int64_t r, C* d_shared, Scratch<C>& scratch) {
    const int64_t genes = args.genes;
    const C factor = static_cast<C>(args.weight[r * args.weight_stride]);
    Row<C> row{C(1), 1, 0, factor, args.values.data ? factor : C(1), args.eps};
    if constexpr (kRaw) softmax(args, r, row, scratch);
    const int64_t source = target_row(args, r);
    if (args.starts) add_stored(args, source, scratch.counts, scratch.target.data());

    double nll = 0, grad = 0;
    bool any = !args.weights.data;  // whether an element of the row has a weight
    for (int64_t begin = 0; begin < genes; begin += kBlock) {
      Block<C> b{};
      b.n = std::min(kBlock, genes - begin);
      b.mean = kRaw ? scratch.exponentials.data() + begin : load(args.mean, r, begin, b.n, genes, scratch.mean);
      if constexpr (kShared) {
        b.theta = shared.theta.data() + begin;
        b.inverse = shared.inverse.data() + begin;
        b.given = shared.given.data() + begin;
        b.any_below = shared.any_below;
        b.exact = shared.exact.data() + begin;
        b.log_gamma = shared.log_gamma.data() + begin;
        b.digamma = shared.digamma.data() + begin;
        b.sums_theta = d_shared;
      } else {
        b.given = (kRaw ? b.log_theta : b.theta) = load(args.dispersion, r, begin, b.n, genes, scratch.dispersion);
      }
      b.d_theta = b.sums_theta ? d_shared + begin : destination(args.d_dispersion, r, begin, genes, scratch.d_dispersion);
      if constexpr (!kRaw) b.values = destination(args.values, r, begin, genes, scratch.values);
      if constexpr (kInflated) {
        b.pi = load(args.zero_logits, r, begin, b.n, genes, scratch.pi);
        b.d_pi = destination(args.d_zero_logits, r, begin, genes, scratch.d_pi);
      }
      b.target = !args.starts ? load(args.target, source, begin, b.n, genes, scratch.counts) : scratch.target.data() + begin;
      if constexpr (kRaw) b.d_mean = args.d_mean.data ? scratch.grads.data() + begin : nullptr;
      else b.d_mean = destination(args.d_mean, r, begin, genes, scratch.d_mean);
      if (args.weights.data) {
        if (!b.values) b.values = scratch.values.data;
        if (b.sums_theta) b.d_theta = scratch.d_dispersion.data;
        if (kRaw && !b.d_mean) b.d_mean = scratch.d_mean.data;
        b.sums_theta = false;
      }

      int64_t count;
      Sums sums = kRaw && b.values ? zeros<true>(b, row, scratch.positive, count) : zeros(b, row, scratch.positive, count);
      if (count) {
        if constexpr (kRaw) b.logits = load(args.mean, r, begin, b.n, genes, scratch.mean);
        const Sums more = positives(b, row, scratch, count);
        sums.nll += more.nll;
        sums.grad += more.grad;
      }
      if (const C* weights = load(args.weights, source, begin, b.n, scratch.weights)) {
        sums = weigh(b, weights, d_shared ? d_shared + begin : nullptr);
        for (int64_t i = 0; i < b.n; ++i) any |= weights[i] != C(0);
      }
      nll += sums.nll;
      grad += sums.grad;
      if constexpr (!kRaw) store(args.values, r, begin, b.n, genes, scratch.values);
      store(args.d_dispersion, r, begin, b.n, genes, scratch.d_dispersion);
      if constexpr (kInflated) store(args.d_zero_logits, r, begin, b.n, genes, scratch.d_pi);
      if constexpr (!kRaw) store(args.d_mean, r, begin, b.n, genes, scratch.d_mean);
    }
    args.row_nll[r] = nll;
    if (args.d_library) args.d_library[r] = any ? static_cast<double>(row.weight) * grad / args.library[r] : 0;
    if (kRaw && args.d_mean.data) through_softmax(args, r, row, grad, scratch, any);
    if (kRaw && any && (args.library[r] == 0 || std::isinf(args.library[r]))) at_ends(args, r, scratch);
    if (args.starts)
      for (int64_t i = args.starts[source]; i < args.starts[source + 1]; ++i) scratch.target[args.columns[i]] = 0;
  }

  // Corrects the results of one_row for an infinite library, whose nll is infinite, and for a library of 0. At a library of 0 the
  // derivatives by the logarithms of the means vanish, but the derivative by the library does not: as the library grows, each mean grows
  // by its gene's share of it, and the nll of a count of zero by the same amount, unless it is an additional zero.
  static FASTVAE_COLD void at_ends(const CountArgs& args, int64_t r, Scratch<C>& scratch) {
    const double library = args.library[r];
    if (std::isinf(library)) args.row_nll[r] += std::abs(library);
    if (library != 0 || !args.d_library) return;
    double grad = 0, sum = 0;
    for (int64_t begin = 0; begin < args.genes; begin += kBlock) {
      const int64_t n = std::min(kBlock, args.genes - begin);
      const C* pi = kInflated ? load(args.zero_logits, r, begin, n, args.genes, scratch.pi) : nullptr;
      const C* weights = load(args.weights, target_row(args, r), begin, n, scratch.weights);
      for (int64_t i = 0; i < n; ++i) {
        const double e = scratch.exponentials[begin + i], weight = weights ? weights[i] : 1;
        sum += e;
        if (weight != 0) grad += weight * (kInflated ? e / (1 + std::exp(static_cast<double>(pi[i]))) : e);
      }
    }
    // A count above zero has an infinite nll and an infinite derivative, so a row with one keeps what one_row wrote.
    const double of_zeros = args.weight[r * args.weight_stride] * grad / sum;
    if (!std::isinf(args.row_nll[r])) args.d_library[r] = of_zeros;
  }

  // The derivative by logit g is the derivative by log mu_g minus the sum of these over all genes times the share of g.
  // If no element of the row has a weight, there is no derivative, whatever the logits are.
  static void through_softmax(const CountArgs& args, int64_t r, const Row<C>& row, double grad, Scratch<C>& scratch, bool any) {
    const V weight(row.weight), factor(static_cast<C>(grad / row.sum));
    for (int64_t begin = 0; begin < args.genes; begin += kBlock) {
      const int64_t n = std::min(kBlock, args.genes - begin);
      const C *grads = scratch.grads.data() + begin, *exponentials = scratch.exponentials.data() + begin;
      C* out = destination(args.d_mean, r, begin, args.genes, scratch.d_mean);
      for (int64_t i = 0; i < n; i += W) {
        const int64_t lanes = std::min(W, n - i);
        const V d = (load_lanes(grads + i, lanes) - load_lanes(exponentials + i, lanes) * factor) * weight;
        store_lanes(any ? d : V(0), out + i, lanes);
      }
      store(args.d_mean, r, begin, n, args.genes, scratch.d_mean);
    }
  }

  static void run(const CountArgs& args) {
    const int64_t rows = args.rows, genes = args.genes, step = rows_of_chunk(rows), chunks = (rows + step - 1) / step;
    SharedDispersion<C> shared;
    if constexpr (kShared) shared = prepare<C>(args);
    std::vector<C> sums(args.d_shared_dispersion ? chunks * genes : 0);
    at::parallel_for(0, chunks, grain(2 * step * genes), [&](int64_t first, int64_t last) {
      auto scratch = std::make_unique<Scratch<C>>();
      if constexpr (kRaw) scratch->exponentials.resize(genes + kBufferSlack);
      if (kRaw && args.d_mean.data) scratch->grads.resize(genes + kBufferSlack);
      if (args.starts) scratch->target.resize(genes + kBufferSlack);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        C* d_shared = args.d_shared_dispersion ? sums.data() + chunk * genes : nullptr;
        for (int64_t r = chunk * step; r < std::min(rows, (chunk + 1) * step); ++r) {
          one_row(args, shared, r, d_shared, *scratch);
        }
      }
    });
    if (!args.d_shared_dispersion) return;
    at::parallel_for(0, genes, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * genes + g];
        args.d_shared_dispersion[g] = sum;
      }
    });
  }
};

template <class C, bool... kFlags>
void run(const CountArgs& args) {
  if constexpr (sizeof...(kFlags) == 3) {
    Kernel<C, kFlags...>::run(args);
  } else {
    const bool flags[] = {args.raw, args.inflated, args.shared_dispersion};
    flags[sizeof...(kFlags)] ? run<C, kFlags..., true>(args) : run<C, kFlags..., false>(args);
  }
}

}  // namespace

void count_nll(const CountArgs& args) { args.in_double ? run<double>(args) : run<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
