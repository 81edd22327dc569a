// RMSNorm forward: every element is read once and written once, in 16 bytes, and memory is never left without requests.
//
// A row is held in registers by some lanes of a warp, by a block or by the blocks of a cluster (Span), 2 to 8 packs of
// 16 bytes a thread, whichever keeps the most bytes on their way. Blocks come and go, a row each: while some load, others
// sum or store. Weights are requested before the row is waited for. Shares of copy on an H200, 0.5 GiB of rows, from a
// tuning program's sweeps, timed by events, or, where it says so, from the suite:
//  - plain loads, not ld.global.nc.L1::no_allocate: bf16 4,096 columns .98 against .93, 1,024 .995 against .97;
//  - a persistent grid with asynchronous copies ahead, as the backward has, is slower here: .91 to .95 up to 32,768
//    columns, and 2% faster from 65,536 on only;
//  - reading a row twice instead, from L2 the second time: .91 with 16,384 columns, .98 here;
//  - what long rows lack is bytes on their way while blocks meet: bf16, 65,536 columns with 4, 3, 2 blocks a
//    multiprocessor .92, .85, .70, and registers hold no more; half the packs a thread .86;
//  - packs a thread, 4,096 columns of bf16: 2, 4, 8 give .966, .970, .980, but a call of one row takes 2.9, 3.1 us (the
//    suite) and, with 8, half as much again; fp32: 4 and 8 give .973 and .970, one row 3.0 and 3.7 us (the suite);
//    8,192 columns of fp32: 4 and 8 give .940 and .969 (the suite);
//  - weights of 8 packs requested early: .65 where .97 is reached without, for want of registers;
//  - streaming stores (.cs): up to 1% slower (on an H100).
// Rows that start anywhere (an odd hidden size) go through shared memory, see Stream; bf16, 4,095 columns: .85, and .47
// by loads of single elements.
#include "rows.cuh"

namespace tinylm {

// What a kernel reads of a call, what all need first: parameters come from memory in lines too, and as late as a row.
struct Call {
  const void *x, *weight;
  void *y, *rstd;
  int64_t rows, hidden;
  float eps;
  bool weight_f32;
  Launch launch;
  RowMap x_rows;
  const void* residual;
  void* sum;
  RowMap residual_rows;

  Call(const RmsNorm& a, const Launch& launch)
      : x(a.x), weight(a.weight), y(a.y), rstd(a.rstd), rows(a.rows), hidden(a.hidden), eps(static_cast<float>(a.eps)),
        weight_f32(a.weight_f32), launch(launch), x_rows(a.x_rows), residual(a.residual), sum(a.sum),
        residual_rows(a.residual_rows) {}
};

template <typename T, int K, Span kSpan, bool kAdd, bool kShift>
__global__ void __launch_bounds__(kSpan == Span::lanes ? 64 : 512,
                                  kAdd || (kShift && K == 8)  ? 1
                                  : kSpan == Span::lanes ? (kShift ? 12 : 16)
                                                         : 2)
    rmsnorm_rows(const __grid_constant__ Call a) {
  const Launch& g = a.launch;
  constexpr bool kExact = sizeof(T) == 4;  // halves are right without
  constexpr int N = kAdd ? 2 : 1;
  extern __shared__ __align__(128) uint4 shared[];
  __shared__ Exchange<kSpan, kExact> exchange;
  using S = Stream<T, K, N, kSpan, kShift>;
  constexpr int V = S::V;
  const Place<T, K, kSpan> place(g, a.hidden);
  const S stream(place, shared);  // with kShift alone
  const int64_t row = kSpan == Span::lanes ? (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / g.lanes
                                           : int64_t{blockIdx.x} / (kSpan == Span::cluster ? g.blocks : 1);
  const bool live = kSpan != Span::lanes || row < a.rows;
  const T* tensors[N] = {static_cast<const T*>(a.x) + (live ? a.x_rows.start(row) : 0)};
  if constexpr (kAdd) tensors[1] = static_cast<const T*>(a.residual) + (live ? a.residual_rows.start(row) : 0);
  T* y = static_cast<T*>(a.y) + row * a.hidden;
  T* h_out = static_cast<T*>(a.sum) + row * a.hidden;

  Pack<T> packs[N][K];
  Pack<T>(&h)[K] = packs[0];
  if constexpr (kShift) {
    if (live) {
#pragma unroll
      for (int t = 0; t < N; ++t) stream.request(0, t, tensors[t]);
    }
    copies_commit();
  } else {
#pragma unroll
    for (int t = 0; t < N; ++t) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        packs[t][k] = live && place.has(k) ? Pack<T>{reinterpret_cast<const uint4*>(tensors[t])[place.pack_at(k)]}
                                           : zeros<T>();
    }
  }
  constexpr int kEarly = K <= 4 ? K : 0;  // packs of weights that are loaded beside the row
  Pack<T> weight[kEarly ? kEarly : 1];
  const bool early = kEarly > 0 && g.aligned_weight && a.weight_f32 == (sizeof(T) == 4);
  if (early) {
#pragma unroll
    for (int k = 0; k < kEarly; ++k)
      if (kShift ? (place.pack_at(k) + 1) * V <= place.hidden : place.has(k))
        weight[k] = {__ldg(static_cast<const uint4*>(a.weight) + place.pack_at(k))};
  }
  exchange.init();
  if constexpr (kShift) {
    copies_wait(0);
    stream.sync();
#pragma unroll
    for (int t = 0; t < N; ++t) {
      const int before = S::before_of(tensors[t]);
#pragma unroll
      for (int k = 0; k < K; ++k) packs[t][k] = stream.fetch(0, t, k, before);
    }
    if constexpr (kAdd) stream.sync();  // before `put` writes where others fetch
  }
  float part[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float v[V];
    unpack(h[k], v);
    if constexpr (kAdd) {
      float more[V];
      unpack(packs[1][k], more);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] += more[i];
      h[k] = pack<T>(v);
      stream.put(live, stream.slot(0, 1), k, h_out, h[k]);
      unpack(h[k], v);
    }
    if constexpr (kShift) place.mask(k, v);
    part[k] = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) part[k] = fmaf(v[i], v[i], part[k]);
  }
  exchange.ready();
  const float sum = exchange.sum(tree(part), g, 0);
  const float mean = kExact ? sum / static_cast<float>(a.hidden) : sum * (1.0f / static_cast<float>(a.hidden));
  const float rstd = kExact ? __frsqrt_rn(mean + a.eps) : rsqrtf(mean + a.eps);
  if (a.rstd != nullptr && live && place.first == 0) static_cast<float*>(a.rstd)[row] = rstd;
  if constexpr (kShift && kSpan == Span::lanes) __syncwarp();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int at = place.pack_at(k) * V;
    float v[V], w[V] = {};
    if (early && (!kShift || at + V <= place.hidden)) {
      unpack(weight[kEarly ? k : 0], w);
    } else if (kShift) {
      if (place.has(k)) weights_anywhere<T>(a.weight, a.weight_f32, at, place.hidden, w);
    } else if (place.has(k)) {
      weights<T>(a.weight, a.weight_f32, at, w);
    }
    repack(h[k]);
    unpack(h[k], v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = v[i] * rstd * w[i];
    stream.put(live, stream.slot(0, 0), k, y, pack<T>(v));
  }
  if constexpr (kShift) {
    stream.sync();
    if (live) {
      stream.flush(stream.slot(0, 0), y);
      if constexpr (kAdd) stream.flush(stream.slot(0, 1), h_out);
    }
  }
}

