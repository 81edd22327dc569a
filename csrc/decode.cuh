// What the decode kernel's phases share: values that carry their own flags, a block's place, products of matrix rows.
#pragma once

#include "decode.h"
#include "rows.cuh"

namespace tinylm::decode {

// ---- The exchange. A value that another block waits for is a word of 8 bytes, {fp32, tag}: one store, which no load sees
// in half, so that who finds the tag of the present token has the value. No barrier, no fence, one trip through L2. A tag is
// never used twice. `copies` of all words let groups of blocks read different lines: L2 serves a line to one at a time.

__device__ inline uint64_t word(float value, unsigned tag) { return uint64_t{tag} << 32 | __float_as_uint(value); }
__device__ inline void put_word(uint64_t* at, uint64_t word) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
}
__device__ inline void put_words(uint64_t* at, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(at), "l"(first), "l"(second) : "memory");
}
__device__ inline ulonglong2 words_at(const uint64_t* at) {
  ulonglong2 two;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(two.x), "=l"(two.y) : "l"(at) : "memory");
  return two;
}

constexpr long long kPatience = 4'000'000'000;  // clocks, some 2 s, that a word is waited for
constexpr int kLate = 1, kNoToken = 2;          // in status[0]
enum Wait { kAttention = kProducts, kCombine, kChoose };  // after the products'

// How long a thread waits. One that waited in vain is dead: it goes on with what it has, without waiting again, so that the
// kernel ends, and tells all others by status[0].
struct Watch {
  int32_t* status;
  unsigned tag;
  int where = 0;  // layer * 16 + which product's input, or Wait
  bool dead = false;

  __device__ void fail(int what) {
    if (atomicCAS(status, 0, what) == 0) status[1] = where;
    dead = true;
  }
};

// Pairs of words words[at[i]], words[at[i] + 1], at[i] even, of i < n: all of them are asked for, then waited for.
template <int N>
__device__ inline void take(Watch& watch, const uint64_t* words, const int (&at)[N], int n, float2 (&to)[N]) {
  // Registers that only some lanes fill would count as in use wherever this stands in a loop: hence all that is set here.
  ulonglong2 two[N] = {};
  unsigned spins = 0;
  long long since = 0;
  while (true) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) two[i] = words_at(words + at[i]);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) all = all && two[i].x >> 32 == watch.tag && two[i].y >> 32 == watch.tag;
    if (all || watch.dead) break;
    if (++spins % 512 == 0) {
      const long long now = clock64();
      if (since == 0) since = now;
      if (*static_cast<volatile int32_t*>(watch.status) != 0) watch.dead = true;
      if (now - since > kPatience) watch.fail(kLate);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    to[i] = i < n ? make_float2(__uint_as_float(static_cast<unsigned>(two[i].x)),
                                __uint_as_float(static_cast<unsigned>(two[i].y)))
                  : make_float2(0.0f, 0.0f);
}
__device__ inline float2 take(Watch& watch, const uint64_t* words, int at) {
  const int one[1] = {at};
  float2 to[1];
  take<1>(watch, words, one, 1, to);
  return to[0];
}

// ---- A block's place, and what its threads find in shared memory.

// What a warp has to do for a product: units first + k * stride, k < count, its part of them, in passes. One place that one
// read brings, because from a phase's barrier on nothing else is waited for.
struct alignas(16) Mine {
  int first, count, stride, part;
  int slot;  // bytes: where its rows wait in shared memory; negative: nowhere
  int act;   // its first number of what they are multiplied with
  int passes, rows;
};
__device__ inline Mine share_of(const Matrix& m, int block, int blocks, int warp) {
  // From the last warp on: the first ones fetch what is multiplied, and do not wait for one another's products so.
  warp = kWarps - 1 - warp;
  const int first = block * m.units / blocks + warp / m.parts, end = (block + 1) * m.units / blocks;
  const int count = first < end ? (end - first + m.stride - 1) / m.stride : 0, part = warp % m.parts;
  const int slot = m.slot < 0 ? -1 : m.slot + warp * m.each * m.rows * m.passes * 512;
  return {first, count, m.stride, part, slot, part * m.columns, m.passes, m.rows};
}

// What stays the same is here too, where it takes no registers.
struct Static {
  float4 squares[2][kWarps / 4];
  Mine mine[kProducts][kWarps];
  int kv_head, split;  // of attention; no work: split -1
  int group_parts, group_head[kWarps], group_part[kWarps];  // of a warp there: which query head of the group, with which part of the run
  float rope[2][64];  // of the position: cosines, and sines as they are for the first of a pair (negative)
  uint64_t keys[kWarps];
  float extremes[2][kWarps];
  int chosen, dead, count, bin, need;
};

struct Here {
  const Decode& a;
  const Plan& plan;
  Static& fixed;
  unsigned char* shared;
  int block, warp, lane, thread;
  const uint64_t* words;  // the copy of the exchange that this block reads
  Watch watch;

  __device__ float* act(int turn) const { return reinterpret_cast<float*>(shared) + turn * plan.act; }
  __device__ uint64_t* words_of(int copy) const { return a.exchange + int64_t{copy} * plan.words; }

