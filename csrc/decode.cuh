// What the decode kernel's phases share: values that carry their own flags, a block's place, products of matrix rows.
#pragma once

#include "decode.h"
#include "rows.cuh"

namespace tinylm::decode {

// ---- The exchange. A value that another block waits for is a word of 8 bytes, {fp32, tag}: one store, which no load sees
// in half, so that who finds the tag of the present token has the value. No barrier, no fence, one trip through L2. A tag is
// never used twice; what a launch with another layout left at a word's place has its bits once in four billion. `copies` of all
// words let groups of blocks read different lines: L2 serves a line to one at a time.

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

// A record of 16 bytes, {pair of fp32, fp32, tag}: one access too.
__device__ inline void put_record(uint64_t* at, float2 two, float third, unsigned tag) {
  const uint64_t pair = uint64_t{__float_as_uint(two.y)} << 32 | __float_as_uint(two.x);
  asm volatile(
      "{\n\t.reg .b128 all;\n\tmov.b128 all, {%1, %2};\n\tst.relaxed.gpu.global.b128 [%0], all;\n\t}" ::"l"(at), "l"(pair),
      "l"(word(third, tag))
      : "memory");
}
__device__ inline ulonglong2 record_at(const uint64_t* at) {
  ulonglong2 two;
  asm volatile("{\n\t.reg .b128 all;\n\tld.relaxed.gpu.global.b128 all, [%2];\n\tmov.b128 {%0, %1}, all;\n\t}"
               : "=l"(two.x), "=l"(two.y)
               : "l"(at)
               : "memory");
  return two;
}

constexpr unsigned kPatience = 4'000'000;  // times that a word is asked for, .3 us each at least
constexpr int kLate = 1, kNoToken = 2;      // in status[0]
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
  // Whether to ask once more.
  __device__ bool again(unsigned spins) {
    if (spins % 1024 == 0) {
      if (*static_cast<volatile int32_t*>(status) != 0) dead = true;
      if (spins >= kPatience) fail(kLate);
    }
    return !dead;
  }
};

// Pairs of words at[i][0], at[i][1], at[i] aligned to 16 bytes, of i < n; or records. The rest counts as 0.
template <int N, bool kRecords = false>
struct Pairs {
  ulonglong2 two[N] = {};

  __device__ void ask(const uint64_t* const (&at)[N], int n) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) two[i] = kRecords ? record_at(at[i]) : words_at(at[i]);
  }
  __device__ bool came(unsigned tag, int n) const {
    unsigned wrong = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n)
        wrong |= (kRecords ? 0 : static_cast<unsigned>(two[i].x >> 32) ^ tag) | (static_cast<unsigned>(two[i].y >> 32) ^ tag);
    return wrong == 0;
  }
  __device__ void set(int i, float2 to) { two[i].x = __float_as_uint(to.x), two[i].y = __float_as_uint(to.y); }
  __device__ float2 operator[](int i) const {
    return make_float2(__uint_as_float(static_cast<unsigned>(two[i].x)),
                       __uint_as_float(static_cast<unsigned>(kRecords ? two[i].x >> 32 : two[i].y)));
  }
  __device__ float third(int i) const { return __uint_as_float(static_cast<unsigned>(two[i].y)); }
};

// Words, when they are there. To be called as late as can be: who asks too early has lost the time of a trip, and trips in vain
// are in the way of others.
template <bool kRecords = false, int N>
__device__ inline Pairs<N, kRecords> take(Watch& watch, const uint64_t* const (&at)[N], int n) {
  Pairs<N, kRecords> pairs;
  if (n <= 0) return pairs;
  for (unsigned spins = 1;; ++spins) {
    pairs.ask(at, n);
    if (pairs.came(watch.tag, n) || !watch.again(spins)) return pairs;
  }
}
__device__ inline float2 take(Watch& watch, const uint64_t* at) {
  const uint64_t* const one[1] = {at};
  return take(watch, one, 1)[0];
}

// ---- Among blocks of a cluster: numbers go into the shared memory of one of them, whose barrier counts their bytes.

