// Attention of one new token: block (key head, split) takes a run of positions, for all query heads of the group.
//
// A position is always the same block's within a launch: it reads the token's key and value from the exchange, appends them
// to the cache, and is the only one that reads them there again before the launch ends. So no fence is needed: what a block
// wrote before a barrier of its own, its threads find after it. Positions from before the launch were there when it began.
#pragma once

#include "decode.cuh"

namespace tinylm::decode {

// A sum of values weighted by 2^score, kept in units of 2^most.
template <int N>
struct Weighted {
  float most = -INFINITY, total = 0.0f;
  alignas(16) float sum[N] = {};

  // What the sums are to be multiplied by, so that a score up to `next` fits. -inf alone has nothing to multiply.
  __device__ float raise(float next) {
    next = fmaxf(most, next);
    const float by = most == next ? 1.0f : exp2_fast(most - next);
    most = next;
    return by;
  }
  __device__ float weight(float score) const { return score == -INFINITY ? 0.0f : exp2_fast(score - most); }
  __device__ void scale(float by) {
    total *= by;
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] *= by;
  }
  // Of all lanes whose number differs in bits from `low` up to, not including, `high`. Branches, not a loop: the shuffles of
  // a step are on their way together.
  __device__ void meet(int low, int high) {
    float next = most;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2)
      if (offset >= low && offset < high) next = fmaxf(next, __shfl_xor_sync(~0u, next, offset));
    scale(raise(next));
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      if (offset < low || offset >= high) continue;
      total += __shfl_xor_sync(~0u, total, offset);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
    }
  }
};

template <typename T>
struct Attention {
  Here& here;
  const Splits& splits;
  const int &group, &width;  // query heads of a key head; head_dim
  const int &kv_head, &split;

  __device__ Attention(Here& here, const Splits& splits)
      : here(here),
        splits(splits),
        group(here.plan.group),
        width(here.a.shape.head_dim),
        kv_head(here.fixed.kv_head),
        split(here.fixed.split) {}

  __device__ T* ring_keys() const { return reinterpret_cast<T*>(here.shared + here.plan.ring); }
  __device__ T* ring_values() const { return ring_keys() + 2 * here.plan.tile * width; }
  // Queries, [group, width], times log2(e) / sqrt(width); key and value of the token; and of every warp, [kWarps, width + 4],
  // sums, most, total.
  __device__ float* queries() const { return reinterpret_cast<float*>(here.shared + here.plan.scratch); }
  __device__ T* newest() const { return reinterpret_cast<T*>(queries() + group * width); }
  __device__ float* of_warps() const { return reinterpret_cast<float*>(newest() + 2 * width); }

  // Which head the even number `row` of a vector of heads is of: pairs are qkv's units, in runs of half a head.
  __device__ static int head_of(const Here& here, int row) { return run_of(here.plan.products[kQkv], row / 2); }

  // Of a run's positions, those before `position`.
  __device__ int before(int position) const { return min(max(position - split * splits.span, 0), splits.span); }
  __device__ int64_t row_of(int layer, int position) const {
    return ((int64_t{layer} * here.a.shape.kv_heads + kv_head) * here.a.context + position) * width;
  }

  // Asks for keys and values of the run's positions from to `to`, to places of the ring from `place` on.
  __device__ void ask(int layer, int from, int to, int place) const {
    const int64_t start = row_of(layer, split * splits.span + from);
    const T *keys = static_cast<const T*>(here.a.keys) + start, *values = static_cast<const T*>(here.a.values) + start;
#pragma unroll 1
    for (int i = here.thread * 8; i < (to - from) * width; i += kThreads * 8) {
      copy16(reinterpret_cast<uint4*>(ring_keys() + place * width + i), keys + i);
      copy16(reinterpret_cast<uint4*>(ring_values() + place * width + i), values + i);
    }
  }
  // What of a layer can be there before the token at `position` is: a group of copies.
  __device__ void prefetch(int layer, int position) const {
    if (split >= 0) ask(layer, 0, min(before(position), 2 * here.plan.tile), 0);
    copies_commit();
  }

