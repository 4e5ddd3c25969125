// Draws several samples from a posterior with their log-densities, and computes the gradients.
#include "latents.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

// The mean and the scale of the rows of a tile, and those of the prior. A row's numbers begin at `stride` times its number in the tile.
template <class C>
struct Moments {
  Buffer<C> mean, mean_factors, sigma, factors;
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
        std::fill_n(sum->data, (tile.rows - 1) * tile.stride + tile.n, C(0));
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
          // A sum of 0 stays 0, whether sigma is infinite or 0.
          const auto unless_zero = [](V sum, V x) FASTVAE_INLINE { return math::Primitives<V>::select(sum == V(0), V(0), x); };
          V d_mu = sum(by_z), d_logvar = unless_zero(sum(by_z_eps), sigma * sum(by_z_eps)) - of_scale;
          if (path) {  // log q by z is -eps / sigma
            d_mu = d_mu - unless_zero(sum(by_q), sum(by_q) / sigma);
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

void log_probs(const LogProbArgs& args) { args.in_double ? log_probs_as<double>(args) : log_probs_as<float>(args); }
void log_probs_grad(const LogProbGradArgs& args) { args.in_double ? log_probs_grad_as<double>(args) : log_probs_grad_as<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
