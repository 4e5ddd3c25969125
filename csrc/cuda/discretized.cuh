// Mixtures of discretised logistics: computes the nll of each row, the loss and, if requested, the gradient. The planes are those of
// Mixture in cpu/discretized.cpp. One source file for each number of channels includes this header.
//
// A component of a pixel costs some 400 instructions for its 20 numbers and is therefore computed only once: each thread has one
// component of a pixel and keeps it in registers until the pixel's sum over all components is known.
#pragma once
#include "rows.cuh"
//
#include "../math/discretized.h"

namespace fastvae::cuda {

// `slots` is the number of threads per pixel.
struct MixturePlan : TilePlan {
  int slots;
};

constexpr int kSide = 8;  // a tile has a multiple of this number of pixels: 32 bytes of fp32

// The number of blocks that share a multiprocessor's registers.
constexpr int mixture_resident(int64_t channels, int64_t item_size) { return item_size == 8 ? 1 : channels == 3 ? 2 : 3; }

inline MixturePlan plan_for(const MixtureArgs& args) {
  const int64_t slots = fastvae::cuda::slots(mixture_resident(args.channels, cpu::item_size(args.params[0].type)));
  MixturePlan plan{};
  plan.slots = static_cast<int>(std::min<int64_t>(args.components, kThreads / kSide));
  cut_into_tiles(plan, args.rows, args.pixels, kThreads / plan.slots / kSide * kSide, slots);
  return plan;
}

// The results for one component of a pixel; the derivatives are those of its log-mass.
template <class C, int kChannels>
struct Component {
  static constexpr int kBlocks = kChannels == 3 ? 3 : 2;

  // The component contributes e^(logit + linear) * factor, divided by the sum of all e^logit, to the pixel's mass. `logit` and `linear`
  // are kept apart, because their sum would lose the digits of `linear` if logits are large.
  C logit, linear, factor;
  C by_mean[kChannels], by_log_scale[kChannels], by_coefficient[3];

  Component() = default;

  // `at` points to the logit; the other params follow at intervals of `step`.
  template <class T>
  FASTVAE_DEVICE Component(const T* at, int64_t step, const C (&n)[kChannels], const math::Bins<C>& bins) {
    using P = math::Primitives<C>;
    T raw[1 + kBlocks * kChannels];
#pragma unroll
    for (int i = 0; i < 1 + kBlocks * kChannels; ++i) raw[i] = __ldg(at + i * step);
    logit = widened(raw[0]);
    linear = C(0);
    factor = C(1);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      C distance = P::fma(-widened(raw[1 + c * kBlocks]), bins.levels, n[c]);
      // The mean of channel 1 depends on channel 0 through the first coefficient, and that of channel 2 on channels 0 and 1 through the
      // other two.
      C grad[2];
#pragma unroll
      for (int k = 0; k < c; ++k) {
        const math::Tanh<C> tanh(widened(raw[1 + (c + k - 1) * kBlocks + 2]));
        distance = P::fma(-tanh.value, n[k], distance);
        grad[k] = tanh.grad;
      }
      const math::LogMass<C> mass({n[c], bins}, {distance, widened(raw[2 + c * kBlocks]), bins}, bins);
      linear -= mass.linear;
      factor *= mass.one_over;
      by_mean[c] = mass.by_middle * bins.levels;
      by_log_scale[c] = mass.by_log_scale;
#pragma unroll
      for (int k = 0; k < c; ++k) by_coefficient[c + k - 1] = mass.by_middle * n[k] * grad[k];
    }
  }

  template <class T>
  FASTVAE_DEVICE void store(T* at, int64_t step, C by_logit, C share) const {
    *at = narrowed<T>(by_logit);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      at[(1 + c * kBlocks) * step] = narrowed<T>(by_mean[c] * share);
      at[(2 + c * kBlocks) * step] = narrowed<T>(by_log_scale[c] * share);
      if constexpr (kChannels == 3) at[(3 + c * kBlocks) * step] = narrowed<T>(by_coefficient[c] * share);
    }
  }
};

// The sums over some components, stored as multiples of exponentials: e^(logit + linear) * masses, where logit and linear are those of
// the component with the highest logit + linear, and e^top_logit * weights.
template <class C>
struct Mixed {
  C logit, linear, masses, top_logit, weights;

