// What kernels share: 16-byte packs, exact rounding, sums whose order is fixed, asynchronous copies; RMSNorm's alone, how
// rows lie and are launched.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <mutex>
#include <type_traits>

#include "rmsnorm.h"

namespace tinylm {

constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes of elements of T, which move at once.
template <typename T>
struct Pack {
  static constexpr int size = 16 / sizeof(T);
  uint4 raw;
};

// Hides from the compiler what a pack holds, so that it unpacks it again where it is needed, and does not keep floats.
template <typename T>
__device__ inline void repack(Pack<T>& p) {
  asm volatile("" : "+r"(p.raw.x), "+r"(p.raw.y), "+r"(p.raw.z), "+r"(p.raw.w));
}

__device__ inline float2 widen2(unsigned two, __nv_bfloat16) {
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
}
__device__ inline float2 widen2(unsigned two, __half) { return __half22float2(*reinterpret_cast<__half2*>(&two)); }
__device__ inline unsigned narrow2(float2 two, __nv_bfloat16) {
  __nv_bfloat162 rounded = __float22bfloat162_rn(two);
  return *reinterpret_cast<unsigned*>(&rounded);
}
__device__ inline unsigned narrow2(float2 two, __half) {
  __half2 rounded = __float22half2_rn(two);
  return *reinterpret_cast<unsigned*>(&rounded);
}

template <typename T, int V>
__device__ inline void unpack(const Pack<T>& pack, float (&to)[V]) {
  static_assert(V == Pack<T>::size);
  const unsigned words[4] = {pack.raw.x, pack.raw.y, pack.raw.z, pack.raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(words[i]);
    } else {
      const float2 two = widen2(words[i], T());
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  }
}

template <typename T, int V>
__device__ inline Pack<T> pack(const float (&from)[V]) {
  static_assert(V == Pack<T>::size);
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(from[i]);
    } else {
      words[i] = narrow2(make_float2(from[2 * i], from[2 * i + 1]), T());
    }
  }
  return {make_uint4(words[0], words[1], words[2], words[3])};
}

template <typename T>
__device__ inline Pack<T> zeros() {
  return {make_uint4(0, 0, 0, 0)};
}

// A predicate, not a branch: branches around stores would keep the compiler from interleaving packs.
template <typename T>
__device__ inline void store16(bool wanted, void* to, const Pack<T>& p) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v4.u32 [%1], {%2, %3, %4, %5}; }" ::"r"(
                   static_cast<unsigned>(wanted)),
               "l"(to), "r"(p.raw.x), "r"(p.raw.y), "r"(p.raw.z), "r"(p.raw.w)
               : "memory");
}

// Weights of elements at, at + 1, ..., of either dtype; `at` and the whole tensor are aligned to a pack.
template <typename T, int V>
__device__ inline void weights(const void* weight, bool f32, int64_t at, float (&to)[V]) {
  if constexpr (sizeof(T) == 2) {
    if (f32) {
      const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(weight) + at);
#pragma unroll
      for (int i = 0; i < V / 4; ++i) {
        const float4 four = __ldg(from + i);
        to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
      }
      return;
    }
  }
  unpack(Pack<T>{__ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(weight) + at))}, to);
}
// The same wherever `at` and the tensor lie; zeros past its end.
template <typename T, int V>
__device__ inline void weights_anywhere(const void* weight, bool f32, int64_t at, int64_t hidden, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const bool inside = at + i < hidden;
    if (f32) {
      to[i] = inside ? static_cast<const float*>(weight)[at + i] : 0.0f;
    } else {
      to[i] = inside ? static_cast<float>(static_cast<const T*>(weight)[at + i]) : 0.0f;
    }
  }
}

// Packs of rows of any length, one at a time: pack by pack where addresses allow it, else element by element.
template <typename T, bool kShift>
__device__ inline Pack<T> load_long(const T* row, int64_t at, int64_t hidden) {
  if (at >= hidden) return zeros<T>();
  if constexpr (!kShift) {
    return {*reinterpret_cast<const uint4*>(row + at)};
  } else {
    float v[Pack<T>::size];
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) v[i] = at + i < hidden ? static_cast<float>(row[at + i]) : 0.0f;
    return pack<T>(v);
  }
}
template <typename T, bool kShift>
__device__ inline void store_long(T* row, int64_t at, int64_t hidden, const Pack<T>& p) {
  if constexpr (!kShift) {
    store16(at < hidden, row + at, p);
  } else {
    float v[Pack<T>::size];
    unpack(p, v);
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i)
      if (at + i < hidden) row[at + i] = static_cast<T>(v[i]);
  }
}
template <typename T, bool kShift, int V>
__device__ inline void weights_long(const void* weight, bool f32, int64_t at, int64_t hidden, float (&to)[V]) {
  if constexpr (kShift) {
    weights_anywhere<T>(weight, f32, at, hidden, to);
  } else {
    weights<T>(weight, f32, at, to);
  }
}

