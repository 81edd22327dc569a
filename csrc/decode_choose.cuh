// The next token: the likeliest, which every block finds for itself, or a draw, which block 0 makes.
//
// All blocks come by here before any starts the next token, and each has found all that it waits for in this one by then. So a
// word of the exchange is written again only after all that read it have. What is passed on here itself is still being read
// when the next token begins, and has two places, for tokens of even and of odd number.
#pragma once

#include "choice.cuh"
#include "decode.cuh"

namespace tinylm::decode {

// A predicate, not a branch, which takes longer than all that is behind it.
__device__ inline void put_item(bool wanted, uint2* to, float logit, int token) {
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %0, 0;\n\t@p st.shared.v2.b32 [%1], {%2, %3};\n\t}" ::"r"(
                   static_cast<unsigned>(wanted)),
               "r"(shared_address(to)), "f"(logit), "r"(token)
               : "memory");
}

// Whether every block has a row of the head, and is known to have come so far where all logits are known.
__device__ inline bool heard(const Here& here) { return here.plan.products[kHead].units >= here.plan.blocks; }

// Draws among the k largest logits. A bound from below: of the largest logits of a warp's lanes as many as k asks of each warp
// reach it. What does, some 2 k logits of many, each warp lists for itself, and bins: so all but a few are known to be among
// the k largest or not, and those few are compared with one another. Three barriers. Where a list would be too long, as a rule
// from k = 350 on, and where threads have no logit each, the k-th largest of all logits is looked for.
//
// One block does this once a token: it takes as long as its instructions are many, because they come from L2.
struct Sampler {
  static_assert((kListable & (kListable - 1)) == 0);
  static constexpr int kFew = kKept;  // pairs of logits that a thread asks for at once
  Here& here;
  int *bins, *heads;  // [kBins]: how many of what is listed are in a bin, and the last of them
  uint2* items;       // [kWarps, kListed]: logits and their tokens, listed by each warp for itself
  int* nexts;         // [kListable]: of each the one before it in its bin; -1: none
  float* members;     // there, when lists are of no use: logits of a bin
  float2* kept;       // [plan.kept, kThreads]: each thread's first pairs
  const int vocab, pairs;

  __device__ explicit Sampler(Here& here)
      : here(here),
        bins(reinterpret_cast<int*>(here.shared + here.plan.sums)),
        heads(bins + kBins),
        items(reinterpret_cast<uint2*>(heads + kBins)),
        nexts(reinterpret_cast<int*>(items + kListable)),
        members(reinterpret_cast<float*>(nexts)),
        kept(reinterpret_cast<float2*>(nexts + kListable)),
        vocab(here.a.shape.vocab),
        pairs((vocab + 1) / 2) {}

  // Of pairs j, j + kThreads, ..., n of them, once they are there.
  __device__ int find(const uint64_t* (&at)[kFew], int j) const {
#pragma unroll
    for (int k = 0; k < kFew; ++k) at[k] = here.a.exchange + here.plan.at_logits + 2 * (j + k * kThreads);
    return min(kFew, (pairs - j + kThreads - 1) / kThreads);
  }
  // f(pair, logits) of each of this thread's pairs, and, for others that have more, of some that are none: `pairs` or more.
  template <typename F>
  __device__ void each_pair(const F& f) const {
#pragma unroll 1
    for (int k = 0; k < here.plan.kept && k * kThreads < pairs; ++k)
      f(k * kThreads + here.thread, kept[k * kThreads + here.thread]);
#pragma unroll 1
    for (int begin = here.plan.kept * kThreads; begin < pairs; begin += kFew * kThreads) {
      const uint64_t* at[kFew];
      const int n = find(at, begin + here.thread);
      Pairs<kFew> few;
      few.ask(at, n);
#pragma unroll
      for (int k = 0; k < kFew; ++k)
        if (begin + k * kThreads < pairs) f(begin + k * kThreads + here.thread, few[k]);
    }
  }
  // f(logit, token) of each.
  template <typename F>
  __device__ void each(const F& f) const {
    each_pair([&](int j, float2 two) {
      if (j < pairs) f(two.x, 2 * j);
      if (2 * j + 1 < vocab) f(two.y, 2 * j + 1);
    });
  }

  // Waits for all logits, and for all blocks: for one that has a row of the head its logit speaks. Returns the largest of this
  // thread's.
  __device__ float receive() const {
    if (!heard(here))
      for (int j = here.thread; j < here.plan.blocks; j += kThreads)
        take(here.watch, here.a.exchange + here.plan.at_best + (here.watch.tag % 2 * here.plan.blocks + j) * 2);
    float own = -INFINITY;
#pragma unroll 1
    for (int j = here.thread; j < pairs; j += kFew * kThreads) {
      const uint64_t* at[kFew];
      const int n = find(at, j);
      const Pairs<kFew> few = take(here.watch, at, n);
#pragma unroll
      for (int k = 0; k < kFew; ++k) {
        const float2 two = few[k];
        if (j == here.thread && here.plan.kept > 0) kept[k * kThreads + j] = two;
        if (k < n) own = fmaxf(own, 2 * (j + k * kThreads) + 1 < vocab ? fmaxf(two.x, two.y) : two.x);
      }
    }
    return own;
  }

