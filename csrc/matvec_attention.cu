// Attention of one token's queries over its row of the cache: the time is that of reading the cache once.
//
// A block has the heads of a group (four at most; a larger group has several blocks, of which L2 serves all but the first)
// and a run of positions. Teams of lanes that side by side hold a key, a pack each, take positions in turn, each with a
// softmax of its own that goes along; keys and values of the next turn are on their way meanwhile. Teams meet at the end
// of the run, and the runs of a head in memory: the last block that arrives there adds them up, in their own order.
//
// How long the runs are follows from the position, which is read from memory, so that one graph serves all lengths; blocks
// without a run leave at once. Keys and values of earlier tokens are requested before the kernel that makes this token's ends.
//
// On an H200, 32 heads and 8 of keys, of 128 numbers in bf16, at 128 / 1,024 / 4,096 / 8,192 / 32,768 tokens, from a script:
//   this:                                         5.3 / 7.1 / 10.7 / 15.0 / 39 us, the last .75 of the rate of reading
//   with fences of all threads around the count:  5.9 / 7.2 / 11.3 / 15.6 / 40
//   by tensor cores, 16 positions x 8 heads:      3.5 / 8.2 / 11.0 / 16.2 / 49, not 5 / 5.5 / 7.5 / 11 / 33; dropped
// And of a token of an 8B model at 1,024: the blocks that have a run side by side, so that each has a multiprocessor, and the
// runs' sums asked for before their weights are known: 3,661 us instead of 3,685 on one card, not 3,630. To fetch the next
// kernel's matrix into L2 meanwhile makes it slower: 8 / 17 / 25 / 33 MB of 34: 3,753 / 3,783 / 3,819 / 3,845 us instead of
// 3,733 on another card; dropped. Runs' sums that say themselves whether they are there, taken by the last run's block instead of
// the last one to arrive: 10.3 us a call at 1,024 and 3,841 a token, not 3,625; dropped.
#include "matvec.cuh"

