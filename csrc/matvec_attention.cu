// Attention of one token's queries over its row of the cache: the time is that of reading the cache once.
//
// A block has the heads of a group (eight at most; a larger group has several blocks, of which L2 serves all but the first)
// and a run of positions, of which its warps take tiles of 16 in turn, each with a softmax of its own that goes along.
// Products are those of tensor cores, positions x dimensions x heads, because each head costs as many instructions as
// the loads do otherwise. Which of 16 products that are added up is which does not matter, nor which row of a tile is
// which: so a lane takes 16 bytes of a key just as they come from memory for two products, and likewise of the queries;
// and of values 16 bytes of two positions, whose halves are paired. Nothing goes through shared memory but the queries.
// Where a tile's keys, then its values, have been used, those of the warp's next tile are requested into their registers.
// Warps meet at the end of the run, and the runs of a head in memory: the last block that arrives there adds them up, in
// their own order.
//
// How long the runs are follows from the position, which is read from memory, so that one graph serves all lengths; blocks
// without a run leave. Keys and values of earlier tokens are requested before the kernel that makes this token's ends.
#include "matvec.cuh"

namespace tinylm {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 16;      // positions of a warp at once
constexpr int kMostHeads = 8;  // of a block
constexpr int kSlab = 128;     // dimensions of which warps meet at once
constexpr int kLeast = kWarps * kTile;  // positions of a run: one tile a warp
constexpr float kLowest = -1e30f;  // below any score, and finite: what is far below it is 0, never NaN

struct Call {
  OneQuery a;
  int group, blocks;  // heads of a group; blocks that share it
  float scale;        // of scores, as powers of two
};

__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What shared memory holds is read again from here on: registers could not keep it.
__device__ inline void forget() { asm volatile("" ::: "memory"); }

// ---- Tiles of 16-bit numbers. Lane l has numbers l % 4 * 2 and the next of row l / 4 of each 8 x 8.

// Rows become columns.
__device__ inline unsigned turned_tile(unsigned tile) {
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(tile));
  return tile;
}

// sum += rows x columns, 16 x 16 times 16 x 8. rows: of rows 0 to 7, then 8 to 15, numbers 0 to 7, then the same of 8 to 15;
// low, high: of each column numbers 0 to 7, and 8 to 15. sum: two numbers of row l / 4, then of row l / 4 + 8.
template <typename T>
__device__ inline void multiply(float (&sum)[4], const unsigned (&rows)[4], unsigned low, unsigned high) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(low), "r"(high));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(low), "r"(high));
  }
#else  // a Turing card has no such tensor cores, and time enough for shuffles: its memory is as much slower
  const int lane = threadIdx.x % 32, row = lane / 4 * 4, column = lane % 4 * 8;
#pragma unroll
  for (int from = 0; from < 4; ++from)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned columns = half == 0 ? low : high;
      const float2 upper = widen2(__shfl_sync(~0u, rows[2 * half], row + from), T());
      const float2 lower = widen2(__shfl_sync(~0u, rows[2 * half + 1], row + from), T());
      const float2 left = widen2(__shfl_sync(~0u, columns, column + from), T());
      const float2 right = widen2(__shfl_sync(~0u, columns, column + 4 + from), T());
      sum[0] = fmaf(upper.x, left.x, fmaf(upper.y, left.y, sum[0]));
      sum[1] = fmaf(upper.x, right.x, fmaf(upper.y, right.y, sum[1]));
      sum[2] = fmaf(lower.x, left.x, fmaf(lower.y, left.y, sum[2]));
      sum[3] = fmaf(lower.x, right.x, fmaf(lower.y, right.y, sum[3]));
    }
#endif
}

__device__ inline unsigned word_of(const uint4& pack, int w) {
  return w == 0 ? pack.x : w == 1 ? pack.y : w == 2 ? pack.z : pack.w;
}

