// Attention of one new token: block (key head, split) takes a run of positions, for all query heads of the group, a warp 16
// positions at a time, by tensor cores. Queries and weights, in fp32, go in as two numbers each, in rows h and h + 8 for head h:
// what is nearest in the dtype of keys and values and what that lacks, so that some 16 bits of them count. Blocks of a cluster
// send what each of their warps has summed up to the first one of them, which makes one result of it.
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
  float most = -INFINITY, total = 0.0f, sum[N] = {};

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
  // Of kLanes lanes side by side.
  template <int kLanes>
  __device__ void meet() {
    float next = most;
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) next = fmaxf(next, __shfl_xor_sync(~0u, next, offset));
    scale(raise(next));
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      total += __shfl_xor_sync(~0u, total, offset);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
    }
  }
};

#if __CUDA_ARCH__ >= 800
#define TINYLM_TENSOR_CORES 1
constexpr bool kTensorCores = true;
#else
constexpr bool kTensorCores = false;  // of this kind: Turing has none for bf16, and too few registers for what stands in
#endif

// Four 8 x 8 matrices of 16-bit numbers out of shared memory: lanes 8 i to 8 i + 7 say where the rows of number i are.
template <bool kTransposed>
__device__ inline uint4 matrices(const void* row) {
  uint4 four;
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
                 : "r"(shared_address(row)));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
                 : "r"(shared_address(row)));
  }
  return four;
}
// d [16, 8] += a [16, 16] * b [16, 8], as mma.m16n8k16 has them.
template <typename T>
__device__ inline void multiply_tile(float (&d)[4], const uint4& a, unsigned low, unsigned high) {
#ifdef TINYLM_TENSOR_CORES
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(low), "r"(high));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(low), "r"(high));
  }
#else
  // The same from what other lanes hold.
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto dot = [](unsigned one, unsigned other, float sum) {
    const float2 x = widen2(one, T()), y = widen2(other, T());
    return fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
  };
#pragma unroll 1
  for (int t = 0; t < 4; ++t) {
    const int row = lane / 4 * 4 + t;
    const unsigned a0 = __shfl_sync(~0u, a.x, row), a1 = __shfl_sync(~0u, a.y, row);
    const unsigned a2 = __shfl_sync(~0u, a.z, row), a3 = __shfl_sync(~0u, a.w, row);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = (lane % 4 * 2 + i) * 4 + t;
      const unsigned b0 = __shfl_sync(~0u, low, column), b1 = __shfl_sync(~0u, high, column);
      d[i] = dot(a0, b0, dot(a2, b1, d[i]));
      d[i + 2] = dot(a1, b0, dot(a3, b1, d[i + 2]));
    }
  }
#endif
}
// Two numbers as two of 16 bits each: what is nearest, and what that lacks.
template <typename T>
__device__ inline uint2 split2(float2 two) {
  const unsigned high = narrow2(two, T());
  const float2 near = widen2(high, T());
  return make_uint2(high, narrow2(make_float2(two.x - near.x, two.y - near.y), T()));
}

template <typename T>
struct Attention {
  Here& here;
  const Splits& splits;
  const int &group, &width;  // query heads of a key head; head_dim
  const int &kv_head, &split;
  const int &runs, &rank;  // blocks that have a result together, and which of them this one is
  static constexpr int kEarly = 256;  // so short a run is waited for a product before it is needed

  __device__ Attention(Here& here, const Splits& splits)
      : here(here),
        splits(splits),
        group(here.plan.group),
        width(here.a.shape.head_dim),
        kv_head(here.fixed.kv_head),
        split(here.fixed.split),
        runs(splits.runs),
        rank(here.fixed.rank) {}

  __device__ T* ring_keys() const { return reinterpret_cast<T*>(here.shared + here.plan.ring); }
  __device__ T* ring_values() const { return ring_keys() + 2 * here.plan.tile * width; }
  // Queries times log2(e) / sqrt(width), as the tensor cores take them: for each eight heads and 16 numbers a lane's four
  // pairs; key and value of the token; and the sums of every warp of a result, of each head `plan.pitch` numbers.
  __device__ uint4* queries() const { return reinterpret_cast<uint4*>(here.shared + here.plan.scratch); }
  __device__ T* newest() const { return reinterpret_cast<T*>(queries() + here.plan.eights * here.plan.halves * 4 * 32); }
  __device__ float* of_warps() const { return reinterpret_cast<float*>(here.shared + here.plan.sums); }