// `Rows` with what division by its sizes takes: n / size = (n + high half of n * magic) >> shift, for n < 2^31
// (Granlund and Montgomery, 1994).
struct RowMap {
  int dims;
  int64_t stride[kLeadDims];
  uint32_t size[kLeadDims], magic[kLeadDims], shift[kLeadDims];

  explicit RowMap(const Rows& rows) : dims(rows.dims) {
    for (int d = 0; d < dims; ++d) {
      size[d] = static_cast<uint32_t>(rows.size[d]), stride[d] = rows.stride[d], shift[d] = 0;
      while ((uint64_t{1} << shift[d]) < size[d]) ++shift[d];
      magic[d] = static_cast<uint32_t>((((uint64_t{1} << shift[d]) - size[d]) << 32) / (size[d] ? size[d] : 1) + 1);
    }
  }
  __device__ int64_t start(int64_t row) const {
    if (dims == 1) return row * stride[0];
    auto n = static_cast<uint32_t>(row);
    int64_t at = 0;
#pragma unroll 1
    for (int d = dims - 1; d > 0; --d) {
      const uint32_t quotient = (__umulhi(n, magic[d]) + n) >> shift[d];
      at += (n - quotient * size[d]) * stride[d];
      n = quotient;
    }
    return at + n * stride[0];
  }
};

// Sum in pairs: log2(N) roundings deep.
template <int N>
__device__ inline float tree(const float (&v)[N]) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) half[i] = v[2 * i] + v[2 * i + 1];
    return tree(half);
  }
}

// A sum and what rounding took from it.
struct Sum {
  float high = 0.0f, low = 0.0f;
  __device__ void add(const Sum& other) {
    const float s = high + other.high, t = s - high;
    low = (low + other.low) + ((high - (s - t)) + (other.high - t));  // the same bits whichever is added to the other
    high = s;
  }
  // Where the sum is infinite or NaN the remainder means nothing.
  __device__ float value() const { return isfinite(high) ? high + low : high; }
};

// Of all lanes of an aligned group of `lanes` (a power of two); the same bits in each. kExact: rounded once.
template <bool kExact>
__device__ inline Sum sum_lanes(float v, int lanes) {
  Sum sum{v, 0.0f};
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (lanes <= offset) continue;
    if constexpr (kExact) {
      sum.add({__shfl_xor_sync(~0u, sum.high, offset), __shfl_xor_sync(~0u, sum.low, offset)});
    } else {
      sum.high += __shfl_xor_sync(~0u, sum.high, offset);
    }
  }
  return sum;
}

// Of the first `count` (at most 16) of 16 sums in shared memory, in pairs.
template <bool kExact>
__device__ inline Sum sum_slots(const float (&high)[16], const float (&low)[16], int count) {
  Sum four[4];
  auto four_of = [count](const float (&slots)[16], int i) {
    float4 v = reinterpret_cast<const float4*>(slots)[i];
    if (4 * i + 1 >= count) v.y = 0.0f;
    if (4 * i + 2 >= count) v.z = 0.0f;
    if (4 * i + 3 >= count) v.w = 0.0f;
    return v;
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * i >= count) break;
    const float4 v = four_of(high, i);
    if constexpr (kExact) {
      const float4 u = four_of(low, i);
      four[i] = {v.x, u.x};
      four[i].add({v.y, u.y});
      Sum right{v.z, u.z};
      right.add({v.w, u.w});
      four[i].add(right);
    } else {
      four[i].high = (v.x + v.y) + (v.z + v.w);
    }
  }
  if constexpr (!kExact) return {(four[0].high + four[1].high) + (four[2].high + four[3].high), 0.0f};
  if (count > 4) four[0].add(four[1]);
  if (count > 8) four[2].add(four[3]), four[0].add(four[2]);
  return four[0];
}

// 16 bytes (or the first `bytes` of them) to shared memory, without waiting for them where the card can.
__device__ inline void copy16(uint4* shared, const void* global, int bytes = 16) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes)
               : "memory");