// Of each two lanes that a tile's column or row has, the largest, and the sum.
__device__ inline float column_largest(float x) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}
__device__ inline float column_sum(float x) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Heads of up to 64 N dimensions.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, N <= 2 ? 2 : 1) one_query(const __grid_constant__ Call call) {
  constexpr int kPacks = 8 * N, kDim = 64 * N, kMet = kDim < kSlab ? kDim : kSlab;
  // Packs of four lanes side by side, of a head, lie side by side; heads a pack further than their size, for the banks.
  __shared__ uint4 q[kMostHeads][kPacks + 4];
  __shared__ uint4 newest_kv[2][kPacks];
  __shared__ __align__(16) float sums[kWarps][kMostHeads][kMet];
  __shared__ float highest[kWarps][kMostHeads], total[kWarps][kMostHeads], weights[kMostHeads][kMostSplits];
  __shared__ bool last;
  const OneQuery& a = call.a;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = lane / 4, column = lane % 4;
  const int d = a.head_dim, half = d / 2, packs = d / 8, split = blockIdx.x;
  const int kv = blockIdx.y / call.blocks, part = blockIdx.y % call.blocks;
  const int first = kv * call.group + part * kMostHeads, heads = min(kMostHeads, call.group - part * kMostHeads);

  let_next_start();
  const int64_t position = fresh(a.position);
  const bool known_place = position >= 0 && position < a.capacity && position < a.rope_positions;
  const int length = known_place ? static_cast<int>(position) + 1 : 0;
  const int run = max(kLeast, (length + a.splits * kTile - 1) / (a.splits * kTile) * kTile);
  const int runs = (length + run - 1) / run, start = split * run, stop = min(start + run, length);
  if (split >= runs) {
    // This kernel must not end before all that came before it has, which the next one takes for granted: one block that
    // waits is enough. The others make room.
    if (runs == 0) wait_for_earlier();
    return;
  }
  const bool owns = split == runs - 1;       // the run that the new key and value end, at `known`
  const int known = stop - owns;
  const int64_t base = static_cast<int64_t>(kv) * a.capacity;
  // Keys: of positions row and row + 8 of a tile, pack 4 i + column. Values: of positions 2 column, the next, and both 8
  // further, pack 8 i + row.
  uint4 k[2 * N][2] = {}, v[N][4] = {};
  const T* keys = static_cast<const T*>(a.keys) + (base + start + warp * kTile + row) * d + column * 8;
  const T* values = static_cast<const T*>(a.values) + (base + start + warp * kTile + 2 * column) * d + row * 8;
  auto request_k = [&](int at, int i) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      stream16(k[i][j], at + row + 8 * j < known && 4 * i + column < packs, keys + 8 * j * d + 32 * i);
  };
  auto request_v = [&](int at, int i) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      stream16(v[i][j], at + 2 * column + j % 2 + j / 2 * 8 < known && 8 * i + row < packs,
               values + (j % 2 + j / 2 * 8) * d + 64 * i);
  };
  int at = start + warp * kTile;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) request_k(at, i);
