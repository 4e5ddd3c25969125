// Reads a posterior once. The forward computes the samples z and the KL; the backward computes the gradients of both and draws the
// same noise again.
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
  for (; i + W <= n; i += W) f(i, std::integral_constant<int64_t, W>());
  if (i < n) f(i, n - i);
}

// sigma = exp(logvar / 2), with the intermediate results that the KL reuses.
template <class C>
auto scale_of(Vec<C> logvar) {
  return math::Primitives<Vec<C>>::exp_parts(logvar * Vec<C>(0.5));
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

template <class C>
void sample_as(const SampleArgs& args) {
  using V = Vec<C>;
  const Tiling whole(args);
  const bool plain = args.form.is_plain();
  std::vector<double> partial(whole.blocks > 1 && args.row_kl ? args.rows * whole.blocks : 0);
  double* sums = whole.blocks > 1 ? partial.data() : args.row_kl;

  for_tiles(args, [&](const Tiling& tiling, int64_t first, int64_t last) {
    Buffer<C> mu_buffer, logvar_buffer, prior_mu_buffer, prior_logvar_buffer, sigma, out_buffer;
    Noise<C> noise(args, tiling);
    for (int64_t task = first; task < last; ++task) {
      const Tile tile(tiling, args, task);
      if (args.draws) noise.draw(tile, 0, {args.mu, args.logvar});
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t row = tile.first_row + i;
        const C* mu = load(args.mu, row, tile.begin, tile.n, args.size, mu_buffer);
        const C* logvar = load(args.logvar, row, tile.begin, tile.n, args.size, logvar_buffer);
        const C* prior_mu = load(args.prior_mu, row, tile.begin, tile.n, args.size, prior_mu_buffer);
        const C* prior_logvar = load(args.prior_logvar, row, tile.begin, tile.n, args.size, prior_logvar_buffer);
        if (!plain) {
          mu = means<C>(args.form, mu, tile.n, mu_buffer.data, nullptr);
          logvar = log_variances<C>(args.form, logvar, tile.n, logvar_buffer.data, nullptr);
          prior_mu = means<C>(args.form, prior_mu, tile.n, prior_mu_buffer.data, nullptr);
          prior_logvar = log_variances<C>(args.form, prior_logvar, tile.n, prior_logvar_buffer.data, nullptr);
        }
        C* element_kl = destination(args.element_kl, row, tile.begin, args.size, out_buffer);
        C* row_sigma = sigma.data + i * tile.stride;
        Sum<C> sum;
        for_lanes<C>(tile.n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
          const V m = load_lanes(mu + j, lanes), v = load_lanes(logvar + j, lanes);
          const auto s = scale_of<C>(v);
          s.exp.store(row_sigma + j);
          const V kl = prior_mu ? math::prior_kl(m, v, load_lanes(prior_mu + j, lanes), load_lanes(prior_logvar + j, lanes)).value
                                : math::standard_kl(m, s).value;
          sum.add_lanes(kl, lanes);
          if (element_kl) store_lanes(kl, element_kl + j, lanes);
        });
        if (sums) sums[row * tiling.blocks + tile.begin / kBlock] = sum.total();
        store(args.element_kl, row, tile.begin, tile.n, args.size, out_buffer);
      }
      for (int64_t k = 0; k < args.draws; ++k) {
        if (k) noise.draw(tile, k, {});
        const Result z_view = shifted(args.z, k * args.z_draw_stride);
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t row = tile.first_row + i;
          const C* mu = load(args.mu, row, tile.begin, tile.n, args.size, mu_buffer);
          if (!plain) mu = means<C>(args.form, mu, tile.n, mu_buffer.data, nullptr);
          const C* eps = noise.row(tile, i);
          const C* row_sigma = sigma.data + i * tile.stride;
          C* z = destination(z_view, row, tile.begin, args.size, out_buffer);
          for (int64_t j = 0; j < tile.n; ++j) z[j] = mu[j] + row_sigma[j] * eps[j];
          store(z_view, row, tile.begin, tile.n, args.size, out_buffer);
        }
      }
    }
  });

  if (!args.row_kl || whole.blocks <= 1) return;
  for (int64_t row = 0; row < args.rows; ++row) {
    double sum = 0;
    for (int64_t b = 0; b < whole.blocks; ++b) sum += sums[row * whole.blocks + b];
    args.row_kl[row] = sum;
  }
}

