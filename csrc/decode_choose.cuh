// The next token: the likeliest, which every block finds for itself, or a draw, which block 0 makes.
//
// All blocks come by here before any starts the next token, and each has found all that it waits for in this one by then. So a
// word of the exchange is written again only after all that read it have. What is passed on here itself is still being read
// when the next token begins, and has two places, for tokens of even and of odd number.
#pragma once

#include "choice.cuh"
#include "decode.cuh"

namespace tinylm::decode {

// Of a block; two barriers, the first one before anything is read.
__device__ inline uint64_t largest_of_block(Here& here, uint64_t key) {
  key = largest(key);
  if (here.lane == 0) here.fixed.keys[here.warp] = key;
  __syncthreads();
  key = largest(here.fixed.keys[here.lane % kWarps]);
  __syncthreads();
  return key;
}

struct Sampler {
  Here& here;
  float* cached;       // null: logits are read from the exchange again each time
  int* bins;           // [kBins]
  float* candidates;   // [kCandidates]
  float* maxima;       // where logits are not cached, or null: [kThreads]; behind it values and tokens of those listed, [kListed]
  const int vocab;

  __device__ explicit Sampler(Here& here)
      : here(here),
        cached(here.plan.logits >= 0 ? reinterpret_cast<float*>(here.shared + here.plan.logits) : nullptr),
        bins(reinterpret_cast<int*>(here.shared + here.plan.bins)),
        candidates(reinterpret_cast<float*>(bins + kBins)),
        maxima(here.plan.lists >= 0 ? reinterpret_cast<float*>(here.shared + here.plan.lists) : nullptr),
        vocab(here.a.shape.vocab) {}

  // Of `values`; null: of all logits, out of the exchange.
  __device__ float at(const float* values, int i) const {
    if (values != nullptr) return values[i];
    return __uint_as_float(static_cast<unsigned>(
        reinterpret_cast<const volatile uint64_t*>(here.a.exchange)[here.plan.at_logits + i]));
  }

  // Waits for all logits, and for all blocks: those without a row of the head have read their last too. The extremes, as
  // keys: of the largest, and of the smallest with its sign turned. Returns the largest that this thread has received.
  __device__ float receive(uint64_t& most, uint64_t& least) const {
    for (int j = here.thread; j < here.plan.blocks; j += kThreads)
      take(here.watch, here.a.exchange + here.plan.at_best + (here.watch.tag % 2 * here.plan.blocks + j) * 2);
    constexpr int kFew = 4;
    most = least = 0;
    const int pairs = (vocab + 1) / 2;
    for (int j = here.thread; j < pairs; j += kFew * kThreads) {
      const uint64_t* at[kFew];
      const int n = min(kFew, (pairs - j + kThreads - 1) / kThreads);
#pragma unroll
      for (int k = 0; k < kFew; ++k) at[k] = here.a.exchange + here.plan.at_logits + 2 * (j + k * kThreads);
      const Pairs<kFew> got = take(here.watch, at, n);
#pragma unroll
      for (int k = 0; k < kFew; ++k) {
        const int i = 2 * (j + k * kThreads);
        const float2 two = got[k];
        if (k >= n) continue;
        const bool both = i + 1 < vocab;
        if (cached != nullptr) {
          cached[i] = two.x;
          if (both) cached[i + 1] = two.y;
        }
        const uint64_t high = rank_key(both ? fmaxf(two.x, two.y) : two.x, i);
        const uint64_t low = rank_key(-(both ? fminf(two.x, two.y) : two.x), i);
        most = high > most ? high : most;
        least = low > least ? low : least;
      }
    }
    const float own = most == 0 ? -INFINITY : value_of(most);
    most = largest_of_block(here, most);
    least = largest_of_block(here, least);
    return own;
  }