#if __CUDA_ARCH__ >= 900
#define TINYLM_CLUSTERS 1
#endif

__device__ inline unsigned shared_address(const void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }
// All threads of a cluster.
__device__ inline void meet_cluster() {
#ifdef TINYLM_CLUSTERS
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// The place of `at` in the block of this rank.
__device__ inline unsigned place_in(int rank, const void* at) {
  unsigned address = 0;
#ifdef TINYLM_CLUSTERS
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(at)), "r"(rank));
#endif
  return address;
}
__device__ inline void send4(unsigned to, const float4& four, unsigned barrier) {
#ifdef TINYLM_CLUSTERS
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(four.x), "f"(four.y), "f"(four.z), "f"(four.w), "r"(barrier)
               : "memory");
#endif
}
__device__ inline void send2(unsigned to, float one, float other, unsigned barrier) {
#ifdef TINYLM_CLUSTERS
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(one),
               "f"(other), "r"(barrier)
               : "memory");
#endif
}
__device__ inline void barrier_init(uint64_t* barrier) {
#ifdef TINYLM_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
// One thread, once a phase.
__device__ inline void expect(uint64_t* barrier, int bytes) {
#ifdef TINYLM_CLUSTERS
  asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n\t}" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}
// Until all bytes of the phase of this parity are there.
__device__ inline void wait_for_bytes(Watch& watch, uint64_t* barrier, int parity) {
#ifdef TINYLM_CLUSTERS
  for (unsigned spins = 1; !watch.dead; ++spins) {
    int came;
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2, %3;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t}"
        : "=r"(came)
        : "r"(shared_address(barrier)), "r"(parity), "r"(1000)  // ns
        : "memory");
    if (came || !watch.again(spins)) return;
  }
#endif
}

// ---- A block's place, and what its threads find in shared memory.

__device__ inline int run_of(const Matrix& m, int unit) {
  return m.inverse == 0 ? unit : static_cast<int>(__umulhi(static_cast<unsigned>(unit), m.inverse));
}

// What a warp has to do for a product: units first + k * stride, k < count, its part of them. One place that two reads bring.
struct alignas(16) Mine {
  int first, count;
  int slot;  // bytes: where its rows wait in shared memory; negative: nowhere
  int act;   // its first number of what they are multiplied with
  int row;   // the first unit's first one
  int at;    // the word of its result, from the layer's first on
  int pair;  // of RoPE that turns it; kNoTurn: none
};
constexpr int kNoTurn = 64;
__device__ inline Mine share_of(const Decode& a, const Plan& plan, int product, int block, int warp) {
  const Matrix& m = plan.products[product];
  // From the last warp on: the first ones fetch what is multiplied, and do not wait for one another's products so.
  warp = kWarps - 1 - warp;
  const int first = block * m.units / plan.blocks + warp / m.parts, end = (block + 1) * m.units / plan.blocks;
  const int part = warp % m.parts, run = run_of(m, first);
  Mine mine;
  mine.first = first, mine.count = first < end ? (end - first + m.stride - 1) / m.stride : 0;
  mine.slot = m.slot < 0 ? -1 : m.slot + warp * m.each * m.rows * m.passes * 512;
  mine.act = part * m.columns;
  mine.row = first + run * m.skip;
  mine.at = product == kHead ? 0 : plan.at[product] + part * a.shape.dim + first;
  mine.pair = kNoTurn;
  if (product == kQkv) {
    const int half = m.run;
    mine.at += run * half;
    if (run < a.shape.heads + a.shape.kv_heads) mine.pair = first - run * half;
  }
  return mine;
}

// What a warp does of attention: `part` of the positions (parts or more: nothing), for up to eight heads and 64 numbers.
struct alignas(16) Role {
  int part, heads;
  int queries;  // where those of its heads begin
  int first;    // of its numbers, in eights
  int sums;     // where its own begin
};