  // Where a pair of a result's numbers is: of the first warp's sums, with its head's greatest score and total; in the exchange,
  // from the layer's first word on, or -1: nowhere.
  struct Place {
    uint16_t numbers, extent;
    int at;
  };
  __device__ Place* places() const { return reinterpret_cast<Place*>(here.shared + here.plan.places); }

  // Once, of all threads.
  __device__ void begin() const {
    const int halves = here.plan.halves, eights = here.plan.eights, parts = here.plan.parts;
    if (here.thread < kWarps) {
      const int half = here.thread % halves, eight = here.thread / halves % eights;
      Role& role = here.fixed.roles[here.thread];
      role.part = here.thread / (halves * eights);
      role.heads = role.part < parts ? min(8, group - 8 * eight) : 0;
      role.queries = eight * halves * 4 * 32, role.first = 8 * half;
      role.sums = ((rank * parts + role.part) * group + 8 * eight) * here.plan.pitch + half * 64;
    }
    const int log2 = 4 + halves;
    for (int i = here.thread; i < here.fixed.pairs; i += kThreads) {
      const int head = i >> log2, pair = i & ((1 << log2) - 1), of_head = pair / 32 * 64 + pair % 8 * 8 + pair / 8 % 4 * 2;
      const int at = here.fixed.at_result + (kv_head * group + head) * width + of_head;
      places()[i] = {static_cast<uint16_t>(head * here.plan.pitch + 2 * pair),
                     static_cast<uint16_t>((head + 1) * here.plan.pitch - 4), of_head < width ? at : -1};
    }
    if (here.thread == 0 && runs > 1 && split >= 0) {
      here.fixed.there = place_in(0, of_warps()), here.fixed.there_gathered = place_in(0, &here.fixed.gathered);
    }
    __syncthreads();
  }

  // Which head the even number `row` of a vector of heads is of: pairs are qkv's units, in runs of half a head.
  __device__ static int head_of(const Here& here, int row) { return run_of(here.plan.products[kQkv], row / 2); }

  // Of a run's positions, those before `position`.
  __device__ int before(int position) const { return min(max(position - split * splits.span, 0), splits.span); }
  __device__ int64_t row_of(int layer, int position) const {
    return ((int64_t{layer} * here.a.shape.kv_heads + kv_head) * here.a.context + position) * width;
  }

  // Where 8 numbers of a place's row are: in an order in which the same of eight rows lie in different banks.
  __device__ int place_of(int place, int chunk) const { return place * width + 8 * (chunk ^ (place & here.plan.turn)); }
  // Asks for keys and values of the run's positions from to `to`, to places of the ring from `place` on.
  __device__ void ask(int layer, int from, int to, int place) const {
    const int64_t start = row_of(layer, split * splits.span + from);
    const T *keys = static_cast<const T*>(here.a.keys) + start, *values = static_cast<const T*>(here.a.values) + start;
#pragma unroll 1
    for (int i = here.thread; i < (to - from) * here.plan.chunks; i += kThreads) {
      const int row = here.plan.chunks_log2 >= 0 ? i >> here.plan.chunks_log2 : i / here.plan.chunks;
      const int at = place_of(place + row, i - row * here.plan.chunks);
      copy16_passing(reinterpret_cast<uint4*>(ring_keys() + at), keys + 8 * i);
      copy16_passing(reinterpret_cast<uint4*>(ring_values() + at), values + 8 * i);
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
      // Of a query: pair d % 8 / 2 of the first or the second 8 of 16 numbers.
      const int of_group = head_of(here, j), d = j - of_group * width;
      const int to = pinned(i < 0 ? ((of_group / 8 * here.plan.halves * 4 + d / 16) * 32 + of_group % 8 * 4 + d % 8 / 2) * 16 +
                                        d / 8 % 2 * 8
                                  : i * static_cast<int>(sizeof(T)));
      const float2 two = take(here.watch, here.words() + at + from);
      if (i < 0) {
        *reinterpret_cast<uint2*>(reinterpret_cast<unsigned char*>(queries()) + to) =
            split2<T>(make_float2(two.x * scale, two.y * scale));
      } else {
        const unsigned narrow = narrow2(two, T());
        *reinterpret_cast<unsigned*>(reinterpret_cast<unsigned char*>(newest()) + to) = narrow;
        *reinterpret_cast<unsigned*>(stream) = narrow;
      }
    }
  }