  // Lists the logits that are at least `least`, and returns how many they are; more than kListed: some are missing.
  __device__ int list(float least) const {
    float* const values = maxima + kThreads;
    int* const tokens = reinterpret_cast<int*>(values + kListed);
    if (here.thread == 0) here.fixed.count = 0;
    __syncthreads();
    constexpr int kFew = 8;
    const int pairs = (vocab + 1) / 2;
    for (int j = here.thread; j < pairs; j += kFew * kThreads) {
      Pairs<kFew> got;
#pragma unroll
      for (int k = 0; k < kFew; ++k)
        if (j + k * kThreads < pairs)
          got.two[k] = words_at(here.a.exchange + here.plan.at_logits + 2 * (j + k * kThreads));
#pragma unroll
      for (int k = 0; k < kFew; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = 2 * (j + k * kThreads) + i;
          const float v = i == 0 ? got[k].x : got[k].y;
          if (token >= vocab || !(v >= least)) continue;
          const int place = atomicAdd(&here.fixed.count, 1);
          if (place < kListed) values[place] = v, tokens[place] = token;
        }
      }
    }
    __syncthreads();
    const int count = here.fixed.count;
    __syncthreads();  // before it is used for something else
    return count;
  }

  // The k-th largest of `count` values, all being from low to high. Each turn bins what is left between the two and goes on with the
  // bin that it is in, until that is small enough to be sorted out by comparing all with all.
  __device__ float kth_largest(const float* values, int count, int k, float low, float high) const {
    Static& f = here.fixed;
    int need = k;
    while (low < high) {
      const float scale = (kBins - 1) / (high - low);
      auto bin_of = [&](float v) { return min(kBins - 1, max(0, static_cast<int>((v - low) * scale))); };
      if (here.thread < kBins) bins[here.thread] = 0;
      if (here.thread == 0) f.count = 0;
      __syncthreads();
      for (int i = here.thread; i < count; i += kThreads) {
        const float v = at(values, i);
        if (v >= low && v <= high) atomicAdd(&bins[bin_of(v)], 1);
      }
      __syncthreads();
      if (here.warp == 0) {
        constexpr int kEach = kBins / 32;
        const int base = (31 - here.lane) * kEach;  // lane 0 has the highest
        int own = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) own += bins[base + i];
        int above = lower_lanes(own);
        if (above < need && need <= above + own) {
          int i = kEach - 1;
          while (i > 0 && above + bins[base + i] < need) above += bins[base + i--];
          f.bin = base + i, f.need = need - above;
        }
      }
      __syncthreads();
      const int bin = f.bin, members = bins[bin];
      need = f.need;
      if (members <= kCandidates) {
        for (int i = here.thread; i < count; i += kThreads) {
          const float v = at(values, i);
          if (v >= low && v <= high && bin_of(v) == bin) {
            const int place = atomicAdd(&f.count, 1);
            if (place < kCandidates) candidates[place] = v;
          }
        }
        __syncthreads();
        for (int i = here.thread; i < members; i += kThreads) {
          const float v = candidates[i];
          int larger = 0, equal = 0;
          for (int j = 0; j < members; ++j) larger += candidates[j] > v, equal += candidates[j] == v;
          if (larger < need && need <= larger + equal) f.kth = v;  // all that do have the same
        }
        __syncthreads();
        return f.kth;
      }
      uint64_t most = 0, least = 0;
      for (int i = here.thread; i < count; i += kThreads) {
        const float v = at(values, i);
        if (!(v >= low && v <= high && bin_of(v) == bin)) continue;
        const uint64_t up = rank_key(v, 0), down = rank_key(-v, 0);
        most = up > most ? up : most;
        least = down > least ? down : least;
      }
      const float next_high = value_of(largest_of_block(here, most)), next_low = -value_of(largest_of_block(here, least));
      // Members of one bin alone are left, so this ends; unless numbers are not numbers.
      if (!(next_low > low || next_high < high)) return low;
      low = next_low, high = next_high;
    }
    return low;
  }

  // The token for `place`; the same to all threads of the block.
  __device__ int draw(int64_t place) const {
    uint64_t most, least;
    const float own = receive(most, least);
    const float high = value_of(most);
    float threshold = -value_of(least);
    const float* values = cached;
    const int* tokens = nullptr;
    int count = vocab;
    if (const int k = here.a.top_k; k > 0 && k < vocab) {
      // Many logits are not to be read again and again: what is at least as large as the k-th largest of what threads have found
      // to be theirs is few.
      const bool many = maxima != nullptr && k <= kThreads;
      if (many) {
        maxima[here.thread] = own;
        __syncthreads();
        values = maxima, count = kThreads;
      }
      threshold = kth_largest(values, count, k, threshold, high);
      if (many) {
        values = nullptr, count = vocab;
        if (const int listed = list(threshold); listed <= kListed) {
          values = maxima + kThreads, tokens = reinterpret_cast<const int*>(values + kListed), count = listed;
        }
        threshold = kth_largest(values, count, k, threshold, high);
      }
    }
    const float by = 1.0f / here.a.temperature;
    const uint64_t state = here.a.noise_start + static_cast<uint64_t>(place) * here.a.noise_stride;
    uint64_t best = 0;
    for (int i = here.thread; i < count; i += kThreads) {
      const float v = at(values, i);
      if (!(v >= threshold)) continue;
      const uint64_t key = draw_key(v, high, by, state, tokens == nullptr ? i : tokens[i]);
      best = key > best ? key : best;
    }
    return index_of(largest_of_block(here, best));
  }
};

