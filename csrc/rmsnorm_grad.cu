// RMSNorm backward, dx and dweight in one pass: both inputs are read once, dx is written once.
//
// A few blocks a multiprocessor stay and work on row after row; the next one to three rows are on their way to shared
// memory by asynchronous copies, each thread's packs to its own slots, so that nothing but a row's one sum needs to be
// synchronized (rows that start anywhere: see Stream). dweight is summed in registers; each block (or cluster) leaves one
// row of partial sums, which a second kernel adds up, always in the same order. Shares of copy on an H200, 0.5 GiB of
// rows, bf16, from a tuning program's sweeps, timed by events and not by the suite:
//  - rows of shared memory at multiples of 128 bytes: 2,048 columns 1.00; 80 bytes past one, .84;
//  - 256 threads a multiprocessor, not as many as fit: 2,048 columns 1.00 against .96, 256 columns .95 against .93;
//  - a cluster's blocks meet by asynchronous stores on an mbarrier; by cluster barriers, which wait for stores to global
//    memory too: 32,768 columns .84 against .74 (both without the first point).
//  - partial sums written 16 bytes at a time, not 4 by lanes 32 bytes apart: 2 MiB of 4,096 columns 11.6 us, not 16.2.
#include <algorithm>
#include <map>
#include <tuple>

#include "rows.cuh"

namespace tinylm {

constexpr int kGradPacks = 4;  // of a thread
constexpr int64_t kRowsOfUnit = 2;  // at least, because each unit's partial sums are written and read again
// Of a block, and how many such blocks a multiprocessor's registers are enough for without spilling.
template <Span kSpan, bool kShift>
constexpr int kThreads = kShift && kSpan == Span::lanes ? 128 : 256;
template <Span kSpan, bool kSum, bool kShift>
constexpr int kResident = !kShift ? 1 : kSpan == Span::lanes ? (kSum ? 2 : 3) : kSum ? 1 : 2;

// Below compute capability 9.0 a kernel for clusters is compiled and never run: it may have what registers it takes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClustersRun = false;
#else
constexpr bool kClustersRun = true;
#endif

// To addresses that are multiples of 16 bytes.
template <int V>
__device__ inline void store_floats(float* to, const float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; i += 4) reinterpret_cast<float4*>(to + i)[0] = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}

