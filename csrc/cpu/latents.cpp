// Reads a posterior once. The forward computes the samples z and the KL; the backward computes the gradients of both and draws the
// same noise again.
#include "latents.h"

namespace fastvae::cpu::FASTVAE_ISA {
namespace {

// sigma = exp(logvar / 2), with the intermediate results that the KL reuses.
template <class C>
auto scale_of(Vec<C> logvar) {
  return math::Primitives<Vec<C>>::exp_parts(logvar * Vec<C>(0.5));
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

}  // namespace

void sample(const SampleArgs& args) { args.in_double ? sample_as<double>(args) : sample_as<float>(args); }
void sample_grad(const SampleGradArgs& args) { args.in_double ? sample_grad_as<double>(args) : sample_grad_as<float>(args); }

}  // namespace fastvae::cpu::FASTVAE_ISA