  template <int kChannels>
  FASTVAE_DEVICE explicit Mixed(const Component<C, kChannels>& one)
      : logit(one.logit), linear(one.linear), masses(one.factor), top_logit(one.logit), weights(1) {}
  FASTVAE_DEVICE explicit Mixed(const C* at)
      : logit(at[0]), linear(at[kThreads]), masses(at[2 * kThreads]), top_logit(at[3 * kThreads]), weights(at[4 * kThreads]) {}
  FASTVAE_DEVICE void store(C* at) const {
    at[0] = logit, at[kThreads] = linear, at[2 * kThreads] = masses, at[3 * kThreads] = top_logit, at[4 * kThreads] = weights;
  }

  FASTVAE_DEVICE void add(const Mixed& other) {
    if (add(masses, other.masses, above(other.logit, other.linear), other.logit + other.linear))
      logit = other.logit, linear = other.linear;
    if (add(weights, other.weights, other.top_logit - top_logit, other.top_logit)) top_logit = other.top_logit;
  }

  // The logit + linear of a component, relative to the highest.
  FASTVAE_DEVICE C above(C its_logit, C its_linear) const { return (its_logit - logit) + (its_linear - linear); }

 private:
  // Adds another sum, whose exponent exceeds this one's by `above`. Returns true if the other exponent is the higher one; the caller
  // must then adopt it for the sum.
  static FASTVAE_DEVICE bool add(C& sum, C other_sum, C above, C other_exponent) {
    using P = math::Primitives<C>;
    // If both exponents are minus infinity, because the components are disabled, their difference is NaN.
    const C lowest(-1e38f);
    above = other_exponent < lowest ? lowest : above;
    const bool higher = above > C(0);
    const C ratio = P::exp_bounded(P::neg_abs(above));
    sum = higher ? P::fma(sum, ratio, other_sum) : P::fma(other_sum, ratio, sum);
    return higher;
  }
};