// Some blocks a multiprocessor, each of which works on row after row, has the next ones on their way, and sums its part
// of dweight in registers. Without kShift a row is read from shared memory once; with it registers would not do.
template <typename T, Span kSpan, bool kSum, bool kShift>
__global__ void __launch_bounds__(kThreads<kSpan, kShift>,
                                  kSpan == Span::cluster && !kClustersRun ? 1 : kResident<kSpan, kSum, kShift>)
    rmsnorm_grad_rows(const __grid_constant__ RmsNormGrad a, const __grid_constant__ RowMap h_rows,
                      const __grid_constant__ RowMap dy_rows, const __grid_constant__ RowMap dsum_rows,
                      const Launch g) {
  constexpr int K = kGradPacks;
  constexpr bool kKeep = !kShift;
  extern __shared__ __align__(128) uint4 shared[];
  __shared__ Exchange<kSpan, false> exchange;
  constexpr int N = kSum ? 3 : 2;
  using S = Stream<T, K, N, kSpan, kShift>;
  constexpr int V = S::V;
  const Place<T, K, kSpan> place(g, a.hidden);
  const S stream(place, shared);
  const int groups = kSpan == Span::lanes ? blockDim.x / g.lanes : 1;  // rows that the block works on at once
  const int64_t unit = kSpan == Span::cluster ? blockIdx.x / g.blocks : blockIdx.x;
  const int64_t step = (kSpan == Span::cluster ? gridDim.x / g.blocks : gridDim.x) * int64_t{groups};
  const int64_t begin = unit * groups + (kSpan == Span::lanes ? threadIdx.x / 32 * (32 / g.lanes) : 0);  // of the warp
  const int sub = kSpan == Span::lanes ? threadIdx.x % 32 / g.lanes : 0;
  auto live = [&](int64_t row) { return kSpan != Span::lanes || row < a.rows; };
  auto start = [&](int t, int64_t row) {
    return static_cast<const T*>(t == 0 ? a.h : t == 1 ? a.dy : a.dsum) +
           (t == 0 ? h_rows : t == 1 ? dy_rows : dsum_rows).start(row);
  };
  auto before = [&](int t, int64_t row) { return kShift && live(row) ? S::before_of(start(t, row)) : 0; };
  auto request = [&](int stage, int64_t row) {
    if (row < a.rows) {
#pragma unroll
      for (int t = 0; t < N; ++t) stream.request(stage, t, start(t, row));
    }
    copies_commit();
  };
  if constexpr (!kShift) stream.clear(g.stages);
  for (int stage = 0; stage < g.stages; ++stage) request(stage, begin + sub + stage * step);
  float w[K][V], dw[K][V];
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int i = 0; i < V; ++i) w[k][i] = dw[k][i] = 0.0f;
    const int at = place.pack_at(k) * V;
    if constexpr (kShift) {
      weights_anywhere<T>(a.weight, a.weight_f32, at, place.hidden, w[k]);
    } else if (place.has(k)) {
      weights<T>(a.weight, a.weight_f32, at, w[k]);
    }
  }
  const float* rstds = static_cast<const float*>(a.rstd);
  const float per_element = 1.0f / static_cast<float>(a.hidden);
  // What a thread has of the sum of weight * dy * h.
  auto product = [&](const auto& fetch) {
    float part[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float h[V], dy[V];
      unpack(fetch(0, k), h), unpack(fetch(1, k), dy);
      if constexpr (kShift) place.mask(k, h), place.mask(k, dy);
      part[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < V; ++i) part[k] = fmaf(w[k][i] * dy[i], h[i], part[k]);
    }
    return tree(part);
  };
  auto from = [&](int stage, int64_t row) {
    const int before_h = before(0, row), before_dy = before(1, row), before_dsum = kSum ? before(2, row) : 0;
    return [&stream, stage, before_h, before_dy, before_dsum](int t, int k) {
      return stream.fetch(stage, t, k, t == 0 ? before_h : t == 1 ? before_dy : before_dsum);
    };
  };

  float next_rstd = begin + sub < a.rows ? __ldg(rstds + begin + sub) : 0.0f;
  exchange.init();
  exchange.ready();
  int stage = 0;
  unsigned turn = 0;
  for (int64_t first = begin; first < a.rows; first += step) {
    const int64_t row = first + sub;
    const float rstd = next_rstd;
    next_rstd = row + step < a.rows ? __ldg(rstds + row + step) : 0.0f;
    Pack<T> kept[kKeep ? N : 1][kKeep ? K : 1];
    copies_wait(g.stages - 1);
    if constexpr (kShift) stream.sync();
    const auto fetch = from(stage, row);
    float dot;
    if constexpr (kKeep) {
#pragma unroll
      for (int t = 0; t < N; ++t) {
#pragma unroll
        for (int k = 0; k < K; ++k) kept[t][k] = fetch(t, k);
      }
      request(stage, row + g.stages * step);
      dot = exchange.sum(product([&](int t, int k) { return kept[t][k]; }), g, turn);
    } else {
      dot = exchange.sum(product(fetch), g, turn);
    }
    const float slope = dot * rstd * per_element * rstd;  // no power of rstd above the first: it may be 1e-19
    T* dx_row = static_cast<T*>(a.dx) + row * a.hidden;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float h[V], dy[V], dx[V];
      auto pack_of = [&](int t) {
        if constexpr (kKeep) {
          repack(kept[t][k]);
          return kept[t][k];
        } else {
          return fetch(t, k);
        }
      };
      unpack(pack_of(0), h), unpack(pack_of(1), dy);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        h[i] *= rstd;
        dx[i] = fmaf(w[k][i], dy[i] * rstd, -h[i] * slope);
        if (live(row)) dw[k][i] = fmaf(dy[i], h[i], dw[k][i]);  // what lies there else may be NaN
      }
      if constexpr (kSum) {
        unpack(pack_of(2), h);
#pragma unroll
        for (int i = 0; i < V; ++i) dx[i] += h[i];
      }
      stream.put(live(row), stream.slot(g.stages, 0), k, dx_row, pack<T>(dx));
    }
    if constexpr (kShift) {
      stream.sync();
      request(stage, row + g.stages * step);
      if (live(row)) stream.flush(stream.slot(g.stages, 0), dx_row);
    }
    stage = stage + 1 == g.stages ? 0 : stage + 1;
    ++turn;
  }
  copies_wait(0);

  float* partials = a.partials + unit * a.hidden;
  if constexpr (kSpan != Span::lanes) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = place.pack_at(k) * V;
      if constexpr (kShift) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (at + i < a.hidden) partials[at + i] = dw[k][i];
      } else if (place.has(k)) {
        store_floats(partials + at, dw[k]);
      }
    }
  } else {
    // Lanes of other rows hold the same columns: first those of the warp are added, then warp after warp.
    float* columns = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2)
          if (offset >= g.lanes) dw[k][i] += __shfl_xor_sync(~0u, dw[k][i], offset);
      }
    }
    for (int warp = 0; warp < blockDim.x / 32; ++warp) {
      __syncthreads();
      if (threadIdx.x / 32 != warp || sub != 0) continue;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int at = place.pack_at(k) * V;
        if constexpr (kShift) {
#pragma unroll
          for (int i = 0; i < V; ++i)
            if (at + i < a.hidden) columns[at + i] = (warp == 0 ? 0.0f : columns[at + i]) + dw[k][i];
        } else if (place.has(k)) {
#pragma unroll
          for (int i = 0; i < V; i += 4) {
            if (warp == 0) break;
            const float4 before = reinterpret_cast<const float4*>(columns + at + i)[0];
            dw[k][i] += before.x, dw[k][i + 1] += before.y, dw[k][i + 2] += before.z, dw[k][i + 3] += before.w;
          }
          store_floats(columns + at, dw[k]);
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.hidden; i += blockDim.x) partials[i] = columns[i];
  }
}