namespace tinylm {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTurn = 4;  // positions of a team at once
constexpr int kMostHeads = 4;  // of a block
constexpr float kLowest = -1e30f;  // below any score, and finite: what is far below it is 0, never NaN

struct Call {
  OneQuery a;
  int group, blocks;  // heads of a group; blocks that share it
  float scale;        // of scores, as powers of two
};

// What shared memory holds is read again from here on: registers could not keep it.
__device__ inline void forget() { asm volatile("" ::: "memory"); }

// L lanes a team, G heads a block.
template <typename T, int L, int G>
__global__ void __launch_bounds__(kThreads, 2) one_query(const __grid_constant__ Call call) {
  constexpr int kSide = 32 / L, kTeams = kWarps * kSide, kBatch = kTeams * kTurn;
  __shared__ float4 q[G][2][L];  // fp32, halves of packs apart: lanes side by side read 16 bytes side by side
  __shared__ uint4 newest_kv[2][L];
  __shared__ __align__(16) float scores[kTeams][kTurn * G];
  __shared__ float4 sums[kWarps][G][2][L];
  __shared__ float highest[kWarps][G], total[kWarps][G], weights[G][kMostSplits];
  __shared__ bool last;
  const OneQuery& a = call.a;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, c = lane % L, team = thread / L;
  const int d = a.head_dim, half = d / 2, packs = d / 8, split = blockIdx.y;
  const int kv = blockIdx.x / call.blocks, part = blockIdx.x % call.blocks;
  const int first = kv * call.group + part * G, heads = min(G, call.group - part * G);
  const bool has = c < packs;

  let_next_start();
  const int64_t position = fresh(a.position);
  if (position < 0 || position >= a.capacity || position >= a.rope_positions) {
    wait_for_earlier();
    return;
  }
  const int newest = static_cast<int>(position), length = newest + 1;
  const int run = ((length + a.splits - 1) / a.splits + kBatch - 1) / kBatch * kBatch;
  const int runs = (length + run - 1) / run, start = split * run, stop = min(start + run, length);
  if (split >= runs) return;
  const bool owns = split == runs - 1;  // the run that the new key and value end
  const int64_t row = static_cast<int64_t>(kv) * a.capacity;
  const T* keys = static_cast<const T*>(a.keys) + row * d + c * 8;
  const T* values = static_cast<const T*>(a.values) + row * d + c * 8;
  const int known = min(stop, newest);
  uint4 k[kTurn] = {}, v[kTurn] = {};
#pragma unroll
  for (int r = 0; r < kTurn; ++r) {
    const int at = start + r * kTeams + team;
    stream16(k[r], has && at < known, keys + static_cast<int64_t>(at) * d);
    stream16(v[r], has && at < known, values + static_cast<int64_t>(at) * d);
  }

  // Pairs of the queries, then of the key: element e and the one half a head further.
  constexpr int kPairs = ((G + 1) * L * 4 + kThreads - 1) / kThreads;
  float cosine[kPairs][2], sine[kPairs][2];
  auto pair = [&](int i, int& head, int& e) {
    head = (i * kThreads + thread) / half;
    e = (i * kThreads + thread) % half;
    return head < heads || (head == G && owns);
  };
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    int head, e;
    if (!pair(i, head, e)) continue;
    const T* table = static_cast<const T*>(a.rope) + position * d + e;
    const T* signed_table = table + a.rope_positions * d;
    cosine[i][0] = fresh_half(table), cosine[i][1] = fresh_half(table + half);
    sine[i][0] = fresh_half(signed_table), sine[i][1] = fresh_half(signed_table + half);
  }
  for (int i = thread; i < G * 2 * L; i += kThreads) (&q[0][0][0])[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  __syncthreads();

  wait_for_earlier();
  const T* qkv = static_cast<const T*>(a.qkv);
  uint4 value = {};
  fresh16(value, owns && thread < packs, qkv + static_cast<int64_t>(a.heads + a.kv_heads + kv) * d + thread * 8);
  float low[kPairs], high[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    int head, e;
    if (!pair(i, head, e)) continue;
    const T* from = qkv + static_cast<int64_t>(head < G ? first + head : a.heads + kv) * d + e;
    low[i] = fresh_half(from), high[i] = fresh_half(from + half);
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    int head, e;
    if (!pair(i, head, e)) continue;
    const float turned[2] = {low[i] * cosine[i][0] + high[i] * sine[i][0], high[i] * cosine[i][1] + low[i] * sine[i][1]};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = e + j * half;
      if (head < G) {
        reinterpret_cast<float*>(&q[head][at % 8 / 4][at / 8])[at % 4] = turned[j] * call.scale;
      } else {
        store_half(reinterpret_cast<T*>(newest_kv[0]) + at, turned[j]);
      }
    }
  }
  if (owns && thread < packs) newest_kv[1][thread] = value;
  __syncthreads();
  if (owns && part == 0 && thread < 2 * packs) {
    T* to = static_cast<T*>(thread < packs ? a.keys : a.values) + (row + newest) * d;
    reinterpret_cast<uint4*>(to)[thread % packs] = newest_kv[thread / packs][thread % packs];
  }

  float best[G], sum[G] = {}, o[G][8] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) best[g] = kLowest;
  for (int begin = start; begin < stop; begin += kBatch) {
#pragma unroll
    for (int two = 0; two < kTurn; two += 2) {
      forget();
      float s[2 * G];
#pragma unroll
      for (int r = two; r < two + 2; ++r) {
        const int at = begin + r * kTeams + team;
        if (has && at == newest) k[r] = newest_kv[0][c];
        float key[8];
        unpack(Pack<T>{k[r]}, key);
        stream16(k[r], has && at + kBatch < known, keys + static_cast<int64_t>(at + kBatch) * d);
#pragma unroll
        for (int g = 0; g < G; ++g) {
          const float4 x = q[g][0][c], y = q[g][1][c];
          s[(r - two) * G + g] = fmaf(x.x, key[0], fmaf(x.y, key[1], fmaf(x.z, key[2], x.w * key[3]))) +
                                 fmaf(y.x, key[4], fmaf(y.y, key[5], fmaf(y.z, key[6], y.w * key[7])));
        }
      }
      constexpr int kEach = 2 * G > L ? 2 * G / L : 1, kSame = 2 * G < L ? L / (2 * G) : 1;  // sums of a lane; its equals
      const int index = two * G + sum_scattered<L>(s);
      if (c % kSame == 0) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) scores[team][index + i] = s[i];
      }
    }
    __syncwarp();
    float top[G];