  // The token's own vectors, out of the exchange; its key and value into the cache too, if the position is this block's.
  __device__ void receive(int layer_words, int layer, int position, bool own) const {
    const Shape& s = here.a.shape;
    const int asked = group * width, all = asked + (own ? 2 * width : 0);
    const float scale = kLog2e * rsqrtf(static_cast<float>(width));
    const int at = layer_words + here.plan.at[kQkv];
    const int64_t row = row_of(layer, position);
#pragma unroll 1
    for (int j = 2 * here.thread; j < all; j += 2 * kThreads) {
      // i < 0: of a query, i < width: of the key, else of the value.
      const int i = j - asked, of_head = i < width ? i : i - width, head = s.heads + (i < width ? 0 : s.kv_heads) + kv_head;
      const int from = i < 0 ? kv_head * asked + j : head * width + of_head;
      T* stream = static_cast<T*>(i < width ? here.a.keys : here.a.values) + row + of_head;
      const float2 two = take(here.watch, here.words() + at + from);
      if (i < 0) {
        *reinterpret_cast<float2*>(queries() + j) = make_float2(two.x * scale, two.y * scale);
      } else {
        const unsigned narrow = narrow2(two, T());
        *reinterpret_cast<unsigned*>(newest() + i) = narrow;
        *reinterpret_cast<unsigned*>(stream) = narrow;
      }
    }
  }