template <class C>
void sample_grad_as(const SampleGradArgs& args) {
  using V = Vec<C>;
  using P = math::Primitives<V>;
  const V posterior_weight(static_cast<C>(args.posterior_weight)), prior_weight(static_cast<C>(args.prior_weight));
  const bool plain = args.form.is_plain();
  const bool with_kl = args.grad_kl.data;
  const bool kl_per_row = with_kl && args.grad_kl.run_stride == 0 && args.grad_kl.run == 1;

  for_tiles(args, [&](const Tiling& tiling, int64_t first, int64_t last) {
    Buffer<C> mu_buffer, logvar_buffer, prior_mu_buffer, prior_logvar_buffer, grad_z_buffer, grad_kl_buffer;
    Buffer<C> mu_factors, logvar_factors, prior_mu_factors, prior_logvar_factors;
    Buffer<C> sum_grad_z, sum_grad_z_eps, grad_mu_buffer, grad_logvar_buffer, grad_prior_mu_buffer, grad_prior_logvar_buffer;
    Noise<C> noise(args, tiling);
    for (int64_t task = first; task < last; ++task) {
      const Tile tile(tiling, args, task);
      const int64_t draws = args.grad_z.data ? args.draws : 0;
      for (int64_t k = 0; k < draws; ++k) {
        const Operand grad_z_view = shifted(args.grad_z, k * args.grad_z_draw_stride);
        noise.draw(tile, k, {grad_z_view, k ? Operand() : args.mu, k ? Operand() : args.logvar});
        const Result grad_eps_view = shifted(args.grad_eps, k * args.grad_eps_draw_stride);
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t row = tile.first_row + i;
          const C* grad_z = load(grad_z_view, row, tile.begin, tile.n, args.size, grad_z_buffer);
          const C* eps = noise.row(tile, i);
          C* total = sum_grad_z.data + i * tile.stride;
          C* total_eps = sum_grad_z_eps.data + i * tile.stride;
          for (int64_t j = 0; j < tile.n; ++j) {
            total[j] = k ? total[j] + grad_z[j] : grad_z[j];
            total_eps[j] = k ? total_eps[j] + grad_z[j] * eps[j] : grad_z[j] * eps[j];
          }
          if (C* grad_eps = destination(grad_eps_view, row, tile.begin, args.size, grad_mu_buffer)) {
            const C* logvar = load(args.logvar, row, tile.begin, tile.n, args.size, logvar_buffer);
            if (!plain) logvar = log_variances<C>(args.form, logvar, tile.n, logvar_buffer.data, nullptr);
            for_lanes<C>(tile.n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
              store_lanes(load_lanes(grad_z + j, lanes) * scale_of<C>(load_lanes(logvar + j, lanes)).exp, grad_eps + j, lanes);
            });
            store(grad_eps_view, row, tile.begin, tile.n, args.size, grad_mu_buffer);
          }
        }
      }
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t row = tile.first_row + i;
        const C* mu = load(args.mu, row, tile.begin, tile.n, args.size, mu_buffer);
        const C* logvar = load(args.logvar, row, tile.begin, tile.n, args.size, logvar_buffer);
        const C* prior_mu = load(args.prior_mu, row, tile.begin, tile.n, args.size, prior_mu_buffer);
        const C* prior_logvar = load(args.prior_logvar, row, tile.begin, tile.n, args.size, prior_logvar_buffer);
        if (!plain) {
          mu = means(args.form, mu, tile.n, mu_buffer.data, mu_factors.data);
          logvar = log_variances(args.form, logvar, tile.n, logvar_buffer.data, logvar_factors.data);
          prior_mu = means(args.form, prior_mu, tile.n, prior_mu_buffer.data, prior_mu_factors.data);
          prior_logvar = log_variances(args.form, prior_logvar, tile.n, prior_logvar_buffer.data, prior_logvar_factors.data);
        }
        const C* total = draws ? sum_grad_z.data + i * tile.stride : nullptr;
        const C* total_eps = sum_grad_z_eps.data + i * tile.stride;
        C row_weight(0);
        const C* weight = nullptr;
        if (kl_per_row) convert_in(args.grad_kl.data, args.grad_kl.type, row * args.grad_kl.row_stride, &row_weight, 1);
        else weight = load(args.grad_kl, row, tile.begin, tile.n, args.size, grad_kl_buffer);

        const auto out = [&](const Result& view, Buffer<C>& buffer) { return destination(view, row, tile.begin, args.size, buffer); };
        C* grad_mu = out(args.grad_mu, grad_mu_buffer);
        C* grad_logvar = out(args.grad_logvar, grad_logvar_buffer);
        C* grad_prior_mu = out(args.grad_prior_mu, grad_prior_mu_buffer);
        C* grad_prior_logvar = out(args.grad_prior_logvar, grad_prior_logvar_buffer);

        for_lanes<C>(tile.n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
          const V m = load_lanes(mu + j, lanes), v = load_lanes(logvar + j, lanes);
          const auto s = scale_of<C>(v);
          V d_mu(0), d_logvar(0), d_prior_mu(0), d_prior_logvar(0);
          // A KL that is not needed is skipped rather than multiplied by 0, because its gradients may overflow.
          if (with_kl) {
            const V w = weight ? load_lanes(weight + j, lanes) : V(row_weight);
            const auto kl = prior_mu ? math::prior_kl(m, v, load_lanes(prior_mu + j, lanes), load_lanes(prior_logvar + j, lanes))
                                     : math::standard_kl(m, s);
            d_mu = w * kl.d_mu;
            d_logvar = w * kl.d_logvar;
            if (prior_mu) {
              d_prior_mu = P::neg(prior_weight * d_mu);
              d_prior_logvar = prior_weight * w * kl.d_prior_logvar;
              d_mu = posterior_weight * d_mu;
              d_logvar = posterior_weight * d_logvar;
            }
          }
          if (grad_prior_mu) store_lanes(d_prior_mu, grad_prior_mu + j, lanes);
          if (grad_prior_logvar) store_lanes(d_prior_logvar, grad_prior_logvar + j, lanes);
          if (total) {
            d_mu = d_mu + load_lanes(total + j, lanes);
            d_logvar = d_logvar + V(0.5) * s.exp * load_lanes(total_eps + j, lanes);
          }
          if (grad_mu) store_lanes(d_mu, grad_mu + j, lanes);
          if (grad_logvar) store_lanes(d_logvar, grad_logvar + j, lanes);
        });
        if (!plain) {
          chain(grad_logvar, logvar_factors.data, tile.n);
          chain(grad_prior_logvar, prior_logvar_factors.data, tile.n);
          if (args.form.soft != 0) {
            chain(grad_mu, mu_factors.data, tile.n);
            chain(grad_prior_mu, prior_mu_factors.data, tile.n);
          }
        }
        const auto home = [&](const Result& view, const Buffer<C>& buffer) { store(view, row, tile.begin, tile.n, args.size, buffer); };
        home(args.grad_mu, grad_mu_buffer);
        home(args.grad_logvar, grad_logvar_buffer);
        home(args.grad_prior_mu, grad_prior_mu_buffer);
        home(args.grad_prior_logvar, grad_prior_logvar_buffer);
      }
    }
  });
}

