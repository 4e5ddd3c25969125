// The multinomial likelihood: computes the nll of each row of counts and, if requested, the derivatives by its logits.
//
// The counts of a row are Poisson counts with a given sum n: with the means mu_i = n softmax(a)_i,
//   -log p(t) = sum_i -log Poisson(t_i; mu_i) + log Poisson(n; n).
// In this form nothing cancels, however large the counts are, and an error of the normaliser enters only squared. The term of a count of
// 0 is its mean, so all that is needed of the zeros is the sum of their exponentials. The few other counts are computed in fp64.
#include "../math/counts.h"

#include <ATen/Parallel.h>

#include <memory>
#include <numeric>
#include <vector>

#include "softmax.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

using Wide = Vec<double>;

// The counts of a row that are not 0 and have a weight, in the order of their columns.
struct Counted {
  std::vector<int64_t> columns;
  std::vector<double> t, weights, logits, exponentials, grads;

  int64_t size() const { return static_cast<int64_t>(columns.size()); }
  void add(int64_t column, double count) {
    columns.push_back(column);
    t.push_back(count);
  }
};

template <class C>
struct Scratch {
  Buffer<C> in, out;
  std::vector<C> weights, logits;  // each holds one row, if there are weights
  std::vector<double> values;
  Counted counted;
};

// The stored counts of a row of a sparse target, which may come in any order and more than once.
template <class C>
void read_sparse(const CountArgs& args, int64_t source, Scratch<C>& scratch) {
  const int64_t first = args.starts[source], n = args.starts[source + 1] - first, *columns = args.columns + first;
  scratch.values.resize(n);
  convert_in(args.target_values.data, args.target_values.type, first, scratch.values.data(), n);
  bool ascend = true;
  for (int64_t i = 1; i < n; ++i) ascend &= columns[i - 1] < columns[i];
  Counted& counted = scratch.counted;
  if (ascend) {
    for (int64_t i = 0; i < n; ++i)
      if (scratch.values[i] != 0) counted.add(columns[i], scratch.values[i]);
    return;
  }
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return columns[a] < columns[b]; });
  for (const int64_t i : order) {
    if (counted.size() && counted.columns.back() == columns[i]) counted.t.back() += scratch.values[i];
    else if (scratch.values[i] != 0) counted.add(columns[i], scratch.values[i]);
  }
}

template <class C>
void read_dense(const CountArgs& args, int64_t source, Scratch<C>& scratch) {
  using V = Vec<C>;
  constexpr int64_t W = V::size();
  for (int64_t begin = 0; begin < args.genes; begin += kBlock) {
    const int64_t n = std::min(kBlock, args.genes - begin);
    const C* t = load(args.target, source, begin, n, args.genes, scratch.in);
    for (int64_t i = 0; i < n; i += W) {
      unsigned others = ~static_cast<unsigned>(load_lanes(t + i, std::min(W, n - i)).zero_mask()) & ((1u << W) - 1);
      for (; others; others &= others - 1) {
        const int64_t column = begin + i + __builtin_ctz(others);
        double count = t[column - begin];
        // In fp32, an integer would have been rounded.
        if (t == scratch.in.data) convert_in(args.target.data, args.target.type, source * args.target.row_stride + column, &count, 1);
        scratch.counted.add(column, count);
      }
    }
  }
}

// Reads the weights of a row, removes the counts without a weight from `counted`, and excludes their features from the softmax.
template <class C>
void apply_weights(const CountArgs& args, int64_t r, int64_t source, Scratch<C>& scratch) {
  const int64_t size = args.genes;
  scratch.weights.resize(size + kBufferSlack);
  scratch.logits.resize(size + kBufferSlack);
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = std::min(kBlock, size - begin);
    const C* x = load(args.mean, r, begin, n, size, scratch.in);
    C *weights = scratch.weights.data() + begin, *logits = scratch.logits.data() + begin;
    read(args.weights, source, begin, n, weights);
    for (int64_t i = 0; i < n; ++i) logits[i] = weights[i] == C(0) ? kNothing<C> : x[i];
  }
  Counted& counted = scratch.counted;
  int64_t kept = 0;
  for (int64_t j = 0; j < counted.size(); ++j) {
    const double weight = scratch.weights[counted.columns[j]];
    if (weight == 0) continue;
    counted.columns[kept] = counted.columns[j];
    counted.t[kept++] = counted.t[j];
    counted.weights.push_back(weight);
  }
  counted.columns.resize(kept);
  counted.t.resize(kept);
}

template <class C>
bool has_nan(const C* x, int64_t n) {
  return std::any_of(x, x + n, [](C value) { return std::isnan(value); });
}

double poisson_of_total(double n) {
  double lanes[Wide::size()];
  math::poisson_positive(Wide(n), Wide(n), Wide(n).log()).store(lanes);
  return lanes[0];
}