constexpr int kSumRows = 32;  // threads that share a column

// dweight: the columns of `partials` summed, always in the same order.
__global__ void __launch_bounds__(32 * kSumRows)
    rmsnorm_grad_columns(const float* partials, int64_t count, int64_t hidden, void* dweight, Dtype dtype) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");  // launched before the kernel that writes them has ended
#endif
  __shared__ float slots[kSumRows][33];
  const int64_t column = blockIdx.x * int64_t{32} + threadIdx.x;
  float sum = 0.0f;
  if (column < hidden) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < count; row += kSumRows) sum += partials[row * hidden + column];
  }
  slots[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  // A warp takes a column: its lanes the sums of the threads that shared it.
  sum = slots[threadIdx.x][threadIdx.y];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  const int64_t own = blockIdx.x * int64_t{32} + threadIdx.y;
  if (threadIdx.x != 0 || own >= hidden) return;
  if (dtype == Dtype::f32) static_cast<float*>(dweight)[own] = sum;
  if (dtype == Dtype::f16) static_cast<__half*>(dweight)[own] = __float2half_rn(sum);
  if (dtype == Dtype::bf16) static_cast<__nv_bfloat16*>(dweight)[own] = __float2bfloat16_rn(sum);
}

// The gradient of rows that no registers hold: a block a row, read twice, its part of dweight in global memory.
template <typename T, bool kSum, bool kShift>
__global__ void __launch_bounds__(kLongThreads, 1)
    rmsnorm_grad_long(const __grid_constant__ RmsNormGrad a, const __grid_constant__ RowMap h_rows,
                      const __grid_constant__ RowMap dy_rows, const __grid_constant__ RowMap dsum_rows) {
  constexpr int V = Pack<T>::size;
  __shared__ Exchange<Span::block, false> exchange;
  const int64_t count = (a.hidden + V - 1) / V;
  float* partials = a.partials + blockIdx.x * a.hidden;
  exchange.init();
  unsigned turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* h_row = static_cast<const T*>(a.h) + h_rows.start(row);
    const T* dy_row = static_cast<const T*>(a.dy) + dy_rows.start(row);
    const T* dsum_row = static_cast<const T*>(a.dsum) + (kSum ? dsum_rows.start(row) : 0);
    T* dx_row = static_cast<T*>(a.dx) + row * a.hidden;
    Sum part;
    for (int64_t c = threadIdx.x; c < count; c += kLongThreads) {
      float h[V], dy[V], w[V], p = 0.0f;
      unpack(load_long<T, kShift>(h_row, c * V, a.hidden), h), unpack(load_long<T, kShift>(dy_row, c * V, a.hidden), dy);
      weights_long<T, kShift>(a.weight, a.weight_f32, c * V, a.hidden, w);
#pragma unroll
      for (int i = 0; i < V; ++i) p = fmaf(w[i] * dy[i], h[i], p);
      part.add({p, 0.0f});
    }
    const float dot = exchange.sum(part.value(), {kLongThreads, 1, 1, false}, turn);
    const float rstd = static_cast<const float*>(a.rstd)[row];
    const float slope = dot * rstd / static_cast<float>(a.hidden) * rstd;
    for (int64_t c = threadIdx.x; c < count; c += kLongThreads) {
      float h[V], dy[V], w[V], dx[V];
      unpack(load_long<T, kShift>(h_row, c * V, a.hidden), h), unpack(load_long<T, kShift>(dy_row, c * V, a.hidden), dy);
      weights_long<T, kShift>(a.weight, a.weight_f32, c * V, a.hidden, w);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        h[i] *= rstd;
        dx[i] = fmaf(w[i], dy[i] * rstd, -h[i] * slope);
        if (c * V + i < a.hidden) {
          float& sum = partials[c * V + i];
          sum = turn == 0 ? dy[i] * h[i] : fmaf(dy[i], h[i], sum);
        }
      }
      if constexpr (kSum) {
        unpack(load_long<T, kShift>(dsum_row, c * V, a.hidden), h);
#pragma unroll
        for (int i = 0; i < V; ++i) dx[i] += h[i];
      }
      store_long<T, kShift>(dx_row, c * V, a.hidden, pack<T>(dx));
    }
    ++turn;
  }
}