// The mean and the scale of the rows of a tile, and those of the prior. A row's numbers begin at `stride` times its number in the tile.
template <class C>
struct Moments {
  Buffer<C> mean, logvar, mean_factors, factors;
  Buffer<C> sigma;
  double log_scale[kBlock / 4];  // the sum of log sigma over the row

  // With `inverse`, sigma is the root of its inverse.
  void read(const Latents& args, const Tile& tile, const Operand& mu_view, const Operand& logvar_view, bool inverse) {
    using V = Vec<C>;
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t row = tile.first_row + i, at = i * tile.stride;
      const C* mu = load(mu_view, row, tile.begin, tile.n, args.size, in_);
      if (!args.form.is_plain()) mu = means(args.form, mu, tile.n, in_.data, mean_factors.data + at);
      std::copy_n(mu, tile.n, mean.data + at);
      const C* v = load(logvar_view, row, tile.begin, tile.n, args.size, in_);
      if (!args.form.is_plain()) v = log_variances(args.form, v, tile.n, in_.data, factors.data + at);
      Sum<C> sum;
      for_lanes<C>(tile.n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
        const V half = load_lanes(v + j, lanes) * V(0.5);
        store_lanes(inverse ? math::inverse_root(half) : math::Primitives<V>::exp(half), sigma.data + at + j, lanes);
        sum.add_lanes(half, lanes);
      });
      log_scale[i] = sum.total();
    }
  }

 private:
  Buffer<C> in_;
};

constexpr double kHalfLog2Pi = 0.91893853320467274178;