template <class C>
void one_row(const CountArgs& args, int64_t r, Scratch<C>& scratch) {
  const int64_t size = args.genes, source = target_row(args, r);
  Counted& counted = scratch.counted;
  for (auto* field : {&counted.t, &counted.weights}) field->clear();
  counted.columns.clear();
  args.starts ? read_sparse(args, source, scratch) : read_dense(args, source, scratch);
  const bool weighted = args.weights.data;
  if (weighted) apply_weights(args, r, source, scratch);
  const int64_t count = counted.size();
  for (auto* field : {&counted.logits, &counted.exponentials, &counted.grads}) field->resize(count);
  const auto logits_at = [&](int64_t begin, int64_t n) -> const C* {
    return weighted ? scratch.logits.data() + begin : load(args.mean, r, begin, n, size, scratch.in);
  };

  Scaled zeros;
  int64_t next = 0, top_at = -1;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = std::min(kBlock, size - begin), end = begin + n;
    const C* x = logits_at(begin, n);
    if (next < count && counted.columns[next] < end) {
      if (x != scratch.in.data) std::copy(x, x + n, scratch.in.data);
      x = scratch.in.data;
      for (; next < count && counted.columns[next] < end; ++next) {
        C& logit = scratch.in.data[counted.columns[next] - begin];
        counted.logits[next] = logit;
        logit = kNothing<C>;
        if (top_at < 0 || counted.logits[next] > counted.logits[top_at]) top_at = next;
      }
    }
    zeros.add_logits(x, n);
  }

  double top = zeros.max, total = 0, grad_scale = 0;
  const double weight = args.weight[r * args.weight_stride];
  if (count == 0) {
    // The nll is 0 whatever the logits are, even if they are infinite, but a NaN must not go unseen.
    bool broken = false;
    if (!std::isfinite(zeros.sum))
      for (int64_t begin = 0; begin < size; begin += kBlock) {
        const int64_t n = std::min(kBlock, size - begin);
        broken |= has_nan(logits_at(begin, n), n);
      }
    args.row_nll[r] = broken ? NAN : 0;
    grad_scale = broken ? NAN : 0;
  } else {
    const double top_logit = counted.logits[top_at];
    if (!(top_logit <= top)) top = top_logit;
    const double t_top = counted.t[top_at], w_top = weighted ? counted.weights[top_at] : 1;
    double n = 0, weight_of_others = 0;  // the sum of the counts, and that of the others' weighted counts
    for (int64_t j = 0; j < count; ++j) {
      n += counted.t[j];
      if (j != top_at) weight_of_others += weighted ? counted.weights[j] * counted.t[j] : counted.t[j];
    }
    const double weighted_n = weight_of_others + w_top * t_top, mean_weight = weighted ? weighted_n / n : 1;

    // The likeliest of the counted features is left out of `rest`. If it has nearly all of the probability, its nll and its derivative
    // follow from the little that is left for the others.
    double rest = zeros.sum == 0 ? 0 : zeros.sum * std::exp(zeros.max - top);
    const double of_zeros = rest;
    for (int64_t j = 0; j < count; j += Wide::size()) {
      const int64_t lanes = std::min<int64_t>(Wide::size(), count - j);
      store_lanes((load_lanes(counted.logits.data() + j, lanes) - Wide(top)).exp(), counted.exponentials.data() + j, lanes);
    }
    for (int64_t j = 0; j < count; ++j)
      if (j != top_at) rest += counted.exponentials[j];
    total = rest + counted.exponentials[top_at];
    if (!std::isfinite(top)) total = NAN;

    const Wide scale(n / total), log_offset(std::log(n) - std::log(total)), of_row(weight * mean_weight);
    Sum<double> sum;
    for (int64_t j = 0; j < count; j += Wide::size()) {
      const int64_t lanes = std::min<int64_t>(Wide::size(), count - j);
      const Wide t = load_lanes(counted.t.data() + j, lanes), mu = load_lanes(counted.exponentials.data() + j, lanes) * scale;
      const Wide log_mu = (load_lanes(counted.logits.data() + j, lanes) - Wide(top)) + log_offset;
      Wide term = math::poisson_positive(t, mu, log_mu), own = t * Wide(weight);
      if (weighted) {
        // The terms are those of a row in which every count has the mean weight, and what the count's own weight changes.
        const Wide w = load_lanes(counted.weights.data() + j, lanes);
        term = term * w + (w - Wide(mean_weight)) * (t - mu);
        own = own * w;
      }
      sum.add_lanes(term, lanes);
      store_lanes(mu * of_row - own, counted.grads.data() + j, lanes);
    }
    const double share = counted.exponentials[top_at] / total;
    counted.grads[top_at] = weight * (weight_of_others * share - w_top * t_top * (rest / total));
    args.row_nll[r] = (sum.total() - mean_weight * poisson_of_total(n)) + weighted_n * (of_zeros / total);
    if (std::isnan(total)) args.row_nll[r] = NAN;
    grad_scale = weight * weighted_n / total;
  }
  if (!args.d_mean.data) return;

  next = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = std::min(kBlock, size - begin), end = begin + n;
    C* grad = destination(args.d_mean, r, begin, size, scratch.out);
    if (count == 0) std::fill_n(grad, n, static_cast<C>(grad_scale));
    else softmax(logits_at(begin, n), static_cast<C>(top), static_cast<C>(grad_scale), grad, n);
    for (; next < count && counted.columns[next] < end; ++next)
      grad[counted.columns[next] - begin] = static_cast<C>(counted.grads[next]);
    store(args.d_mean, r, begin, n, size, scratch.out);
  }
}

template <class C>
void run(const CountArgs& args) {
  at::parallel_for(0, args.rows, grain(2 * args.genes), [&](int64_t first, int64_t last) {
    auto scratch = std::make_unique<Scratch<C>>();
    for (int64_t r = first; r < last; ++r) one_row(args, r, *scratch);
  });
}

}  // namespace

void multinomial(const CountArgs& args) { args.in_double ? run<double>(args) : run<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