constexpr int kUnroll = 4;

// Rows that neither registers nor, for want of alignment, shared memory hold, or for which a card has no clusters: read
// twice, the second time from L2. A block a row.
template <typename T, bool kAdd, bool kShift>
__global__ void __launch_bounds__(kLongThreads, 1)
    rmsnorm_long(const __grid_constant__ Call a) {
  constexpr int V = Pack<T>::size;
  __shared__ Exchange<Span::block, true> exchange;
  const int64_t row = blockIdx.x, count = (a.hidden + V - 1) / V;
  const T* x = static_cast<const T*>(a.x) + a.x_rows.start(row);
  const T* residual = static_cast<const T*>(a.residual) + (kAdd ? a.residual_rows.start(row) : 0);
  T* y = static_cast<T*>(a.y) + row * a.hidden;
  T* h_out = static_cast<T*>(a.sum) + row * a.hidden;
  exchange.init();
  Sum sum;
  for (int64_t c0 = threadIdx.x; c0 < count; c0 += kUnroll * kLongThreads) {
    Pack<T> h[kUnroll], r[kUnroll];
    float part[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t at = (c0 + k * kLongThreads) * V;
      h[k] = load_long<T, kShift>(x, at, a.hidden);
      if constexpr (kAdd) r[k] = load_long<T, kShift>(residual, at, a.hidden);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      float v[V], more[V];
      unpack(h[k], v);
      if constexpr (kAdd) {
        unpack(r[k], more);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] += more[i];
        h[k] = pack<T>(v);
        store_long<T, kShift>(h_out, (c0 + k * kLongThreads) * V, a.hidden, h[k]);
        unpack(h[k], v);
      }
      part[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < V; ++i) part[k] = fmaf(v[i], v[i], part[k]);
    }
    sum.add({tree(part), 0.0f});
  }
  const float total = exchange.sum(sum.value(), {kLongThreads, 1, 1, false}, 0);
  const float rstd = __frsqrt_rn(total / static_cast<float>(a.hidden) + a.eps);
  if (a.rstd != nullptr && threadIdx.x == 0) static_cast<float*>(a.rstd)[row] = rstd;
  for (int64_t c = threadIdx.x; c < count; c += kLongThreads) {
    float v[V], w[V];
    unpack(load_long<T, kShift>(kAdd ? h_out : x, c * V, a.hidden), v);
    weights_long<T, kShift>(a.weight, a.weight_f32, c * V, a.hidden, w);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = v[i] * rstd * w[i];
    store_long<T, kShift>(y, c * V, a.hidden, pack<T>(v));
  }
}