  // What a warp has summed up of eight heads: lane 4 h + t has head h's numbers 8 i + 2 t and the next of 64, in two parts each.
  struct Sums {
    float most = -INFINITY, total = 0.0f;
    float o[8][4] = {};
  };
  // Lane t's numbers 4 i to 4 i + 3 of 16, both parts added.
  __device__ static float4 four_of(const Sums& sums, int i) {
    const float (&o)[4] = sums.o[i], (&next)[4] = sums.o[i + 1];
    return make_float4(o[0] + o[2], o[1] + o[3], next[0] + next[2], next[1] + next[3]);
  }
  // Positions from `base` to `to`, 16 at most, of the run; place `p - shift` of the ring, or `newest` for the one at `old`.
  // Rows of matrix lane / 8: of keys (8 positions, 8 numbers), (the same, the next 8), then of the next positions, of values (8
  // positions, 8 numbers), (the next 8 positions, the same), then of the next numbers.
  __device__ const T* row_at(const T* ring, const T* of_newest, int p, int chunk, int shift, int old) const {
    chunk = min(chunk, here.plan.chunks - 1);
    return p == old ? of_newest + 8 * chunk : ring + place_of(p - shift, chunk);
  }
  __device__ void load_keys(uint4 (&keys)[4], int half, int base, int to, int shift, int old) const {  // 64 numbers of each
    const int p = min(base + here.lane / 16 * 8 + here.lane % 8, to - 1);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      keys[k] = matrices<false>(row_at(ring_keys(), newest(), p, 8 * half + 2 * k + here.lane / 8 % 2, shift, old));
  }
  // q: this lane's part of the queries; keys: the first 64 numbers; first: of the numbers to be summed up, in eights.
  __device__ void attend(Sums& sums, uint4 (&keys)[4], const uint4* q, int first, int base, int to, int shift, int old) const {
    float score[2][4] = {};
    auto multiply = [&] {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint4 a = q[k * 32];
        multiply_tile<T>(score[0], a, keys[k].x, keys[k].y);
        multiply_tile<T>(score[1], a, keys[k].z, keys[k].w);
      }
    };
    multiply();
    if (here.plan.halves > 1) {
      load_keys(keys, 1, base, to, shift, old);
      q += 4 * 32;
      multiply();
    }
    float2 weight[2];
    float most = sums.most;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int p = base + 8 * j + here.lane % 4 * 2;
      weight[j].x = p < to ? score[j][0] + score[j][2] : -INFINITY;
      weight[j].y = p + 1 < to ? score[j][1] + score[j][3] : -INFINITY;
      most = fmaxf(most, fmaxf(weight[j].x, weight[j].y));
    }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    uint4 values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      values[i] = matrices<true>(row_at(ring_values(), newest() + width, min(base + here.lane % 16, to - 1),
                                        first + 2 * i + here.lane / 16, shift, old));
    const float by = exp2_fast(sums.most - most);  // most is finite: a position at least is there
    sums.most = most, sums.total *= by;
    uint4 a;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      weight[j] = make_float2(exp2_fast(weight[j].x - most), exp2_fast(weight[j].y - most));
      const uint2 two = split2<T>(weight[j]);
      if (j == 0) a.x = two.x, a.y = two.y;
      else a.z = two.x, a.w = two.y;
    }
    float total = (weight[0].x + weight[0].y) + (weight[1].x + weight[1].y);
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    sums.total += total;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums.o[i][k] *= by;
      const uint4& v = values[i / 2];
      multiply_tile<T>(sums.o[i], a, i % 2 ? v.z : v.x, i % 2 ? v.w : v.y);
    }
  }

  // Adds up the result's pairs of numbers, each by kLanes lanes, of `parts` warps, and puts them; place: of the thread's first
  // one, words: of the copy that it writes.
  template <int kLanes>
  __device__ void put_result(Place place, uint64_t* words, int parts) const {
    constexpr int kEach = 4;
    const int pairs = here.fixed.pairs, step = group * here.plan.pitch, lane = here.thread % kLanes;
#pragma unroll 1
    for (int i = here.thread / kLanes; i - here.lane / kLanes < pairs;) {  // the same for all of a warp
      const float *numbers = of_warps() + place.numbers, *extents = of_warps() + place.extent;
      float most = -INFINITY, total = 0.0f, sum[2] = {};
#pragma unroll 1
      for (int begin = lane;;) {
#pragma unroll
        for (int k = 0; k < kEach; ++k)
          if (begin + k * kLanes < parts) most = fmaxf(most, extents[(begin + k * kLanes) * step]);
        begin += kEach * kLanes;
        if (begin - lane >= parts) break;
      }
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
#pragma unroll 1
      for (int begin = lane;;) {
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          if (begin + k * kLanes >= parts) continue;
          const int at = (begin + k * kLanes) * step;
          const float2 extent = *reinterpret_cast<const float2*>(extents + at);
          const float2 two = *reinterpret_cast<const float2*>(numbers + at);
          const float weight = exp2_fast(extent.x - most);  // most is finite: a position at least is there
          total = fmaf(weight, extent.y, total);
          sum[0] = fmaf(weight, two.x, sum[0]), sum[1] = fmaf(weight, two.y, sum[1]);
        }
        begin += kEach * kLanes;
        if (begin - lane >= parts) break;
      }
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) {
        total += __shfl_xor_sync(~0u, total, offset);
        sum[0] += __shfl_xor_sync(~0u, sum[0], offset), sum[1] += __shfl_xor_sync(~0u, sum[1], offset);
      }
      const float by = __fdividef(1.0f, total), lse = most + __log2f(total);
      if (place.at >= 0) {
        uint64_t* to = words + place.at;
#pragma unroll 1
        for (int copy = lane; copy < here.a.copies; copy += kLanes, to += int64_t{kLanes} * here.plan.words) {
          const float2 two = make_float2(sum[0] * by, sum[1] * by);
          if (splits.results == 1) put_words(to, word(two.x, here.watch.tag), word(two.y, here.watch.tag));
          else put_record(to, two, lse, here.watch.tag);
        }
      }
      i += kThreads / kLanes;
      place = places()[min(i, pairs - 1)];
    }
  }

  // The phase: attention over this block's positions, into the exchange.
  __device__ void run(int layer_words, int layer, int position) const {
    const int old = before(position);
    const bool own = position >= split * splits.span && position < (split + 1) * splits.span;
    const int count = old + (own ? 1 : 0);
    if (split < 0 || count == 0) return;
    here.watch.where = layer * 16 + kAttention;
    const int parts = here.plan.parts;
    // Of the result's runs.
    const int begun = runs == 1 ? 1 : min(position / splits.span - split + rank + 1, runs);
    if (runs > 1 && rank == 0 && here.thread == 0 && !here.watch.dead)  // who is dead has not waited for the last phase
      expect(&here.fixed.gathered, begun * parts * group * (here.plan.pitch - 2) * static_cast<int>(sizeof(float)));
    // A long run goes through the ring half by half: one is read while the other is filled. The first two were asked for a
    // layer ago.
    int tile = count, tiles = 1;
    if (count > 2 * here.plan.tile) tile = here.plan.tile, tiles = (count + tile - 1) / tile;
    const Role& role = here.fixed.roles[here.warp];
    const int part = role.part;
    const uint4* q = queries() + role.queries + here.lane;
    int base = 16 * part, to = part < parts ? min(count, tile) : 0;
    Sums sums;
    uint4 keys[4];
    // Without the newest one, sixteen positions can be at hand before the queries are.
    const bool early = kTensorCores && splits.span <= kEarly && base < to && old >= base + 16;
    if (early) load_keys(keys, 0, base, to, 0, old);
    // Where this lane's 16 numbers go, and its head's greatest score and total, which the first 64 numbers' warp has.
    const int of_head = here.lane / 4 < role.heads ? role.sums + here.lane / 4 * here.plan.pitch : -1;
    const int at = pinned(of_head < 0 ? -1 : of_head + here.lane % 4 * 16);
    const int extent = pinned(of_head >= 0 && here.lane % 4 == 0 && role.first == 0 ? of_head + here.plan.pitch - 4 : -1);
    const bool gathers = pinned(runs > 1);
    receive(layer_words, layer, position, own);
    copies_left<3>();  // three at least were asked for after this one
    __syncthreads();
#pragma unroll 1
    for (int t = 0;;) {
#pragma unroll 1
      for (; base < to; base += 16 * parts) {
        const int shift = (t & ~1) * tile;
        if (!(early && base == 16 * part)) load_keys(keys, 0, base, to, shift, old);
        attend(sums, keys, q, role.first, base, to, shift, old);
      }
      if (++t >= tiles) break;
      if (t + 1 < tiles) {
        __syncthreads();
        ask(layer, (t + 1) * tile, min(old, (t + 2) * tile), (t + 1 & 1) * tile);
        copies_commit();
      }
      if (t >= 2) {
        t + 1 < tiles ? copies_left<1>() : copies_left<0>();
        __syncthreads();
      }
      base = t * tile + 16 * part, to = part < parts ? min(count, (t + 1) * tile) : 0;
    }
    if (at >= 0) {
      if (gathers) {
        const unsigned there = here.fixed.there, barrier = here.fixed.there_gathered;
#pragma unroll
        for (int i = 0; i < 8; i += 2) send4(there + (at + 2 * i) * 4, four_of(sums, i), barrier);
        if (extent >= 0) send2(there + extent * 4, sums.most, sums.total, barrier);
      } else {
#pragma unroll
        for (int i = 0; i < 8; i += 2) *reinterpret_cast<float4*>(of_warps() + at + 2 * i) = four_of(sums, i);
        if (extent >= 0) *reinterpret_cast<float2*>(of_warps() + extent) = make_float2(sums.most, sums.total);
      }
    }
    if (gathers && rank > 0) return;
    const int log2 = here.fixed.adds_log2, all = begun * parts;
    const Place place = places()[min(here.thread >> log2, here.fixed.pairs - 1)];
    uint64_t* words = here.words_of(here.thread & ((1 << log2) - 1)) + layer_words;
    if (gathers) {
      // The first token at which this block has a position has the first phases.
      const int first = max(static_cast<int>(here.a.first_position), split * splits.span);
      wait_for_bytes(here.watch, &here.fixed.gathered, ((position - first) * here.a.shape.layers + layer) & 1);
    } else {
      __syncthreads();
    }
    if (log2 == 2) put_result<4>(place, words, all);
    else if (log2 == 4) put_result<16>(place, words, all);
    else put_result<1>(place, words, all);
  }

  // Adds results first + k, k < kFew, of those before `end`, of numbers row, row + 1 of all query heads' outputs.
  static constexpr int kFew = 6;
  __device__ static void add(Here& here, Weighted<2>& sum, int layer_words, int row, int first, int end) {
    const int all = here.a.shape.heads * here.a.shape.head_dim, n = min(kFew, end - first);
    const uint64_t* from = here.words() + layer_words + here.plan.at_parts + row;
    const uint64_t* at[kFew];
#pragma unroll
    for (int k = 0; k < kFew; ++k) at[k] = from + (first + k) * all;
    const Pairs<kFew, true> got = take<true>(here.watch, at, n);
    float most = -INFINITY;
#pragma unroll
    for (int k = 0; k < kFew; ++k)
      if (k < n) most = fmaxf(most, got.third(k));
    sum.scale(sum.raise(most));
#pragma unroll
    for (int k = 0; k < kFew; ++k) {
      const float weight = k < n ? sum.weight(got.third(k)) : 0.0f;
      sum.total += weight;
      sum.sum[0] = fmaf(weight, got[k].x, sum.sum[0]), sum.sum[1] = fmaf(weight, got[k].y, sum.sum[1]);
    }
  }

  // Many results, `end` of them begun, are added up by the blocks of their key head, a pair of numbers a warp and a result a
  // lane.
  __device__ void combine(int layer_words, int layer, int end) const {
    if (split < 0) return;
    here.watch.where = layer * 16 + kCombine;
    const int all = here.a.shape.heads * width;
#pragma unroll 1
    for (int pair = split + splits.count * here.warp; pair < group * width / 2; pair += splits.count * kWarps) {
      const int row = kv_head * group * width + 2 * pair;
      Weighted<2> sum;
#pragma unroll 1
      for (int result = here.lane; result < end; result += 32) {
        const uint64_t* const at[1] = {here.words() + layer_words + here.plan.at_parts + result * all + row};
        const Pairs<1, true> got = take<true>(here.watch, at, 1);
        const float2 two = got[0];
        const float lse = got.third(0);
        sum.scale(sum.raise(lse));
        const float weight = sum.weight(lse);
        sum.total += weight;
        sum.sum[0] = fmaf(weight, two.x, sum.sum[0]), sum.sum[1] = fmaf(weight, two.y, sum.sum[1]);
      }
      sum.template meet<32>();
      const float by = __fdividef(1.0f, sum.total);
      here.put_pair(layer_words + here.plan.at_attention + row, sum.sum[0] * by, sum.sum[1] * by, here.lane, 32);
    }
  }

  // Numbers 2 * pair, 2 * pair + 1 of all query heads' outputs, of a few results; `end` of them are begun.
  __device__ static float2 result(Here& here, int layer_words, int end, int pair) {
    Weighted<2> sum;
#pragma unroll 1
    for (int first = 0; first < end; first += kFew) add(here, sum, layer_words, 2 * pair, first, end);
    const float by = __fdividef(1.0f, sum.total);
    return make_float2(sum.sum[0] * by, sum.sum[1] * by);
  }
};

}  // namespace tinylm::decode