template <class C>
void log_probs_as(const LogProbArgs& args) {
  using V = Vec<C>;
  const Tiling whole(args);
  const bool prior = args.prior_mu.data;
  const int64_t sums = args.draws * args.rows;
  std::vector<double> partial(whole.blocks > 1 ? 2 * sums * whole.blocks : 0);

  for_tiles(args, [&](const Tiling& tiling, int64_t first, int64_t last) {
    Moments<C> q, p;
    Buffer<C> out_buffer;
    Noise<C> noise(args, tiling);
    for (int64_t task = first; task < last; ++task) {
      const Tile tile(tiling, args, task);
      q.read(args, tile, args.mu, args.logvar, false);
      if (prior) p.read(args, tile, args.prior_mu, args.prior_logvar, true);
      for (int64_t k = 0; k < args.draws; ++k) {
        noise.draw(tile, k, {});
        const Result z_view = shifted(args.z, k * args.z_draw_stride);
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t row = tile.first_row + i, at = i * tile.stride;
          const C* eps = noise.row(tile, i);
          C* z = destination(z_view, row, tile.begin, args.size, out_buffer);
          Sum<C> of_q, of_p;
          for_lanes<C>(tile.n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
            const V e = load_lanes(eps + j, lanes);
            const V draw = load_lanes(q.mean.data + at + j, lanes) + load_lanes(q.sigma.data + at + j, lanes) * e;
            V standard = draw;
            if (prior) {
              const V root = load_lanes(p.sigma.data + at + j, lanes);
              standard = (draw - load_lanes(p.mean.data + at + j, lanes)) * root * root;
            }
            store_lanes(draw, z + j, lanes);
            of_q.add_lanes(e * e, lanes);
            of_p.add_lanes(standard * standard, lanes);
          });
          store(z_view, row, tile.begin, tile.n, args.size, out_buffer);
          const double constant = kHalfLog2Pi * static_cast<double>(tile.n);
          const double log_q = -(0.5 * of_q.total() + q.log_scale[i] + constant);
          const double log_p = -(0.5 * of_p.total() + (prior ? p.log_scale[i] : 0) + constant);
          const int64_t place = k * args.rows + row;
          if (tiling.blocks > 1) {
            partial[place * tiling.blocks + tile.begin / kBlock] = log_q;
            partial[(sums + place) * tiling.blocks + tile.begin / kBlock] = log_p;
          } else {
            args.log_q[place] = log_q;
            args.log_p[place] = log_p;
          }
        }
      }
    }
  }, args.draws);

  if (whole.blocks == 1) return;
  for (int64_t place = 0; place < sums; ++place) {
    double log_q = 0, log_p = 0;
    for (int64_t b = 0; b < whole.blocks; ++b) {
      log_q += partial[place * whole.blocks + b];
      log_p += partial[(sums + place) * whole.blocks + b];
    }
    args.log_q[place] = log_q;
    args.log_p[place] = log_p;
  }
}