#else
  if (bytes == 16) {
    *shared = *static_cast<const uint4*>(global);
  } else {
    auto* to = reinterpret_cast<uint16_t*>(shared);
    for (int i = 0; i < bytes / 2; ++i) to[i] = static_cast<const uint16_t*>(global)[i];
  }
#endif
}
__device__ inline void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
__device__ inline void copies_wait(int pending) {  // until all but the last `pending` (at most 2) groups have come
#if __CUDA_ARCH__ >= 800
  if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else if (pending == 2) {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
#endif
}

enum class Span { lanes, block, cluster };  // who holds a row: lanes of one warp, a block, the blocks of a cluster

struct Launch {
  int lanes;   // threads of a row in a block
  int blocks;  // of a row
  int stages;  // rows that are held or on their way, at most 3
  bool aligned_weight;
};

__device__ inline unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// Where the partial sums of a row meet; every thread of it gets the same bits. Those of a cluster's other blocks come by
// asynchronous stores that count down a barrier of the receiver: a cluster barrier instead would wait for all stores to
// global memory too. kExact: all after a thread's own part is rounded once.
template <Span kSpan, bool kExact>
struct Exchange {
  static constexpr bool kBlocks = kSpan == Span::cluster;
  alignas(16) float warps[2][2][16];  // [turn % 2][high, low][warp]
  alignas(16) float blocks[2][2][16];
  uint64_t arrived[2];

  __device__ void init() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i)
          asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at(&arrived[i])) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      }
      __syncthreads();
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    }
#endif
  }
  __device__ void ready() {  // before the first sum: the other blocks have started
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  // turn: 0, 1, 2, ... of the block's rows, whose slots alternate: a warp that is a row ahead writes beside what others
  // still read, and none can be two ahead.
  __device__ float sum(float v, const Launch& g, unsigned turn) {
    Sum sum = sum_lanes<kExact>(v, kSpan == Span::lanes ? g.lanes : 32);
    if constexpr (kSpan != Span::lanes) {
      auto& own = warps[turn % 2];
      if (threadIdx.x % 32 == 0) {
        own[0][threadIdx.x / 32] = sum.high;
        if constexpr (kExact) own[1][threadIdx.x / 32] = sum.low;
      }
      __syncthreads();
      sum = sum_slots<kExact>(own[0], own[1], g.lanes / 32);
    }
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks) {
      auto& all = blocks[turn % 2];
      const unsigned bar = at(&arrived[turn % 2]);
      if (threadIdx.x == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
                     "r"(g.blocks * (kExact ? 8 : 4))
                     : "memory");
      if (threadIdx.x < g.blocks) {
        send(&all[0][cluster_rank()], sum.high, bar);
        if constexpr (kExact) send(&all[1][cluster_rank()], sum.low, bar);
      }
      unsigned done = 0;
      while (!done)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
            "selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(bar), "r"(turn / 2 % 2)
            : "memory");
      sum = sum_slots<kExact>(all[0], all[1], g.blocks);
    }
#endif
    return kExact ? sum.value() : sum.high;
  }

 private:
#if __CUDA_ARCH__ >= 900
  __device__ static unsigned at(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
  // From thread i to block i of the cluster, at the same place there.
  __device__ static void send(const float* slot, float v, unsigned bar) {
    unsigned to, to_bar;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(at(slot)), "r"(threadIdx.x));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to_bar) : "r"(bar), "r"(threadIdx.x));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v),
                 "r"(to_bar)
                 : "memory");
  }
#endif
};

// The 16 bytes that start `offset` (0 to 15, a multiple of T's size) bytes into two neighbouring ones.
template <typename T>
__device__ inline Pack<T> between(const Pack<T>& left, const Pack<T>& right, int offset) {
  const uint4 &l = left.raw, &r = right.raw;
  unsigned w0, w1, w2, w3, w4;
  switch (offset / 4) {  // as a rule the same for a whole warp
    case 0: w0 = l.x, w1 = l.y, w2 = l.z, w3 = l.w, w4 = r.x; break;
    case 1: w0 = l.y, w1 = l.z, w2 = l.w, w3 = r.x, w4 = r.y; break;
    case 2: w0 = l.z, w1 = l.w, w2 = r.x, w3 = r.y, w4 = r.z; break;
    default: w0 = l.w, w1 = r.x, w2 = r.y, w3 = r.z, w4 = r.w; break;
  }
  if (sizeof(T) == 4 || offset % 4 == 0) return {make_uint4(w0, w1, w2, w3)};
  return {make_uint4(__funnelshift_r(w0, w1, 16), __funnelshift_r(w1, w2, 16), __funnelshift_r(w2, w3, 16),
                     __funnelshift_r(w3, w4, 16))};
}