  // Of the block: the largest and the smallest. A barrier; not to be called again before another one.
  __device__ float2 extremes(float most, float least) const {
    uint64_t* const of_warps = here.fixed.extremes;
    const unsigned high = largest(ordered(most)), low = largest(~ordered(least));
    if (here.lane == 0) of_warps[here.warp] = uint64_t{high} << 32 | low;
    __syncthreads();
    const uint64_t both = of_warps[here.lane % kWarps];
    return make_float2(value_of_ordered(largest(static_cast<unsigned>(both >> 32))),
                       value_of_ordered(~largest(static_cast<unsigned>(both))));
  }

  // Nothing is in a bin, nor counted; to be used after a barrier.
  __device__ void clear() const {
    if (here.thread < kBins) bins[here.thread] = 0, heads[here.thread] = -1;
    if (here.thread == 0) here.fixed.too_many = here.fixed.met = 0;
  }
  struct Scale {
    float low, by;
    __device__ Scale(float high, float low) : low(low), by(high > low ? (kBins - 1) / (high - low) : 0.0f) {}
    // The last bits of a sum with 2^23 are an integer.
    __device__ int bin(float v) const {
      return min(kBins - 1, max(0, __float_as_int(fmaf(v - low, by, 0x1p23f)) - __float_as_int(0x1p23f)));
    }
  };
  // The k-th largest of what has been binned: the `need`-th of the `members` of `bin`.
  struct Cut {
    int bin, need, members;
  };
  __device__ Cut cut(int k) const {
    constexpr int kEach = kBins / 32;
    static_assert(kEach == 8);
    const int base = (31 - here.lane) * kEach;  // lane 0 has the highest
    const int4 *from = reinterpret_cast<const int4*>(bins + base), low = from[0], high = from[1];
    const int counts[kEach] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
    const int own = ((high.w + high.z) + (high.y + high.x)) + ((low.w + low.z) + (low.y + low.x));
    Cut cut{base + kEach - 1, k - lower_lanes(own), counts[0]};
    const unsigned has = __ballot_sync(~0u, 0 < cut.need && cut.need <= own);
#pragma unroll
    for (int i = 1; i < kEach; ++i)
      if (cut.bin == base + kEach - i && cut.need > cut.members) cut = {cut.bin - 1, cut.need - cut.members, counts[i]};
    const int lane = has == 0 ? 31 : __ffs(has) - 1;  // 0: numbers are no numbers
    return {__shfl_sync(~0u, cut.bin, lane), __shfl_sync(~0u, cut.need, lane), __shfl_sync(~0u, cut.members, lane)};
  }

  __device__ float logit(int item) const { return __uint_as_float(items[item].x); }
  // Lists and bins what of the warp's is not less than `bound`, items `begin` on, and returns how many they are. A barrier.
  __device__ int list(float bound, const Scale& scale, int begin) const {
    int count = 0;
    each_pair([&](int j, float2 two) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 2 * j + i;
        const float v = i == 0 ? two.x : two.y;
        const bool hit = token < vocab && v >= bound;
        const unsigned hits = __ballot_sync(~0u, hit);
        const int place = count + __popc(hits & ((1u << here.lane) - 1));
        put_item(hit && place < kListed, items + begin + place, v, token);
        count += __popc(hits);
      }
    });
    if (count > kListed) here.fixed.too_many = 1;
    __syncwarp();