#pragma unroll
    for (int g = 0; g < G; ++g) top[g] = best[g];
#pragma unroll
    for (int r = 0; r < kTurn; ++r)
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (begin + r * kTeams + team < stop) top[g] = fmaxf(top[g], scores[team][r * G + g]);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float shrink = exp2_fast(best[g] - top[g]);
      best[g] = top[g], sum[g] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i) o[g][i] *= shrink;
    }
#pragma unroll
    for (int r = 0; r < kTurn; ++r) {
      forget();
      const int at = begin + r * kTeams + team;
      if (has && at == newest) v[r] = newest_kv[1][c];
      float of_v[8];
      unpack(Pack<T>{v[r]}, of_v);
      stream16(v[r], has && at + kBatch < known, values + static_cast<int64_t>(at + kBatch) * d);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const float share = at < stop ? exp2_fast(scores[team][r * G + g] - best[g]) : 0.0f;
        sum[g] += share;
#pragma unroll
        for (int i = 0; i < 8; ++i) o[g][i] = fmaf(share, of_v[i], o[g][i]);
      }
    }
    __syncwarp();  // before the next turn writes its scores
  }

  // The teams of a warp, then the warps.
#pragma unroll
  for (int offset = L; offset < 32; offset *= 2) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float other = __shfl_xor_sync(~0u, best[g], offset), top = fmaxf(best[g], other);
      const float own = exp2_fast(best[g] - top), its = exp2_fast(other - top);
      best[g] = top;
      sum[g] = sum[g] * own + __shfl_xor_sync(~0u, sum[g], offset) * its;