// Packs of a thread (K) and threads of a row, by the hidden size and the size of T alone: a row's sum is added up in the
// same order in every batch and at every address.
template <typename T, bool kAdd, bool kShift>
const char* launch(const RmsNorm& a, cudaStream_t stream) {
  constexpr int V = Pack<T>::size;
  const Card& card = this_card();
  const int64_t packs = (a.hidden + V - 1) / V;
  // Such rows never come by packs: 4 of them a thread, because both those on their way in and out are in shared memory
  // too (bf16, 50,257 columns: .54 with 4 in 8 blocks, .28 with 8 in 4; 65,536: .86 and .92; 4,095: .85, with 2 .65).
  const bool odd = a.hidden % V != 0;
  Launch g{1, 1, 1, aligned16(a.weight)};
  int threads = 64, rows_of_block = 1, pitch = 0;
  const void* kernel = nullptr;
  int64_t blocks = a.rows;
  auto take = [&](auto k, auto span) {
    constexpr int K = decltype(k)::value;
    constexpr Span kSpan = decltype(span)::value;
    kernel = reinterpret_cast<const void*>(rmsnorm_rows<T, K, kSpan, kAdd, kShift>);
    pitch = Stream<T, K, 1, kSpan, kShift>::pitch(g.lanes);
  };
  if (kShift && packs > 64 && packs <= 128) {  // a row's warp is a block of its own: 1,001 columns .81, not .75
    threads = g.lanes = 32;
    take(Number<4>(), Is<Span::block>());
  } else if (packs <= 128) {
    while (g.lanes * (packs <= 32 ? 2 : 4) < packs) g.lanes *= 2;
    rows_of_block = threads / g.lanes;
    blocks = (a.rows + rows_of_block - 1) / rows_of_block;
    packs <= 32 ? take(Number<2>(), Is<Span::lanes>()) : take(Number<4>(), Is<Span::lanes>());
  } else if (odd && card.clusters && packs > 2048 && packs <= 8 * 1024) {
    g.blocks = packs <= 4096 ? 4 : 8;
    threads = g.lanes = warps_of((packs + g.blocks - 1) / g.blocks, 4) * 32;
    blocks = a.rows * g.blocks;
    if constexpr (kShift) take(Number<4>(), Is<Span::cluster>());
  } else if (packs <= 512 && !odd) {
    threads = g.lanes = warps_of(packs, 2) * 32;
    take(Number<2>(), Is<Span::block>());
  } else if (packs <= 4096) {
    const bool eight = packs > (sizeof(T) == 4 ? 1024 : 2048);
    threads = g.lanes = warps_of(packs, eight ? 8 : 4) * 32;
    eight ? take(Number<8>(), Is<Span::block>()) : take(Number<4>(), Is<Span::block>());
  } else if (card.clusters && packs <= 8 * 4096) {
    threads = sizeof(T) == 4 || packs > 8 * 2048 ? 512 : 256;
    while (g.blocks * threads * 8 < packs) g.blocks *= 2;
    threads = g.lanes = warps_of((packs + g.blocks - 1) / g.blocks, 8) * 32;
    blocks = a.rows * g.blocks;
    take(Number<8>(), Is<Span::cluster>());
  }
  const size_t row_bytes = size_t{16} * rows_of_block * (pitch + 8);
  size_t shared = kShift ? size_t{16} * (kAdd ? 2 : 1) * rows_of_block * pitch : 0;
  // What the variant that takes the most needs decides for all, because they add up in the same order.
  if (kernel == nullptr || (packs > 128 && 2 * row_bytes + 2048 > card.shared_block)) {
    kernel = reinterpret_cast<const void*>(rmsnorm_long<T, kAdd, kShift>);
    threads = kLongThreads, blocks = a.rows, g.blocks = 1, shared = 0;
  }
  Call call(a, g);
  void* arguments[] = {&call};
  return start(kernel, blocks, threads, shared, g.blocks, arguments, stream);
}

template <typename T>
const char* launch(const RmsNorm& a, cudaStream_t stream) {
  constexpr int V = Pack<T>::size;
  const bool apart = a.hidden % V != 0 || !aligned_rows(a.x, a.x_rows, V) || !aligned16(a.weight) || !aligned16(a.y) ||
                     (a.residual != nullptr && !(aligned_rows(a.residual, a.residual_rows, V) && aligned16(a.sum)));
  if (a.residual != nullptr) return apart ? launch<T, true, true>(a, stream) : launch<T, true, false>(a, stream);
  return apart ? launch<T, false, true>(a, stream) : launch<T, false, false>(a, stream);
}

const char* rmsnorm_cuda(const RmsNorm& a, void* stream) {
  if (a.rows == 0) return nullptr;
  auto* on = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case Dtype::f32: return launch<float>(a, on);
    case Dtype::f16: return launch<__half>(a, on);
    case Dtype::bf16: return launch<__nv_bfloat16>(a, on);
    default: return "fp64 runs on the CPU alone";
  }
}

}  // namespace tinylm