template <class C>
void log_probs_grad_as(const LogProbGradArgs& args) {
  using V = Vec<C>;
  const bool prior = args.prior_mu.data, score = args.grad_log_q && !args.stl, path = args.grad_log_q && args.stl;

  for_tiles(args, [&](const Tiling& tiling, int64_t first, int64_t last) {
    Moments<C> q, p;
    // The sums over draws: d z, eps d z, those of log q by z for `stl`, and the gradients of the prior.
    Buffer<C> by_z, by_z_eps, by_q, by_q_eps, by_prior_mu, by_prior_logvar;
    Buffer<C> grad_z_buffer, grad_mu_buffer, grad_logvar_buffer, grad_prior_mu_buffer, grad_prior_logvar_buffer;
    double sum_q[kBlock / 4], sum_p[kBlock / 4];
    Noise<C> noise(args, tiling);
    for (int64_t task = first; task < last; ++task) {
      const Tile tile(tiling, args, task);
      q.read(args, tile, args.mu, args.logvar, false);
      if (prior) p.read(args, tile, args.prior_mu, args.prior_logvar, true);
      for (Buffer<C>* sum : {&by_z, &by_z_eps, &by_q, &by_q_eps, &by_prior_mu, &by_prior_logvar})
        std::fill_n(sum->data, tile.rows * tile.stride, C(0));
      std::fill_n(sum_q, tile.rows, 0.0);
      std::fill_n(sum_p, tile.rows, 0.0);
      for (int64_t k = 0; k < args.draws; ++k) {
        const Operand grad_z_view = shifted(args.grad_z, k * args.grad_z_draw_stride);
        noise.draw(tile, k, {grad_z_view});
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t row = tile.first_row + i, at = i * tile.stride;
          const C* grad_z = load(grad_z_view, row, tile.begin, tile.n, args.size, grad_z_buffer);
          const C* eps = noise.row(tile, i);
          const double w_q = args.grad_log_q ? args.grad_log_q[k * args.rows + row] : 0;
          const double w_p = args.grad_log_p ? args.grad_log_p[k * args.rows + row] : 0;
          sum_q[i] += w_q;
          sum_p[i] += w_p;
          const V of_q(static_cast<C>(w_q)), of_p(static_cast<C>(w_p));
          const auto add = [&](Buffer<C>& sum, int64_t j, V value, auto lanes) FASTVAE_INLINE {
            store_lanes(load_lanes(sum.data + at + j, lanes) + value, sum.data + at + j, lanes);
          };
          for_lanes<C>(tile.n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
            const V e = load_lanes(eps + j, lanes);
            V d = grad_z ? load_lanes(grad_z + j, lanes) : V(0);
            if (args.grad_log_p) {
              const V z = load_lanes(q.mean.data + at + j, lanes) + load_lanes(q.sigma.data + at + j, lanes) * e;
              if (prior) {
                const V root = load_lanes(p.sigma.data + at + j, lanes);
                const V standard = (z - load_lanes(p.mean.data + at + j, lanes)) * root * root, slope = of_p * standard * root * root;
                d = d - slope;
                add(by_prior_mu, j, slope, lanes);
                add(by_prior_logvar, j, V(0.5) * of_p * standard * standard, lanes);
              } else {
                d = d - of_p * z;
              }
            }
            add(by_z, j, d, lanes);
            add(by_z_eps, j, d * e, lanes);
            if (path) {
              add(by_q, j, of_q * e, lanes);
              add(by_q_eps, j, of_q * e * e, lanes);
            }
          });
        }
      }
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t row = tile.first_row + i, at = i * tile.stride;
        const auto out = [&](const Result& view, Buffer<C>& buffer) { return destination(view, row, tile.begin, args.size, buffer); };
        C* grad_mu = out(args.grad_mu, grad_mu_buffer);
        C* grad_logvar = out(args.grad_logvar, grad_logvar_buffer);
        C* grad_prior_mu = out(args.grad_prior_mu, grad_prior_mu_buffer);
        C* grad_prior_logvar = out(args.grad_prior_logvar, grad_prior_logvar_buffer);
        const V of_scale(static_cast<C>(score ? sum_q[i] : 0)), half_p(static_cast<C>(0.5 * sum_p[i]));
        for_lanes<C>(tile.n, [&](int64_t j, auto lanes) FASTVAE_INLINE {
          const auto sum = [&](const Buffer<C>& buffer) FASTVAE_INLINE { return load_lanes(buffer.data + at + j, lanes); };
          const V sigma = sum(q.sigma);
          V d_mu = sum(by_z), d_logvar = sigma * sum(by_z_eps) - of_scale;
          if (path) {  // log q by z is -eps / sigma
            d_mu = d_mu - sum(by_q) / sigma;
            d_logvar = d_logvar - sum(by_q_eps);
          }
          if (grad_mu) store_lanes(d_mu, grad_mu + j, lanes);
          if (grad_logvar) store_lanes(V(0.5) * d_logvar, grad_logvar + j, lanes);
          if (grad_prior_mu) store_lanes(sum(by_prior_mu), grad_prior_mu + j, lanes);
          if (grad_prior_logvar) store_lanes(sum(by_prior_logvar) - half_p, grad_prior_logvar + j, lanes);
        });
        if (!args.form.is_plain()) {
          chain(grad_logvar, q.factors.data + at, tile.n);
          chain(grad_prior_logvar, p.factors.data + at, tile.n);
          if (args.form.soft != 0) {
            chain(grad_mu, q.mean_factors.data + at, tile.n);
            chain(grad_prior_mu, p.mean_factors.data + at, tile.n);
          }
        }
        const auto home = [&](const Result& view, const Buffer<C>& buffer) { store(view, row, tile.begin, tile.n, args.size, buffer); };
        home(args.grad_mu, grad_mu_buffer);
        home(args.grad_logvar, grad_logvar_buffer);
        home(args.grad_prior_mu, grad_prior_mu_buffer);
        home(args.grad_prior_logvar, grad_prior_logvar_buffer);
      }
    }
  }, args.draws);
}

}  // namespace

void sample(const SampleArgs& args) { args.in_double ? sample_as<double>(args) : sample_as<float>(args); }
void sample_grad(const SampleGradArgs& args) { args.in_double ? sample_grad_as<double>(args) : sample_grad_as<float>(args); }
void log_probs(const LogProbArgs& args) { args.in_double ? log_probs_as<double>(args) : log_probs_as<float>(args); }
void log_probs_grad(const LogProbGradArgs& args) { args.in_double ? log_probs_grad_as<double>(args) : log_probs_grad_as<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