  // Lane `copy` of some writes the word of copy `copy`.
  __device__ void put(int at, float value, int copy) const {
    if (copy < a.copies) put_word(words_of(copy) + at, word(value, watch.tag));
  }
  // One thread, all copies.
  __device__ void put_pair(int at, float first, float second) const {
#pragma unroll 1
    for (int copy = 0; copy < a.copies; ++copy)
      put_words(words_of(copy) + at, word(first, watch.tag), word(second, watch.tag));
  }
};

// Where a phase's input number i lies in `act`, so that lanes that read 8 numbers each as two float4 meet no bank twice.
__device__ inline int act_at(int i) { return (i & ~255) | (i & 4) << 5 | (i & 0xf8) >> 1 | (i & 3); }

template <int n>
__device__ inline void copies_left() {  // until all but the last n groups have come
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// ---- Matrix rows times a vector.

__device__ inline int run_of(const Matrix& m, int unit) {
  return m.inverse == 0 ? unit : static_cast<int>(__umulhi(static_cast<unsigned>(unit), m.inverse));
}
__device__ inline int row_of(const Matrix& m, int unit, int r, int rows) {
  return min(unit + run_of(m, unit) * m.skip + r * m.apart, rows - 1);
}

// Asks for what `multiply` will need of the matrix, and ends a group of copies. Every lane copies what it alone will read: no
// one else waits for it.
template <typename T>
__device__ inline void prefetch(const Matrix& m, const Mine& mine, const void* weights, int rows, const Here& here) {
  if (m.slot >= 0) {
    uint4* to = reinterpret_cast<uint4*>(here.shared + mine.slot) + here.lane;
    const int start = mine.act + here.lane * 8;
#pragma unroll 1
    for (int i = 0; i < mine.count * m.rows; ++i) {
      const int k = m.rows == 2 ? i / 2 : i, r = m.rows == 2 ? i % 2 : 0;
      const int row = row_of(m, mine.first + k * m.stride, r, rows);
      const T* from = static_cast<const T*>(weights) + int64_t{row} * m.width + start;
#pragma unroll
      for (int p = 0; p < kMostPasses; ++p) {
        if (p >= m.passes) break;
        if (start + p * kPassColumns < m.width) copy16(to, from + p * kPassColumns);
        to += 32;
      }
    }
  }
  copies_commit();
}

template <typename T>
__device__ inline void add_products(const uint4& weights, const float (&x)[8], float (&sum)[2]) {
  float w[8];
  unpack(Pack<T>{weights}, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i % 2] = fmaf(w[i], x[i], sum[i % 2]);
}

// The products of this warp's units: done(unit, part, value), where of two rows lanes 0 to 15 have the first one's value and
// the others the second one's.
template <typename T, class Done>
__device__ inline void multiply(const Matrix& m, const Mine& shared_mine, const void* weights, int rows, const Here& here,
                                const float* act, Done done) {
  const Mine mine = shared_mine;
  if (mine.count == 0) return;
  float x[kMostPasses][8] = {};
#pragma unroll
  for (int p = 0; p < kMostPasses; ++p) {
    if (p >= mine.passes) break;
    const float4* from = reinterpret_cast<const float4*>(act + mine.act + p * kPassColumns) + here.lane;
    const float4 low = from[0], high = from[32];
    x[p][0] = low.x, x[p][1] = low.y, x[p][2] = low.z, x[p][3] = low.w;
    x[p][4] = high.x, x[p][5] = high.y, x[p][6] = high.z, x[p][7] = high.w;
  }
  if (mine.slot >= 0) copies_left<4>();  // five groups a layer, each used a layer after it was asked for
  const uint4* from = reinterpret_cast<const uint4*>(here.shared + mine.slot) + here.lane;
#pragma unroll 1
  for (int unit = mine.first, left = mine.count; left > 0; --left, unit += shared_mine.stride) {
    // All of a unit at once, so that it is waited for once.
    uint4 w[2][kMostPasses] = {};
    if (mine.slot >= 0) {
#pragma unroll
      for (int p = 0; p < kMostPasses; ++p) {
        if (p >= mine.passes) break;
        w[0][p] = from[p * 32];
        if (mine.rows == 2) w[1][p] = from[(mine.passes + p) * 32];
      }
      from += mine.rows * mine.passes * 32;
    } else {
      const int start = mine.act + here.lane * 8;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (r >= mine.rows) break;
        const T* row = static_cast<const T*>(weights) + int64_t{row_of(m, unit, r, rows)} * m.width + start;
#pragma unroll
        for (int p = 0; p < kMostPasses; ++p)
          if (p < mine.passes && start + p * kPassColumns < m.width)
            w[r][p] = __ldg(reinterpret_cast<const uint4*>(row + p * kPassColumns));
      }
    }
    float sum[2][2] = {};
#pragma unroll
    for (int p = 0; p < kMostPasses; ++p) {
      if (p >= mine.passes) break;
      add_products<T>(w[0][p], x[p], sum[0]);
      if (mine.rows == 2) add_products<T>(w[1][p], x[p], sum[1]);
    }
    float value = sum[0][0] + sum[0][1];
    float other = value;
    if (mine.rows == 2) {
      const float second = sum[1][0] + sum[1][1];
      other = here.lane < 16 ? second : value;
      value = here.lane < 16 ? value : second;
    }
    value += __shfl_xor_sync(~0u, other, 16);
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    done(unit, shared_mine.part, value);
  }
}

}  // namespace tinylm::decode