template <int kChannels, class T>
__global__ void __launch_bounds__(kThreads, mixture_resident(kChannels, sizeof(T)))
    mixture_kernel(const __grid_constant__ MixtureArgs args, const __grid_constant__ MixturePlan plan) {
  using C = Compute<T>;
  using P = math::Primitives<C>;
  using One = Component<C, kChannels>;
  FASTVAE_SHARED(C, parts, 5 * kThreads);  // one Mixed per thread
  FASTVAE_SHARED(C, whole, 5 * kThreads);  // one Mixed per pixel, whose sums are replaced by the factors of the components' terms
  FASTVAE_SHARED(double, sums, kThreads);
  FASTVAE_SHARED(double, row_scratch, 2 * kThreads / kWarp);
  FASTVAE_SHARED(double, loss_scratch, kThreads / kWarp);
  const int thread = threadIdx.x, tile = plan.tile, slots = plan.slots, K = static_cast<int>(args.components);
  const bool values = args.loss.data;

  // Adjacent threads access adjacent memory.
  const int slot = args.alternate ? thread % slots : thread / tile, place = args.alternate ? thread / slots : thread % tile;
  const int slot_step = args.alternate ? 1 : tile, place_step = args.alternate ? slots : 1;
  const bool has_slot = slot < slots && place < tile;
  const int its_row = place / plan.width, its_pixel = place - its_row * plan.width;
  // In addition, each of the first `tile` threads sums the components of one pixel.
  const int pixel_row = thread / plan.width, pixel_pixel = thread - pixel_row * plan.width;

  const int64_t planes = int64_t(K) * (1 + One::kBlocks * kChannels);
  const int64_t plane_step = args.alternate ? 1 : args.pixels, pixel_step = args.alternate ? planes : 1;
  const int64_t channel_step = plane_step, data_step = args.alternate ? kChannels : 1;
  const T* params = static_cast<const T*>(args.params[0].data);
  T* grads = static_cast<T*>(args.grads[0].data);
  const uint8_t* target = static_cast<const uint8_t*>(args.target.data);
  C constants[kMaxConstants];
#pragma unroll
  for (int i = 0; i < kMaxConstants; ++i) constants[i] = static_cast<C>(args.constants[i]);
  const math::Bins<C> bins = math::DiscretizedLogistic::bins(constants);

  double loss = 0;
  int turn = 0;
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const TileItem part(plan, item, args.pixels);
    const int64_t first_row = part.first_row, end = part.end;
    const int64_t row = first_row + its_row;
    const bool has_row = has_slot && its_row < plan.rows_each && row < args.rows;
    const bool sums_row = pixel_row < plan.rows_each && first_row + pixel_row < args.rows;
    double sum = 0;
    C weight = static_cast<C>(args.weight);
    if (sums_row && (args.grad_loss.data || args.grad_nll.data))
      weight = static_cast<C>(row_factor(args.grad_loss, args.grad_nll, args.weight, first_row + pixel_row));

    for (int64_t first = part.begin; first < end; first += plan.width) {
      const int64_t pixel = first + its_pixel;
      const bool inside = has_row && pixel < end;
      const bool counted = inside && weight_of<C>(args.weights, cpu::target_row(args, row), pixel) != C(0);
      const int64_t there = pixel * pixel_step + slot * plane_step;
      const T* at = params + (row * args.params[0].row_stride + there);
      C n[kChannels] = {};
      One one{};
      int k = slot;
      if (counted) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const uint8_t level = __ldg(target + cpu::target_row(args, row) * args.target.row_stride + pixel * data_step + c * channel_step);
          n[c] = math::DiscretizedLogistic::half_bins(static_cast<C>(level), bins.levels);
        }
        one = One(at, K * plane_step, n, bins);
        Mixed<C> some(one);
        // If there are more components than threads per pixel, a thread goes through several, and all but the last are computed again
        // for the gradient.
#pragma unroll 1
        for (; k + slots < K; k += slots) {
          at += slots * plane_step;
          one = One(at, K * plane_step, n, bins);
          some.add(Mixed<C>(one));
        }
        some.store(parts + slot * slot_step + place * place_step);
      }
      __syncthreads();
      if (sums_row && first + pixel_pixel < end) {
        const C own = weight_of<C>(args.weights, cpu::target_row(args, first_row + pixel_row), first + pixel_pixel);
        if (own != C(0)) {
          const C* part = parts + thread * place_step;
          Mixed<C> all(part);
          for (int s = 1; s < slots; ++s) all.add(Mixed<C>(part + s * slot_step));
          const C value = P::log(P::divide(all.weights, all.masses)) + (all.top_logit - all.logit) - all.linear;
          sum += static_cast<double>(own) * static_cast<double>(value);
          all.masses = P::divide(weight * own, all.masses), all.weights = P::divide(weight * own, all.weights);
          all.store(whole + thread);
        }
      }
      __syncthreads();
      if (inside && !counted && grads) {
        T* to = grads + (row * args.grads[0].row_stride + there);
        for (; k < K; k += slots, to += slots * plane_step) one.store(to, K * plane_step, C(0), C(0));
      } else if (inside && grads) {
        const Mixed<C> all(whole + place);
        T* to = grads + (row * args.grads[0].row_stride + there + (k - slot) * plane_step);
#pragma unroll 1
        while (true) {
          const C share = -(one.factor * P::exp_bounded(all.above(one.logit, one.linear)) * all.masses);
          one.store(to, K * plane_step, P::fma(P::exp_bounded(one.logit - all.top_logit), all.weights, share), share);
          if (k < slots) break;
          k -= slots;
          at -= slots * plane_step;
          to -= slots * plane_step;
          one = One(at, K * plane_step, n, bins);
        }
      }
    }

    if (values)
      loss += finish_item(args, plan, item, first_row, thread < tile ? thread : -1, sum, sums, row_scratch + (turn ^= kThreads / kWarp));
  }
  if (values)
    finish<double>(args, plan, false, loss, loss_scratch,
                   [&](int64_t row, double sum, double) { return put_row(args, row, sum, beta_of(args) * kl_of(args, row)); });
}

template <int kChannels, class T>
cudaError_t launch_mixture(const MixtureArgs& args, cudaStream_t stream) {
  const MixturePlan plan = plan_for(args);
  return FASTVAE_LAUNCH((mixture_kernel<kChannels, T>), plan.blocks, stream, args, plan);
}

template <int kChannels>
cudaError_t launch_mixture(const MixtureArgs& args, cudaStream_t stream) {
  switch (args.params[0].type) {
    case DType::f32: return launch_mixture<kChannels, float>(args, stream);
    case DType::f64: return launch_mixture<kChannels, double>(args, stream);
    case DType::f16: return launch_mixture<kChannels, Half>(args, stream);
    default: return launch_mixture<kChannels, BFloat16>(args, stream);
  }
}

extern template cudaError_t launch_mixture<1>(const MixtureArgs&, cudaStream_t);
extern template cudaError_t launch_mixture<3>(const MixtureArgs&, cudaStream_t);

}  // namespace fastvae::cuda