struct Plan {
  const void* kernel;
  Launch g;
  int threads;
  int64_t units;  // blocks or clusters, each with a row of partials
  size_t shared;
};

// How many clusters the card holds at once, `resident` of their blocks a multiprocessor; asking takes longer than a
// launch. Clusters beyond that would wait until the first have ended.
inline int64_t clusters_that_fit(const void* kernel, int threads, size_t shared, int cluster, int resident) {
  static std::map<std::tuple<int, const void*, int, size_t, int, int>, int> known;
  static std::mutex lock;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> guard(lock);
  const auto [found, isnew] = known.try_emplace({device, kernel, threads, shared, cluster, resident}, 0);
  if (isnew) {
    const Card& card = this_card();
    const size_t share = std::min(card.shared_block, card.shared_multiprocessor / (resident + 1));
    const Configuration question(kernel, int64_t{64} * cluster, threads, std::max(shared, share), cluster, nullptr);
    if (cudaOccupancyMaxActiveClusters(&found->second, kernel, &question.launch) != cudaSuccess) {
      cudaGetLastError();
      found->second = 0;
    }
  }
  return found->second;
}

// As for the forward, by packs of a row and the size of T alone. Blocks a multiprocessor: 256 threads of them (192 in
// blocks of 64) are best where rows come by packs, because more of them have more rows open at once, which memory
// serves more slowly (bf16, 2,048 columns: 1.00 of copy with 3 blocks, .96 with 6). Else as many as registers allow.
template <typename T, bool kSum, bool kShift>
Plan plan(const RmsNormGrad& a) {
  constexpr int V = Pack<T>::size, K = kGradPacks, N = kSum ? 3 : 2;
  const Card& card = this_card();
  const int64_t packs = (a.hidden + V - 1) / V;
  Plan p{nullptr, {1, 1, 1, false}, kShift ? 128 : 64, 0, 0};
  int rows_of_block = 1, pitch = 0, most = 256 * kResident<Span::block, kSum, kShift>;
  if (packs <= 32 * K) {
    while (p.g.lanes * K < packs) p.g.lanes *= 2;
    if (!kShift && packs * 8 <= p.g.lanes * K * 7) p.threads = 128;  // 384, 768 columns: .96 in the tuning program, with 64 .90 and .91
    rows_of_block = p.threads / p.g.lanes;
    most = 128 * kResident<Span::lanes, kSum, kShift>;
    pitch = Stream<T, K, N, Span::lanes, kShift>::pitch(p.g.lanes);
    p.kernel = reinterpret_cast<const void*>(rmsnorm_grad_rows<T, Span::lanes, kSum, kShift>);
  } else if (packs <= 256 * K) {
    p.threads = p.g.lanes = warps_of(packs, K) * 32;
    pitch = Stream<T, K, N, Span::block, kShift>::pitch(p.g.lanes);
    p.kernel = reinterpret_cast<const void*>(rmsnorm_grad_rows<T, Span::block, kSum, kShift>);
  } else if (card.clusters && packs <= 16 * 256 * K) {
    const int wanted = sizeof(T) == 4 && packs <= 8 * 128 * K ? 128 : 256;
    while (p.g.blocks * wanted * K < packs) p.g.blocks *= 2;
    p.threads = p.g.lanes = warps_of((packs + p.g.blocks - 1) / p.g.blocks, K) * 32;
    pitch = Stream<T, K, N, Span::cluster, kShift>::pitch(p.g.lanes);
    p.kernel = reinterpret_cast<const void*>(rmsnorm_grad_rows<T, Span::cluster, kSum, kShift>);
  }
  if (p.kernel != nullptr) {
    int resident = std::max(1, kShift ? most / p.threads : p.threads <= 64 ? 3 : 256 / p.threads);
    auto bytes = [&](int stages) {
      const size_t held = size_t{16} * (stages * N + kShift) * rows_of_block * pitch;
      return std::max(held, p.g.blocks == 1 && packs <= 32 * K ? a.hidden * sizeof(float) : 0);
    };
    auto fits = [&](int stages) {  // 2 KB: what the kernel and the driver take besides
      return bytes(stages) + 2048 <= card.shared_block && resident * (bytes(stages) + 2048) <= card.shared_multiprocessor;
    };
    int stages = kShift ? 2 : 3;
    while (stages > 1 && !fits(stages)) --stages;
    while (resident > 1 && !fits(stages)) --resident;
    p.g.stages = stages;
    p.shared = bytes(stages);
    p.units = int64_t{card.multiprocessors} * resident / p.g.blocks;
    if (p.g.blocks > 1) p.units = std::min(p.units, clusters_that_fit(p.kernel, p.threads, p.shared, p.g.blocks, resident));
    if (p.units > 0 && fits(stages)) {
      const int64_t rows = kRowsOfUnit * rows_of_block;
      p.units = std::max<int64_t>(1, std::min(p.units, (a.rows + rows - 1) / rows));
      return p;
    }
  }
  p = {reinterpret_cast<const void*>(rmsnorm_grad_long<T, kSum, kShift>), {kLongThreads, 1, 1, false}, kLongThreads,
       std::max<int64_t>(1, std::min(a.rows, int64_t{2} * card.multiprocessors)), 0};
  return p;
}