// The token for `place`, of each warp's best logit in `keys`; the same to all threads of all blocks. -1: a block gave up.
// meanwhile(): what there is to do while others' logits are waited for.
template <typename Meanwhile>
__device__ inline int choose(Here& here, int64_t place, const Meanwhile& meanwhile) {
  Static& f = here.fixed;
  const Plan& plan = here.plan;
  const int blocks = plan.blocks, turn = here.watch.tag % 2;
  const int at_best = plan.at_best + turn * blocks * 2, at_id = plan.at_id + turn * 2;
  __syncthreads();
  if (here.warp == 0) {
    const uint64_t best = largest(f.keys[here.lane % kWarps]);
    const float value = best == 0 ? -INFINITY : value_of(best);  // 0: the block has no row of the head
#pragma unroll 1
    for (int copy = here.lane; copy < here.a.copies; copy += 32)
      put_words(here.words_of(copy) + at_best + 2 * here.block,
                word(value, here.watch.tag), word(__int_as_float(index_of(best)), here.watch.tag));
  }
  meanwhile();
  int chosen = 0;
  if (here.a.temperature == 0.0f) {
    if (here.warp == 0) {
      constexpr int kFew = 5;  // 160 blocks at once
      uint64_t key = 0;
      for (int j = here.lane; j < blocks; j += kFew * 32) {
        const uint64_t* at[kFew];
        const int n = min(kFew, (blocks - j + 31) / 32);
#pragma unroll
        for (int k = 0; k < kFew; ++k) at[k] = here.words() + at_best + 2 * (j + k * 32);
        const Pairs<kFew> got = take(here.watch, at, n);
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
          const float2 two = got[k];
          const uint64_t other = k < n ? rank_key(two.x, __float_as_int(two.y)) : 0;
          key = other > key ? other : key;
        }
      }
      chosen = index_of(largest(key));
    }
  } else if (here.block == 0) {
    __syncthreads();  // keys are read above
    chosen = Sampler(here).draw(place);
    if (here.thread == 0) here.put_pair(at_id, __int_as_float(chosen), __int_as_float(chosen), 0, 1);
  } else if (here.thread == 0) {
    chosen = __float_as_int(take(here.watch, here.words() + at_id).x);
  }
  if (here.thread == 0) f.chosen = min(max(chosen, 0), here.a.shape.vocab - 1);
  if (here.watch.dead) f.dead = 1;
  __syncthreads();
  return f.dead ? -1 : f.chosen;
}

}  // namespace tinylm::decode