#pragma unroll
      for (int i = 0; i < 8; ++i) o[g][i] = o[g][i] * own + __shfl_xor_sync(~0u, o[g][i], offset) * its;
    }
  }
  if (lane < L) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      sums[warp][g][0][c] = make_float4(o[g][0], o[g][1], o[g][2], o[g][3]);
      sums[warp][g][1][c] = make_float4(o[g][4], o[g][5], o[g][6], o[g][7]);
      if (lane == 0) highest[warp][g] = best[g], total[warp][g] = sum[g];
    }
  }
  __syncthreads();
  // From here on a thread has four numbers of one head.
  const int quads = d / 4, g = thread / quads, quad = thread % quads, head = first + g;
  const bool writes = g < heads;
  T* out = static_cast<T*>(a.out) + static_cast<int64_t>(head) * d + quad * 4;
  auto store = [out](const float4& y) {
    *reinterpret_cast<uint2*>(out) = make_uint2(narrow2(make_float2(y.x, y.y), T()), narrow2(make_float2(y.z, y.w), T()));
  };
  auto add = [](float4& to, float by, const float4& y) {
    to.x = fmaf(by, y.x, to.x), to.y = fmaf(by, y.y, to.y), to.z = fmaf(by, y.z, to.z), to.w = fmaf(by, y.w, to.w);
  };
  float* extents = a.partials + static_cast<int64_t>(a.heads) * a.splits * d;  // [heads, splits, 2]: highest, total
  if (writes) {
    float top = kLowest, all = 0.0f;
    float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, highest[w][g]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float share = exp2_fast(highest[w][g] - top);
      all = fmaf(share, total[w][g], all);
      add(y, share, sums[w][g][quad % 2][quad / 2]);
    }
    if (runs == 1) {
      store(make_float4(y.x / all, y.y / all, y.z / all, y.w / all));
    } else {
      const int64_t place = static_cast<int64_t>(head) * a.splits + split;
      reinterpret_cast<float4*>(a.partials + place * d)[quad] = y;
      if (quad == 0) extents[2 * place] = top, extents[2 * place + 1] = all;
    }
  }
  if (runs == 1) return;
  __syncthreads();
  if (thread == 0) {
    last = arrive(a.arrived + blockIdx.x) == runs - 1;
    if (last) a.arrived[blockIdx.x] = 0;
  }
  __syncthreads();
  if (!last) return;
  // The first runs' sums are on their way while what they are worth is found out.
  constexpr int kOnce = 16;
  uint4 parts[kOnce] = {};
  const float* from = a.partials + static_cast<int64_t>(head) * a.splits * d + quad * 4;
  auto ask = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kOnce; ++i) fresh16(parts[i], writes && begin + i < runs, from + static_cast<int64_t>(begin + i) * d);
  };
  ask(0);
  if (warp < heads) {
    constexpr int kOf = kMostSplits / 32;  // runs of a lane
    const float* extent = extents + 2 * static_cast<int64_t>(first + warp) * a.splits;
    float tops[kOf], share[kOf], top = kLowest, all = 0.0f;
#pragma unroll
    for (int i = 0; i < kOf; ++i) {
      const bool is = i * 32 + lane < runs;
      tops[i] = is ? fresh(extent + 2 * (i * 32 + lane)) : kLowest;
      share[i] = is ? fresh(extent + 2 * (i * 32 + lane) + 1) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kOf; ++i) top = fmaxf(top, tops[i]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
#pragma unroll
    for (int i = 0; i < kOf; ++i) all = fmaf(exp2_fast(tops[i] - top), share[i], all);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) all += __shfl_xor_sync(~0u, all, offset);
#pragma unroll
    for (int i = 0; i < kOf; ++i) weights[warp][i * 32 + lane] = exp2_fast(tops[i] - top) / all;
  }
  __syncthreads();
  if (!writes) return;
  float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int begin = 0; begin < runs; begin += kOnce) {
    if (begin > 0) ask(begin);
#pragma unroll
    for (int i = 0; i < kOnce; ++i)
      add(y, begin + i < runs ? weights[g][begin + i] : 0.0f,
          make_float4(__uint_as_float(parts[i].x), __uint_as_float(parts[i].y), __uint_as_float(parts[i].z),
                      __uint_as_float(parts[i].w)));
  }
  store(y);
}

template <typename T, int G>
const void* kernel_for(int head_dim) {
  if (head_dim <= 64) return reinterpret_cast<const void*>(one_query<T, 8, G>);
  if (head_dim <= 128) return reinterpret_cast<const void*>(one_query<T, 16, G>);
  return reinterpret_cast<const void*>(one_query<T, 32, G>);
}

template <typename T>
const void* kernel_for(int group, int head_dim) {
  if (group == 1) return kernel_for<T, 1>(head_dim);
  return group == 2 ? kernel_for<T, 2>(head_dim) : kernel_for<T, kMostHeads>(head_dim);
}

// Blocks that share a group's heads.
int blocks_of(int group) { return (group + kMostHeads - 1) / kMostHeads; }

}  // namespace

const char* one_query_cuda(const OneQuery& a, void* stream) {
  const int group = a.heads / a.kv_heads;
  Call call{a, group, blocks_of(group), kLog2e / sqrtf(static_cast<float>(a.head_dim))};
  void* arguments[] = {&call};
  const void* kernel = a.bf16 ? kernel_for<__nv_bfloat16>(group, a.head_dim) : kernel_for<__half>(group, a.head_dim);
  // Those with a run come first and have a multiprocessor each, as long as there are enough.
  const dim3 blocks(static_cast<unsigned>(a.kv_heads * call.blocks), static_cast<unsigned>(a.splits));
  return launch_overlapping(kernel, blocks, kThreads, a.overlap, arguments, stream);
}

}  // namespace tinylm