template <typename T>
Plan plan(const RmsNormGrad& a) {
  constexpr int V = Pack<T>::size;
  const bool apart = a.hidden % V != 0 || !aligned_rows(a.h, a.h_rows, V) || !aligned_rows(a.dy, a.dy_rows, V) ||
                     !aligned16(a.weight) || !aligned16(a.dx) ||
                     (a.dsum != nullptr && !aligned_rows(a.dsum, a.dsum_rows, V));
  if (a.dsum != nullptr) return apart ? plan<T, true, true>(a) : plan<T, true, false>(a);
  return apart ? plan<T, false, true>(a) : plan<T, false, false>(a);
}

inline Plan plan_of(const RmsNormGrad& a) {
  switch (a.dtype) {
    case Dtype::f32: return plan<float>(a);
    case Dtype::f16: return plan<__half>(a);
    case Dtype::bf16: return plan<__nv_bfloat16>(a);
    default: return {nullptr, {1, 1, 1, false}, 0, 0, 0};
  }
}

const char* rmsnorm_partials(const RmsNormGrad& a, int64_t* count) {
  *count = a.rows == 0 ? 0 : plan_of(a).units;
  return nullptr;
}

const char* rmsnorm_grad_cuda(const RmsNormGrad& a, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  int64_t count = 0;
  if (a.rows > 0) {
    Plan p = plan_of(a);
    if (p.kernel == nullptr) return "fp64 runs on the CPU alone";
    count = p.units;
    RowMap h_rows(a.h_rows), dy_rows(a.dy_rows), dsum_rows(a.dsum_rows);
    void* arguments[] = {const_cast<RmsNormGrad*>(&a), &h_rows, &dy_rows, &dsum_rows, &p.g};
    if (const char* error = start(p.kernel, p.units * p.g.blocks, p.threads, p.shared, p.g.blocks, arguments, on))
      return error;
  }
  Configuration sums(nullptr, (a.hidden + 31) / 32, 32, 0, 1, on);
  sums.launch.blockDim = dim3(32, kSumRows);
  sums.attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  sums.attribute.val.programmaticStreamSerializationAllowed = 1;
  sums.launch.attrs = &sums.attribute, sums.launch.numAttrs = count > 0 && this_card().clusters ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&sums.launch, rmsnorm_grad_columns, static_cast<const float*>(a.partials),
                                               count, a.hidden, a.dweight, a.weight_f32 ? Dtype::f32 : a.dtype);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace tinylm