  // Positions from to `to` of the run, place `p - shift` of the ring, or `newest` for the one at `old`: a query head a warp,
  // its positions shared out among the warps that have the same one, and 8 numbers of a row a lane.
  struct Lanes {
    int slots, slot, first;  // positions of a warp at once; of this lane; its numbers' place
    int head, part, parts;
  };
  // U positions of each lane, from `base` on, those before `to`.
  template <int U>
  __device__ void attend(Weighted<8>& to_add, const Lanes& lanes, const float (&q)[8], int base, int to, int shift,
                         int old) const {
    const bool mine = lanes.first < width;
    const int step = lanes.parts * lanes.slots;
    float score[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int p = base + lanes.slot + u * step;
      score[u] = 0.0f;
      if (p < to && mine) {
        const T* key = p == old ? newest() : ring_keys() + (p - shift) * width;
        float k[8];
        unpack(Pack<T>{*reinterpret_cast<const uint4*>(key + lanes.first)}, k);
        float odd = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i += 2) score[u] = fmaf(q[i], k[i], score[u]), odd = fmaf(q[i + 1], k[i + 1], odd);
        score[u] += odd;
      }
    }
#pragma unroll
    for (int offset = 1; offset < 16; offset *= 2) {
      if (offset >= here.plan.lanes) break;
#pragma unroll
      for (int u = 0; u < U; ++u) score[u] += __shfl_xor_sync(~0u, score[u], offset);
    }
    float most = -INFINITY;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (base + lanes.slot + u * step >= to) score[u] = -INFINITY;
      most = fmaxf(most, score[u]);
    }
    to_add.scale(to_add.raise(most));
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int p = base + lanes.slot + u * step;
      const float weight = to_add.weight(score[u]);
      to_add.total += weight;
      if (p < to && mine) {
        const T* value = p == old ? newest() + width : ring_values() + (p - shift) * width;
        float v[8];
        unpack(Pack<T>{*reinterpret_cast<const uint4*>(value + lanes.first)}, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) to_add.sum[i] = fmaf(weight, v[i], to_add.sum[i]);
      }
    }
  }
  __device__ void attend(Weighted<8>& sum, const Lanes& lanes, const float (&q)[8], int from, int to, int shift,
                         int old) const {
    const int step = lanes.parts * lanes.slots;
#pragma unroll 1
    for (int base = from + lanes.part * lanes.slots; base < to;) {
      // No more at once than there are: instructions that do nothing take the time of those of other warps.
      if (base + 2 * step < to) {
        attend<4>(sum, lanes, q, base, to, shift, old);
        base += 4 * step;
      } else {
        attend<2>(sum, lanes, q, base, to, shift, old);
        base += 2 * step;
      }
    }
  }

  // The phase: attention over this block's positions, into the exchange.
  __device__ void run(int layer_words, int layer, int position) const {
    const int old = before(position);
    const bool own = position >= split * splits.span && position < (split + 1) * splits.span;
    const int count = old + (own ? 1 : 0);
    if (split < 0 || count == 0) return;
    here.watch.where = layer * 16 + kAttention;
    receive(layer_words, layer, position, own);
    copies_left<3>();  // three at least were asked for after this one
    __syncthreads();

    Lanes lanes;
    lanes.slots = 32 >> here.plan.lanes_log2, lanes.slot = here.lane >> here.plan.lanes_log2;
    lanes.first = (here.lane & (here.plan.lanes - 1)) * 8;
    lanes.parts = here.fixed.group_parts, lanes.part = here.fixed.group_part[here.warp];
    lanes.head = here.fixed.group_head[here.warp];
    const bool busy = lanes.part < lanes.parts;
    alignas(16) float q[8] = {};
    if (lanes.first < width) {
#pragma unroll
      for (int i = 0; i < 8; i += 4)
        *reinterpret_cast<float4*>(q + i) =
            *reinterpret_cast<const float4*>(queries() + lanes.head * width + lanes.first + i);
    }
    Weighted<8> sum;
    // A long run goes through the ring half by half: one is read while the other is filled. The first two were asked for a
    // layer ago.
    const bool whole = count <= 2 * here.plan.tile;
    const int tile = whole ? count : here.plan.tile, tiles = whole ? 1 : (count + tile - 1) / tile;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      if (t >= 2) {
        t + 1 < tiles ? copies_left<1>() : copies_left<0>();
        __syncthreads();
      }
      if (busy) attend(sum, lanes, q, t * tile, min(count, (t + 1) * tile), (t & ~1) * tile, old);
      if (t + 2 < tiles) {
        __syncthreads();
        ask(layer, (t + 2) * tile, min(old, (t + 3) * tile), (t & 1) * tile);
        copies_commit();
      }
    }
    sum.meet(here.plan.lanes, 32);
    const int pitch = width + 4;
    if (busy && lanes.slot == 0 && lanes.first < width) {
      float* to = of_warps() + here.warp * pitch;
#pragma unroll
      for (int i = 0; i < 8; i += 4)
        *reinterpret_cast<float4*>(to + lanes.first + i) = *reinterpret_cast<const float4*>(sum.sum + i);
      if (lanes.first == 0) to[width] = sum.most, to[width + 1] = sum.total;
    }
    __syncthreads();
    // Four parts a lane, of up to four lanes to a pair of numbers.
    constexpr int kEach = 4;
    const int pairs = group * width / 2, log2 = kEach * pairs <= kThreads ? 2 : 2 * pairs <= kThreads ? 1 : 0, each = 1 << log2;
    static_assert(kEach * 4 >= kWarps);  // and where lanes are fewer, so are parts: head_dim is 128 at most
    if (here.warp * 32 >= each * pairs) return;
    const int pair = here.thread >> log2, first = here.thread & (each - 1);
    const int head = head_of(here, 2 * pair), of_head = 2 * pair - head * width;
    float most[kEach], total[kEach];
    float2 two[kEach];
    Weighted<2> both;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int part = first + k * each;
      const bool is = part < lanes.parts && pair < pairs;
      const float* from = of_warps() + (is ? part * group + head : 0) * pitch;
      most[k] = is ? from[width] : -INFINITY, total[k] = from[width + 1];
      two[k] = *reinterpret_cast<const float2*>(from + (is ? of_head : 0));
      both.most = fmaxf(both.most, most[k]);
    }
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2)
      if (offset < each) both.most = fmaxf(both.most, __shfl_xor_sync(~0u, both.most, offset));
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float weight = both.weight(most[k]);
      both.total = fmaf(weight, total[k], both.total);
      both.sum[0] = fmaf(weight, two[k].x, both.sum[0]), both.sum[1] = fmaf(weight, two[k].y, both.sum[1]);
    }
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      if (offset >= each) break;
      both.total += __shfl_xor_sync(~0u, both.total, offset);
      both.sum[0] += __shfl_xor_sync(~0u, both.sum[0], offset);
      both.sum[1] += __shfl_xor_sync(~0u, both.sum[1], offset);
    }
    if (pair >= pairs) return;
    const float by = __fdividef(1.0f, both.total);
    const int query_head = kv_head * group + head;
    const int row = query_head * width + of_head, all = here.a.shape.heads * width;
    const int at = layer_words + (splits.count == 1 ? here.plan.at_attention : here.plan.at_parts + split * all) + row;
    here.put_pair(at, both.sum[0] * by, both.sum[1] * by, first, each);
    if (splits.count > 1 && of_head == 0) {
      const float lse = both.most + __log2f(both.total);
      here.put_pair(layer_words + here.plan.at_lse + 2 * (split * here.a.shape.heads + query_head), lse, lse, first, each);
    }
  }

  // Adds results first + k, k < kFew, of those before `end`, of numbers row, row + 1 of all query heads' outputs.
  static constexpr int kFew = 4;
  __device__ static void add(Here& here, Weighted<2>& sum, int layer_words, int row, int first, int end) {
    const int heads = here.a.shape.heads, all = heads * here.a.shape.head_dim, head = head_of(here, row);
    const uint64_t* at[2 * kFew];
    int n = 0;
#pragma unroll
    for (int k = 0; k < kFew; ++k) {
      const int split = min(first + k, end - 1);
      at[2 * k] = here.words() + layer_words + here.plan.at_parts + split * all + row;
      at[2 * k + 1] = here.words() + layer_words + here.plan.at_lse + 2 * (split * heads + head);
      if (first + k < end) n = 2 * k + 2;
    }
    const Pairs<2 * kFew> got = take(here.watch, at, n);
    float most = -INFINITY;
#pragma unroll
    for (int k = 0; k < kFew; ++k)
      if (2 * k < n) most = fmaxf(most, got[2 * k + 1].x);
    sum.scale(sum.raise(most));
#pragma unroll
    for (int k = 0; k < kFew; ++k) {
      const float weight = 2 * k < n ? sum.weight(got[2 * k + 1].x) : 0.0f;
      sum.total += weight;
      sum.sum[0] = fmaf(weight, got[2 * k].x, sum.sum[0]), sum.sum[1] = fmaf(weight, got[2 * k].y, sum.sum[1]);
    }
  }

  // Where there are many runs, `end` of them begun, their results are added up by the blocks of their key head, a pair of
  // numbers a warp and a run a lane.
  __device__ void combine(int layer_words, int layer, int end) const {
    if (split < 0) return;
    here.watch.where = layer * 16 + kCombine;
    const int heads = here.a.shape.heads, all = heads * width;
#pragma unroll 1
    for (int pair = split + splits.count * here.warp; pair < group * width / 2; pair += splits.count * kWarps) {
      const int row = kv_head * group * width + 2 * pair, head = head_of(here, row);
      Weighted<2> sum;
#pragma unroll 1
      for (int run = here.lane; run < end; run += 32) {
        const uint64_t* from = here.words() + layer_words;
        const uint64_t* const at[2] = {from + here.plan.at_parts + run * all + row,
                                       from + here.plan.at_lse + 2 * (run * heads + head)};
        const Pairs<2> got = take(here.watch, at, 2);
        const float2 two = got[0];
        const float lse = got[1].x;
        sum.scale(sum.raise(lse));
        const float weight = sum.weight(lse);
        sum.total += weight;
        sum.sum[0] = fmaf(weight, two.x, sum.sum[0]), sum.sum[1] = fmaf(weight, two.y, sum.sum[1]);
      }
      sum.meet(1, 32);
      const float by = __fdividef(1.0f, sum.total);
      here.put_pair(layer_words + here.plan.at_attention + row, sum.sum[0] * by, sum.sum[1] * by, here.lane, 32);
    }
  }

  // Numbers 2 * pair, 2 * pair + 1 of all query heads' outputs, of a few runs; `end` of them are begun.
  __device__ static float2 result(Here& here, int layer_words, int end, int pair) {
    Weighted<2> sum;
#pragma unroll 1
    for (int first = 0; first < end; first += kFew) add(here, sum, layer_words, 2 * pair, first, end);
    const float by = __fdividef(1.0f, sum.total);
    return make_float2(sum.sum[0] * by, sum.sum[1] * by);
  }
};

}  // namespace tinylm::decode