#pragma unroll 1
    for (int i = begin + here.lane; i < begin + min(count, kListed); i += 32) {
      const int bin = scale.bin(logit(i));
      atomicAdd(&bins[bin], 1);
      nexts[i] = atomicExch(&heads[bin], i);
    }
    __syncthreads();
    return count;
  }

  // The k-th largest of all logits. Each turn bins what is left between two of them and goes on with the bin that it is in,
  // until that is small enough to be sorted out by comparing all with all.
  __device__ float kth_largest(int k) const {
    Static& f = here.fixed;
    auto extremes_of = [&](auto&& wanted) {
      float most = -INFINITY, least = INFINITY;
      each([&](float v, int) {
        if (wanted(v)) most = fmaxf(most, v), least = fminf(least, v);
      });
      return extremes(most, least);
    };
    __syncthreads();  // for the extremes
    float2 ends = extremes_of([](float) { return true; });
    while (ends.y < ends.x) {
      const Scale scale(ends.x, ends.y);
      clear();
      __syncthreads();
      auto inside = [&](float v) { return v >= ends.y && v <= ends.x; };
      each([&](float v, int) {
        if (inside(v)) atomicAdd(&bins[scale.bin(v)], 1);
      });
      __syncthreads();
      const Cut found = cut(k);
      k = found.need;
      auto member = [&](float v) { return inside(v) && scale.bin(v) == found.bin; };
      if (found.members <= kListable) {
        each([&](float v, int) {
          if (!member(v)) return;
          if (const int place = atomicAdd(&f.met, 1); place < kListable) members[place] = v;
        });
        __syncthreads();
        for (int i = here.thread; i < found.members; i += kThreads) {
          const float v = members[i];
          int larger = 0, equal = 0;
          for (int j = 0; j < found.members; ++j) larger += members[j] > v, equal += members[j] == v;
          if (larger < k && k <= larger + equal) f.kth = v;  // all that do have the same
        }
        __syncthreads();
        return f.kth;
      }
      const float2 next = extremes_of(member);
      // Members of one bin alone are left, so this ends; unless numbers are no numbers, or infinite.
      if (!(next.y > ends.y || next.x < ends.x)) break;
      ends = next;
    }
    return ends.y;
  }

  // The token for `place`; the same to all threads of the block.
  __device__ int draw(int64_t place) const {
    const int k = here.a.top_k;
    const float by = 1.0f / here.a.temperature;
    const uint64_t state = here.a.noise_start + static_cast<uint64_t>(place) * here.a.noise_stride;
    clear();
    const float own = receive();
    const int of_warp = (k + kWarps - 1) / kWarps;
    int larger = 0;
#pragma unroll 8
    for (int i = 0; i < 32; ++i) larger += __shfl_xor_sync(~0u, own, i) > own;
    const float2 ends = extremes(own, larger < of_warp ? own : INFINITY);
    uint64_t best = 0;
    auto consider = [&](float v, int token) {
      const uint64_t key = draw_key(v, ends.x, by, state, token);
      best = key > best ? key : best;
    };
    const Scale scale(ends.x, ends.y);
    const bool lists = 0 < k && k <= kThreads && kThreads <= pairs;
    const int begin = here.warp * kListed, listed = lists ? list(ends.y, scale, begin) : 0;
    if (lists && !here.fixed.too_many) {
      const Cut found = cut(k);
#pragma unroll 1
      for (int i = begin + here.lane; i < begin + listed; i += 32) {
        const float v = logit(i);
        const int bin = scale.bin(v);
        if (bin < found.bin) continue;
        int larger = 0;
        if (bin == found.bin) {
#pragma unroll 1
          for (int item = heads[bin], left = min(found.members, kListable); left > 0; --left) {
            item &= kListable - 1;  // in a launch that has failed, other blocks may have written here
            larger += logit(item) > v;
            item = nexts[item];
          }
        }
        if (larger < found.need) consider(v, static_cast<int>(items[i].y));
      }
    } else {
      const float least = k > 0 ? kth_largest(k) : -INFINITY;
      each([&](float v, int token) {
        if (v >= least) consider(v, token);
      });
    }
    best = largest(best);
    if (here.lane == 0) here.fixed.drawn[here.warp] = best;
    __syncthreads();
    return index_of(largest(here.fixed.drawn[here.lane % kWarps]));
  }
};

// The token for `place`, the likeliest being that of the warps' best logits in `keys`; the same to all threads of all blocks.
// -1: a block gave up.
// meanwhile(): what there is to do while others' logits are waited for.
template <typename Meanwhile>
__device__ inline int choose(Here& here, int64_t place, const Meanwhile& meanwhile) {
  Static& f = here.fixed;
  const Plan& plan = here.plan;
  const int blocks = plan.blocks, turn = here.watch.tag % 2;
  const int at_best = plan.at_best + turn * blocks * 2, at_id = plan.at_id + turn * 2;
  const bool greedy = here.a.temperature == 0.0f;
  if (greedy || !heard(here)) __syncthreads();
  if (here.warp == 0 && (greedy || !heard(here))) {
    const uint64_t best = largest(f.keys[here.lane % kWarps]);
    const float value = best == 0 ? -INFINITY : value_of(best);  // 0: the block has no row of the head
#pragma unroll 1
    for (int copy = here.lane; copy < here.a.copies; copy += 32)
      put_words(here.words_of(copy) + at_best + 2 * here.block,
                word(value, here.watch.tag), word(__int_as_float(index_of(best)), here.watch.tag));
  }
  meanwhile();
  int chosen = 0;
  if (greedy) {
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
    chosen = Sampler(here).draw(place);
    if (here.warp == 0) here.put_pair(at_id, __int_as_float(chosen), __int_as_float(chosen), here.lane, 32);
  } else if (here.thread == 0) {
    chosen = __float_as_int(take(here.watch, here.words() + at_id).x);
  }
  if (here.thread == 0) f.chosen = min(max(chosen, 0), here.a.shape.vocab - 1);
  if (here.watch.dead) f.dead = 1;
  __syncthreads();
  return f.dead ? -1 : f.chosen;
}

}  // namespace tinylm::decode