// What stays the same is here too, where it takes no registers.
struct Static {
  Mine mine[kProducts][kWarps];
  int kv_head, split;  // of attention; no work: split -1
  int rank;            // which of its result's runs this block has; 0: it adds them up
  int at_result;       // the result's word, but for its row
  Role roles[kWarps];
  int pairs, adds_log2;  // of a result's numbers, and lanes that add one up
  uint64_t gathered;   // the barrier of a cluster's first block, for the sums of all its warps
  unsigned there, there_gathered;  // in this result's first block: where sums begin, and its barrier
  float rope[2][kNoTurn + 1];  // of the position: cosines, and sines as they are for the first of a pair (negative)
  uint64_t keys[kWarps], extremes[kWarps], drawn[kWarps];
  float kth;
  int chosen, dead;
  int too_many, met;  // of the sampler's logits
};

struct Here {
  const Decode& a;
  const Plan& plan;
  Static& fixed;
  unsigned char* shared;
  int block, warp, lane, thread;
  int copy;  // of the exchange, that this block reads
  Watch watch;

  __device__ float* act(int turn) const { return reinterpret_cast<float*>(shared) + turn * (plan.act + plan.squares); }
  __device__ uint64_t* words_of(int copy) const { return a.exchange + int64_t{copy} * plan.words; }
  __device__ const uint64_t* words() const { return words_of(copy); }

  // Lanes first, first + 1, ... of `lanes` have the same; each writes its copies.
  __device__ void put_pair(int at, float one, float other, int first, int lanes) const {
#pragma unroll 1
    for (int copy = first; copy < a.copies; copy += lanes)
      put_words(words_of(copy) + at, word(one, watch.tag), word(other, watch.tag));
  }
};