#pragma unroll
  for (int i = 0; i < N; ++i) request_v(at, i);

  for (int i = thread; i < kMostHeads * (kPacks + 4); i += kThreads) (&q[0][0])[i] = make_uint4(0, 0, 0, 0);
  for (int i = thread; i < 2 * kPacks; i += kThreads) (&newest_kv[0][0])[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  wait_for_earlier();
  // The queries, then the key: two elements, and the two that are half a head further, a thread, as often as it takes.
  const T* qkv = static_cast<const T*>(a.qkv);
  const T* table = static_cast<const T*>(a.rope) + position * d;
  const T* signed_table = table + a.rope_positions * d;
  uint4 value = {};
  fresh16(value, owns && thread < packs, qkv + static_cast<int64_t>(a.heads + a.kv_heads + kv) * d + thread * 8);
  auto two = [](const T* from) { return widen2(static_cast<unsigned>(fresh(reinterpret_cast<const int*>(from))), T()); };
  for (int i = thread; i < (heads + owns) * half / 2; i += kThreads) {
    const int head = i / (half / 2), e = i % (half / 2) * 2;
    const T* from = qkv + static_cast<int64_t>(head < heads ? first + head : a.heads + kv) * d + e;
    const float2 low = two(from), low_cosine = two(table + e), low_sine = two(signed_table + e);
    const float2 high = two(from + half), high_cosine = two(table + e + half), high_sine = two(signed_table + e + half);
    unsigned* to = reinterpret_cast<unsigned*>(head < heads ? q[head] : newest_kv[0]) + e / 2;
    to[0] = narrow2(
        make_float2(low.x * low_cosine.x + high.x * low_sine.x, low.y * low_cosine.y + high.y * low_sine.y), T());
    to[half / 2] = narrow2(
        make_float2(high.x * high_cosine.x + low.x * high_sine.x, high.y * high_cosine.y + low.y * high_sine.y), T());
  }
  if (owns && thread < packs) newest_kv[1][thread] = value;
  __syncthreads();
  if (owns && part == 0 && thread < 2 * packs) {
    T* to = static_cast<T*>(thread < packs ? a.keys : a.values) + (base + known) * d;
    reinterpret_cast<uint4*>(to)[thread % packs] = newest_kv[thread / packs][thread % packs];
  }

  // Of heads 2 column and the next; o: of dimensions 64 i + 8 row + 2 w, and the next, each of both heads.
  float best[2] = {kLowest, kLowest}, sum[2] = {}, o[N][4][4] = {};
  for (; at < known + owns; at += kWarps * kTile) {
    const int next = at + kWarps * kTile;
    keys += kWarps * kTile * d, values += kWarps * kTile * d;
    const bool ends = owns && at + kTile > known;  // the tile with the new key and value
    float s[4] = {};
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      if (ends) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (at + row + 8 * j == known) k[i][j] = newest_kv[0][4 * i + column];
      }
      forget();
      const uint4 query = q[row][4 * i + column];
      const uint4 &x = k[i][0], &y = k[i][1];
      multiply<T>(s, {x.x, y.x, x.y, y.y}, query.x, query.y);
      multiply<T>(s, {x.z, y.z, x.w, y.w}, query.z, query.w);
      request_k(next, i);
    }
    // Scores of positions row and row + 8.
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] = at + row + j / 2 * 8 < known + owns ? s[j] * call.scale : kLowest;
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float top = fmaxf(best[h], column_largest(fmaxf(s[h], s[h + 2])));
      shrink[h] = power(best[h] - top), best[h] = top;
      s[h] = power(s[h] - top), s[h + 2] = power(s[h + 2] - top);
      sum[h] = sum[h] * shrink[h] + (s[h] + s[h + 2]);
    }
    const unsigned low = turned_tile(narrow2(make_float2(s[0], s[1]), T()));
    const unsigned high = turned_tile(narrow2(make_float2(s[2], s[3]), T()));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (ends) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (at + 2 * column + j % 2 + j / 2 * 8 == known) v[i][j] = newest_kv[1][8 * i + row];
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const unsigned words[4] = {word_of(v[i][0], w), word_of(v[i][1], w), word_of(v[i][2], w), word_of(v[i][3], w)};
#pragma unroll
        for (int j = 0; j < 4; ++j) o[i][w][j] *= shrink[j % 2];
        multiply<T>(o[i][w],
                    {__byte_perm(words[0], words[1], 0x5410), __byte_perm(words[0], words[1], 0x7632),
                     __byte_perm(words[2], words[3], 0x5410), __byte_perm(words[2], words[3], 0x7632)},
                    low, high);
      }
      request_v(next, i);
    }
  }

  // The warps, kMet dimensions at a time: a thread has two of one head, as often as it takes.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] = column_sum(sum[h]);
    if (row == 0) highest[warp][2 * column + h] = best[h], total[warp][2 * column + h] = sum[h];
  }
  float* extents = a.partials + static_cast<int64_t>(a.heads) * a.splits * d;  // [heads, splits, 2]: highest, total
  auto store = [&](int head, int e, float2 y) {
    *reinterpret_cast<unsigned*>(static_cast<T*>(a.out) + static_cast<int64_t>(first + head) * d + e) = narrow2(y, T());
  };