// Which packs of a row a thread has: c = first + k * lanes, for k < K.
template <typename T, int K, Span kSpan>
struct Place {
  static constexpr int V = Pack<T>::size;
  int lane, lanes, first, hidden, count;

  __device__ Place(const Launch& g, int64_t a_hidden) : lanes(g.lanes), hidden(static_cast<int>(a_hidden)) {
    lane = kSpan == Span::lanes ? threadIdx.x % g.lanes : threadIdx.x;
    first = (kSpan == Span::cluster ? static_cast<int>(cluster_rank()) * lanes * K : 0) + lane;
    count = (hidden + V - 1) / V;
  }
  __device__ int pack_at(int k) const { return first + k * lanes; }
  __device__ bool has(int k) const { return pack_at(k) < count; }
  __device__ int base() const { return first - lane; }  // pack that the block starts with
  // Zeroes what a last, partial pack has of the next row.
  __device__ void mask(int k, float (&v)[V]) const {
    const int left = hidden - pack_at(k) * V;
    if (left < V) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = i < left ? v[i] : 0.0f;
    }
  }
};

// Rows of N tensors on their way through shared memory. A thread fetches only what it has requested itself, and nothing
// needs to be synchronized.
//
// With kShift rows may start anywhere, as those of an odd hidden size do. Memory is still read and written by the
// aligned 16 bytes ("chunks") that cover a row: pack c is put together from two of them, and results go back the same
// way, by `put` and, after a sync, `flush`. So nothing that is summed depends on where in memory a row starts.
template <typename T, int K, int N, Span kSpan, bool kShift>
struct Stream {
  static constexpr int V = Pack<T>::size;
  using P = Place<T, K, kSpan>;
  const P& place;
  uint4* buffer;  // [stages][N][rows of the block][pitch]
  int size;       // of a stage's tensor

  // In packs. Rows of shared memory start at multiples of 128 bytes: elsewhere asynchronous copies take twice as long.
  __host__ __device__ static int pitch(int lanes) { return (lanes * K + kShift + 7) / 8 * 8; }

  __device__ Stream(const P& place, uint4* shared) : place(place) {
    const int rows = kSpan == Span::lanes ? blockDim.x / place.lanes : 1;
    buffer = shared + (kSpan == Span::lanes ? threadIdx.x / place.lanes : 0) * pitch(place.lanes);
    size = rows * pitch(place.lanes);
  }
  __device__ uint4* slot(int stage, int t) const { return buffer + (stage * N + t) * size; }
  // Elements between the aligned address before a row and the row.
  __device__ static int before_of(const T* row) {
    return kShift ? static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T)) : 0;
  }
  __device__ void clear(int stages) const {  // what no request fills stays zero
    for (int i = 0; i < stages * N; ++i)
      for (int c = place.lane; c < place.lanes * K; c += place.lanes)
        buffer[i * size + c] = make_uint4(0, 0, 0, 0);
  }
  __device__ static void sync() {
    if constexpr (kSpan == Span::lanes) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  __device__ void request(int stage, int t, const T* row) const {
    uint4* to = slot(stage, t);
    if constexpr (!kShift) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int c = place.pack_at(k);
        if (c < place.count) copy16(to + c - place.base(), row + c * V);
      }
    } else {
      const T* from = row - before_of(row) + place.base() * V;
      const int bytes = (before_of(row) + place.hidden - place.base() * V) * static_cast<int>(sizeof(T));
      for (int c = place.lane; c <= place.lanes * K && c * 16 < bytes; c += place.lanes)
        copy16(to + c, from + c * V, min(16, bytes - c * 16));
    }
  }
  __device__ Pack<T> fetch(int stage, int t, int k, int before) const {
    const uint4* from = slot(stage, t) + place.pack_at(k) - place.base();
    if constexpr (!kShift) return {from[0]};
    return between<T>({from[0]}, {from[1]}, before * static_cast<int>(sizeof(T)));
  }
  __device__ void put(bool live, uint4* out, int k, T* row, const Pack<T>& p) const {
    const int c = place.pack_at(k);
    if constexpr (!kShift) {
      store16(live && c < place.count, row + c * V, p);
    } else if (live && c < place.count) {
      const int before = before_of(row);
      auto* words = reinterpret_cast<unsigned*>(out + c - place.base()) + before * static_cast<int>(sizeof(T)) / 4;
      if (sizeof(T) == 4 || before % 2 == 0) {
        words[0] = p.raw.x, words[1] = p.raw.y, words[2] = p.raw.z, words[3] = p.raw.w;
      } else {
        reinterpret_cast<uint16_t*>(words)[1] = static_cast<uint16_t>(p.raw.x);
        words[1] = __funnelshift_r(p.raw.x, p.raw.y, 16);
        words[2] = __funnelshift_r(p.raw.y, p.raw.z, 16);
        words[3] = __funnelshift_r(p.raw.z, p.raw.w, 16);
        reinterpret_cast<uint16_t*>(words)[8] = static_cast<uint16_t>(p.raw.w >> 16);
      }
    }
  }
  __device__ void flush(const uint4* out, T* row) const {
    if constexpr (kShift) {
      const int before = before_of(row);
      T* to = row - before + place.base() * V;
      const int end = before + min(place.hidden - place.base() * V, place.lanes * K * V);
      for (int c = place.lane; c <= place.lanes * K; c += place.lanes) {
        const int low = max(before - c * V, 0), high = min(end - c * V, V);
        const Pack<T> p{out[c]};
        store16(high - low == V, to + c * V, p);
        if (high - low < V) scatter(to + c * V, p, low, high);
      }
    }
  }

 private:
  // Elements begin to end of a pack.
  __device__ static void scatter(T* to, const Pack<T>& p, int begin, int end) {
    const unsigned words[4] = {p.raw.x, p.raw.y, p.raw.z, p.raw.w};
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < begin || i >= end) continue;
      if constexpr (sizeof(T) == 4) {
        reinterpret_cast<unsigned*>(to)[i] = words[i];
      } else {
        reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
      }
    }
  }
};