// A read that stays where it stands: the compiler would put it off until what is read is needed.
__device__ inline float4 read_now(const float* at) {
  float4 four;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(at))));
  return four;
}
// Computed where it stands, not later.
__device__ inline int pinned(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ inline uint64_t* pinned(uint64_t* at) {
  asm volatile("" : "+l"(at));
  return at;
}
// The same number in all lanes of a warp, and the compiler knows it: no code for lanes that go other ways.
__device__ inline int same(int value) { return __shfl_sync(~0u, value, 0); }

// Where a phase's input number i lies in `act`, so that lanes that read 8 numbers each as two float4 meet no bank twice.
__device__ inline int act_at(int i) { return (i & ~255) | (i & 4) << 5 | (i & 0xf8) >> 1 | (i & 3); }

// As copy16; what passes so is the first to leave L2, where weights and the exchange are to stay.
__device__ inline void copy16_passing(uint4* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "l"(policy)
               : "memory");
#else
  copy16(shared, global);
#endif
}
template <int n>
__device__ inline void copies_left() {  // until all but the last n groups have come
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// ---- Matrix rows times a vector. What differs between the products is known when they are compiled: constants, and no
// questions.

static_assert(kMostWidth <= kMostPasses * kPassColumns);  // so a row behind a norm is one warp's, from its beginning on

// Where row r of a unit begins whose first row is `row`. Only the head's last unit may have one row less.
template <int P>
__device__ inline uint64_t start_of(const Matrix& m, int row, int r, int vocab) {
  row += r == 0 ? 0 : m.apart;
  if constexpr (P == kHead) row = min(row, vocab - 1);
  return uint64_t{static_cast<unsigned>(row)} * static_cast<unsigned>(m.width);
}

// Asks for what `multiply` will need of the matrix, and ends a group of copies. Every lane copies what it alone will read: no
// one else waits for it.
template <typename T, int P>
__device__ inline void prefetch(const Matrix& m, const Mine& mine, const void* weights, int vocab, const Here& here) {
  if (mine.slot >= 0) {
    const int passes = pinned(m.passes);
    uint4* to = reinterpret_cast<uint4*>(here.shared + mine.slot) + here.lane;
    const int start = mine.act + here.lane * 8;
    const T* column = static_cast<const T*>(weights) + start;
    int row = mine.row, unit = mine.first;
#pragma unroll 1
    for (int left = mine.count; left > 0; --left) {
#pragma unroll
      for (int r = 0; r < kRows<P>; ++r) {
        const T* from = column + start_of<P>(m, row, r, vocab);
#pragma unroll
        for (int p = 0; p < kMostPasses; ++p) {
          if (p >= passes) break;
          if (start + p * kPassColumns < m.width) copy16(to + p * 32, from + p * kPassColumns);
        }
        to += passes * 32;
      }
      unit += m.stride, row = unit + run_of(m, unit) * m.skip;
    }
  }
  copies_commit();
}

// Where rows wait nowhere: those of the warp's later units come into L2 at least while the first one is waited for.
template <typename T, int P>
__device__ inline void foresee(const Matrix& m, const Mine& mine, const void* weights, int vocab, const Here& here) {
#ifdef __CUDA_ARCH__
  constexpr int kLine = 128 / sizeof(T);
  const int end = min(m.width, mine.act + m.columns);
#pragma unroll 1
  for (int k = 1; k < mine.count; ++k) {
    const int unit = mine.first + k * m.stride, row = unit + run_of(m, unit) * m.skip;
#pragma unroll 1
    for (int r = 0; r < kRows<P>; ++r) {
      const T* from = static_cast<const T*>(weights) + start_of<P>(m, row, r, vocab);
      for (int i = mine.act + here.lane * kLine; i < end; i += 32 * kLine)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
    }
  }
#endif
}

// A lane's numbers of a unit's R rows, N passes of each. They do not depend on what is multiplied with them, and are here
// before it.
template <int R, int N>
struct Rows {
  uint4 w[R][N];

  // Of the warp's unit number k, whose first row is `row`.
  template <typename T, int P>
  __device__ void load(const Matrix& m, const Mine& mine, int k, int row, const void* weights, int vocab,
                       const Here& here) {
    if (mine.slot >= 0) {
      const uint4* from = reinterpret_cast<const uint4*>(here.shared + mine.slot) + here.lane + k * (R * N * 32);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int p = 0; p < N; ++p) w[r][p] = from[(r * N + p) * 32];
      return;
    }
    const int start = mine.act + here.lane * 8;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T* of = static_cast<const T*>(weights) + start_of<P>(m, row, r, vocab) + start;
#pragma unroll
      for (int p = 0; p < N; ++p) {
        w[r][p] = make_uint4(0, 0, 0, 0);
        if (start + p * kPassColumns < m.width) w[r][p] = __ldg(reinterpret_cast<const uint4*>(of + p * kPassColumns));
      }
    }
  }

  // Their products with `act`: without branches, so that all reads are on their way at once, as far as registers go.
  template <typename T>
  __device__ void times(const float4* act, float (&sum)[R]) const {
    constexpr int kAtOnce = N < kMostPasses ? N : N / 2;
    float part[R][4] = {};
#pragma unroll
    for (int first = 0; first < N; first += kAtOnce) {
      float4 x[kAtOnce][2];
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p)
        x[p][0] = act[(first + p) * (kPassColumns / 4)], x[p][1] = act[(first + p) * (kPassColumns / 4) + 32];
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          float v[8];
          unpack(Pack<T>{w[r][first + p]}, v);
          const float4 &low = x[p][0], &high = x[p][1];
          part[r][0] = fmaf(v[0], low.x, part[r][0]), part[r][1] = fmaf(v[1], low.y, part[r][1]);
          part[r][2] = fmaf(v[2], low.z, part[r][2]), part[r][3] = fmaf(v[3], low.w, part[r][3]);
          part[r][0] = fmaf(v[4], high.x, part[r][0]), part[r][1] = fmaf(v[5], high.y, part[r][1]);
          part[r][2] = fmaf(v[6], high.z, part[r][2]), part[r][3] = fmaf(v[7], high.w, part[r][3]);
        }
      }
      if (kAtOnce < N) asm volatile("" ::: "memory");
    }
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] = (part[r][0] + part[r][1]) + (part[r][2] + part[r][3]);
  }
};

}  // namespace tinylm::decode