#pragma unroll
  for (int begin = 0; begin < kDim; begin += kMet) {
    if (begin > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < kMet / 64; ++i)
#pragma unroll
      for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float(&of)[4] = o[begin / 64 + i][w];
          *reinterpret_cast<float2*>(&sums[warp][2 * column + j][64 * i + 8 * row + 2 * w]) = make_float2(of[j], of[j + 2]);
        }
    __syncthreads();
    const int pairs = min(kMet, d - begin) / 2;
    for (int i = thread; i < heads * pairs; i += kThreads) {
      const int head = i / pairs, pair = i % pairs;
      float top = kLowest, all = 0.0f;
      float2 y = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, highest[w][head]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float share = power(highest[w][head] - top);
        const float2 of = *reinterpret_cast<const float2*>(&sums[w][head][2 * pair]);
        all = fmaf(share, total[w][head], all), y.x = fmaf(share, of.x, y.x), y.y = fmaf(share, of.y, y.y);
      }
      if (runs == 1) {
        store(head, begin + 2 * pair, make_float2(y.x / all, y.y / all));
      } else {
        const int64_t place = static_cast<int64_t>(first + head) * a.splits + split;
        *reinterpret_cast<float2*>(a.partials + place * d + begin + 2 * pair) = y;
        if (begin == 0 && pair == 0) extents[2 * place] = top, extents[2 * place + 1] = all;
      }
    }
  }
  if (runs == 1) return;
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    last = atomicAdd(a.arrived + blockIdx.y, 1) == runs - 1;
    if (last) a.arrived[blockIdx.y] = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  // Two dimensions of a head a thread, whose first runs are on their way while their weights are found.
  constexpr int kOnce = 36;  // at least the 33 of an 8B model on an H200
  uint2 parts[kOnce] = {};
  const int pairs = d / 2;
  auto request = [&](int i, int begin) {
    const float* from = a.partials + (static_cast<int64_t>(first + i / pairs) * a.splits + begin) * d + i % pairs * 2;
#pragma unroll
    for (int r = 0; r < kOnce; ++r) fresh8(parts[r], begin + r < runs, from + static_cast<int64_t>(r) * d);
  };
  if (thread < heads * pairs) request(thread, 0);
  if (warp < heads) {
    constexpr int kOf = kMostSplits / 32;  // runs of a lane
    const float* from = extents + 2 * static_cast<int64_t>(first + warp) * a.splits;
    float tops[kOf], share[kOf], top = kLowest, all = 0.0f;
#pragma unroll
    for (int i = 0; i < kOf; ++i) {
      tops[i] = i * 32 + lane < runs ? fresh(from + 2 * (i * 32 + lane)) : kLowest;
      share[i] = i * 32 + lane < runs ? fresh(from + 2 * (i * 32 + lane) + 1) : 0.0f;
      top = fmaxf(top, tops[i]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
#pragma unroll
    for (int i = 0; i < kOf; ++i) all = fmaf(power(tops[i] - top), share[i], all);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) all += __shfl_xor_sync(~0u, all, offset);
#pragma unroll
    for (int i = 0; i < kOf; ++i) weights[warp][i * 32 + lane] = power(tops[i] - top) / all;
  }
  __syncthreads();
  for (int i = thread; i < heads * pairs; i += kThreads) {
    float2 y = make_float2(0.0f, 0.0f);
    for (int begin = 0; begin < runs; begin += kOnce) {
      if (begin > 0 || i != thread) request(i, begin);
#pragma unroll
      for (int r = 0; r < kOnce; ++r) {
        if (begin + r >= runs) break;
        const float weight = weights[i / pairs][begin + r];
        y.x = fmaf(weight, __uint_as_float(parts[r].x), y.x), y.y = fmaf(weight, __uint_as_float(parts[r].y), y.y);
      }
    }
    store(i / pairs, i % pairs * 2, y);
  }
}

template <typename T>
const void* kernel_for(int head_dim) {
  if (head_dim <= 64) return reinterpret_cast<const void*>(one_query<T, 1>);
  if (head_dim <= 128) return reinterpret_cast<const void*>(one_query<T, 2>);
  return head_dim <= 192 ? reinterpret_cast<const void*>(one_query<T, 3>) : reinterpret_cast<const void*>(one_query<T, 4>);
}

// Blocks that share a group's heads.
int blocks_of(int group) { return (group + kMostHeads - 1) / kMostHeads; }

}  // namespace

const char* one_query_cuda(const OneQuery& a, void* stream) {
  const int group = a.heads / a.kv_heads;
  Call call{a, group, blocks_of(group), 1.4426950408889634f / sqrtf(static_cast<float>(a.head_dim))};
  void* arguments[] = {&call};
  const void* kernel = a.bf16 ? kernel_for<__nv_bfloat16>(a.head_dim) : kernel_for<__half>(a.head_dim);
  const dim3 blocks(static_cast<unsigned>(a.splits), static_cast<unsigned>(a.kv_heads * call.blocks));
  return begin(kernel, blocks, kThreads, a.overlap, arguments, stream);
}

}  // namespace tinylm