constexpr int kLongThreads = 512;

// ---- the host's side

struct Card {
  int multiprocessors = 0;
  bool clusters = false;  // of blocks, and launches that overlap: of the card, and of the code that runs on it
  size_t shared_block = 0, shared_multiprocessor = 0;  // bytes
};

static __global__ void compiled() {}

inline const Card& this_card() {
  static Card cards[64];
  static std::mutex lock;
  int device = 0;
  cudaGetDevice(&device);
  Card& card = cards[device % 64];
  const std::lock_guard<std::mutex> guard(lock);
  if (card.multiprocessors == 0) {
    auto read = [&](cudaDeviceAttr attribute) {
      int value = 0;
      cudaDeviceGetAttribute(&value, attribute, device);
      return value;
    };
    card.shared_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    card.shared_multiprocessor = read(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    // PTX of an older target runs on a new card, and knows nothing of clusters.
    cudaFuncAttributes code = {};
    cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(compiled));
    card.clusters = read(cudaDevAttrComputeCapabilityMajor) >= 9 && code.ptxVersion >= 90;
    card.multiprocessors = read(cudaDevAttrMultiProcessorCount);
  }
  return card;
}

template <int n>
using Number = std::integral_constant<int, n>;
template <Span span>
using Is = std::integral_constant<Span, span>;

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool aligned_rows(const void* p, const Rows& rows, int elements) {
  for (int d = 0; d < rows.dims; ++d)
    if (rows.stride[d] % elements != 0) return false;
  return aligned16(p);
}
inline int warps_of(int64_t packs, int k) { return static_cast<int>((packs + 32 * k - 1) / (32 * k)); }

// What both a launch and the question how many of its clusters fit need to know.
struct Configuration {
  cudaLaunchConfig_t launch = {};
  cudaLaunchAttribute attribute;  // `launch` points to it

  Configuration(const Configuration&) = delete;
  Configuration(const void* kernel, int64_t blocks, int threads, size_t shared, int cluster, cudaStream_t stream) {
    launch.gridDim = dim3(static_cast<unsigned>(blocks));
    launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = shared;
    launch.stream = stream;
    // Always the same: another thread may be about to launch the kernel with more. 2 KB are the kernel's own.
    if (shared > 32 * 1024)
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(this_card().shared_block) - 2048);
    if (cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      launch.attrs = &attribute, launch.numAttrs = 1;
    }
    if (cluster > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
};

inline const char* start(const void* kernel, int64_t blocks, int threads, size_t shared, int cluster, void** arguments,
                         cudaStream_t stream) {
  if (blocks > INT_MAX) return "more than 2^31 - 1 blocks: fewer rows at a time";
  const Configuration configuration(kernel, blocks, threads, shared, cluster, stream);
  const cudaError_t error = cudaLaunchKernelExC(&configuration.launch, kernel, arguments);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is told here, and not again
  return cudaGetErrorString(error);
}

}  // namespace tinylm
