// Matrix times vector, for a token through matrices that no cache holds: the time is that of reading the matrix once.
//
// A block's threads lie side by side along a row, so each keeps the same few packs of x in registers for all rows of its
// block, and no x is ever read again. Of the matrix a thread keeps kLoads packs on their way in a ring of registers: where
// a stage of it has been used, the rows that are a ring further are requested. Sums of a warp meet in shared memory once
// for kChunk rows. So nothing waits between the first request of a kernel and its last.
//
// Between kernels memory would idle for as long as a launch, a barrier and a read of x take. So the next kernel may start
// at once: its blocks come where this one's, of which two fill a multiprocessor's registers, leave one by one, and each
// requests the first rows of its own matrix before it waits for x. Measured on an H200, bf16, the four matrices of a
// layer of an 8B model, 436 MB (95.2 us at 4.58 TB/s, at which 16 GiB are read), and its head, 1.05 GB (229 us at that):
//   blocks a multiprocessor | the next starts when       | rows ahead into L2 | layer us | head us
//   1                       | the last rows are on their way | none           |   116.3  | 236.0
//   1                       | the same                   | 8                  |   113.0  | 232.2
//   1                       | at once                    | none               |   104.9  | 231.8
//   2                       | it ends                    | none               |   104.8  | 230.5
//   2                       | the last rows are on their way | none           |   101.4  | 229.9
//   2                       | the same                   | 8                  |   109.3  | 227.3
//   2                       | the same, half of the ring | none               |   101.5  | 231.4
//   2                       | 8 rows sooner              | none               |    98.1  | 228.8
//   2                       | at once                    | none               |    98.2  | 228.5
#include "choice.cuh"
#include "matvec.cuh"

namespace tinylm {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLoads = 16;   // packs of the matrix that a thread has on their way: 64 KiB in a block
constexpr int kChunk = 96;  // rows between two meetings of the warps

struct Call {
  const void *x, *norm, *weight;
  void* out;
  int64_t apart;  // bytes between a gate's row and its up's
  int outputs, packs, pitch;  // pitch: bytes of a row
  float eps, inverse;  // 1 / columns
  Standing* standing;
  bool count;
};

enum class Ending { store, swiglu, add };

// A thread's own 8 P numbers of x: as fp32 in registers, else as they came in shared memory, which it alone reads.
template <typename T, int P, bool kWide>
struct Mine {
  float values[P][8];
  __device__ void set(int p, const uint4& raw) { unpack(Pack<T>{raw}, values[p]); }
  __device__ void get(int p, float (&to)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = values[p][i];
  }
};
template <typename T, int P>
struct Mine<T, P, false> {
  unsigned slot;
  __device__ Mine() {
    __shared__ uint4 slots[P][kThreads];
    slot = static_cast<unsigned>(__cvta_generic_to_shared(&slots[0][threadIdx.x]));
  }
  __device__ void set(int p, const uint4& raw) const {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(slot + p * kThreads * 16), "r"(raw.x), "r"(raw.y),
                 "r"(raw.z), "r"(raw.w)
                 : "memory");
  }
  __device__ void get(int p, float (&to)[8]) const {  // volatile: else it becomes registers again
    Pack<T> pack;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.raw.x), "=r"(pack.raw.y), "=r"(pack.raw.z), "=r"(pack.raw.w)
                 : "r"(slot + p * kThreads * 16));
    unpack(pack, to);
  }
};

__device__ inline float sum_warps(const float (&v)[kWarps]) {
  const float4 a = reinterpret_cast<const float4*>(v)[0], b = reinterpret_cast<const float4*>(v)[1];
  return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}

// P packs of a row a thread; as many rows at once as 4 packs make.
template <typename T, int P, bool kNorm, Ending kEnding, typename Out>
__global__ void __launch_bounds__(kThreads, 2) matvec_rows(const __grid_constant__ Call a) {
  constexpr int R = P < 4 ? 4 / P : 1, S = P > 4 ? kLoads / 8 : (kLoads - (P == 4 && kNorm ? 4 : 0)) / (R * P);
  constexpr int kPair = kEnding == Ending::swiglu ? 2 : 1;
  static_assert(kChunk % (R * S) == 0 && kChunk % kPair == 0, "a chunk is whole rounds of the ring");
  __shared__ __align__(16) float sums[kChunk][kWarps];
  __shared__ __align__(16) float squares[kWarps];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  // Outputs first to first + count of this block, of kPair rows each: gate, up, gate, up.
  const int blocks = gridDim.x, block = blockIdx.x;
  const int each = a.outputs / blocks, more = a.outputs % blocks;
  const int first = block * each + min(block, more), rows = (each + (block < more)) * kPair;
  const char* weight = static_cast<const char*>(a.weight) + static_cast<int64_t>(first) * a.pitch;
  auto row = [&](int l) {
    const char* from = weight + static_cast<int64_t>(l / kPair) * a.pitch;
    return l % kPair == 0 ? from : from + a.apart;
  };
  bool has[P];
#pragma unroll
  for (int p = 0; p < P; ++p) has[p] = p * kThreads + thread < a.packs;
  constexpr int kStep = kThreads * 16;  // bytes
  const int own = thread * 16;
  uint4 ring[S][R][P] = {};
  auto request = [&](int l, int p, uint4& to) { stream16(to, has[p] && l < rows, row(l) + own + p * kStep); };
#pragma unroll
  for (int s = 0; s < S; ++s)
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int p = 0; p < P; ++p) request(s * R + r, p, ring[s][r][p]);
  uint4 norm[P] = {};
  if constexpr (kNorm) {  // as if it could change: ptxas moves other loads to behind the wait
#pragma unroll
    for (int p = 0; p < P; ++p) fresh16(norm[p], has[p], static_cast<const char*>(a.norm) + own + p * kStep);
  }

  let_next_start();
  wait_for_earlier();
  Mine<T, P, kNorm || P <= 2> x;
  {
    uint4 raw[P] = {};
#pragma unroll
    for (int p = 0; p < P; ++p) fresh16(raw[p], has[p], static_cast<const char*>(a.x) + own + p * kStep);
    float square = 0.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      x.set(p, raw[p]);
      if constexpr (kNorm) {
        float g[8];
        unpack(Pack<T>{norm[p]}, g);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          square = fmaf(x.values[p][i], x.values[p][i], square);
          x.values[p][i] *= g[i];
        }
      }
    }
    if constexpr (kNorm) {
      float all[1] = {square};
      sum_scattered<32>(all);
      if (lane == 0) squares[warp] = all[0];
    }
  }

  Out* out = static_cast<Out*>(a.out) + first;
  for (int begin = 0; begin < rows; begin += kChunk) {
    const int end = min(begin + kChunk, rows), ends = (end - begin) / kPair;
    float before = 0.0f;
    if constexpr (kEnding == Ending::add) {
      if (thread < ends) before = fresh_half(out + begin + thread);
    }
    for (int round = begin; round < end; round += R * S) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int l = round + s * R;
        if (l >= end) break;
        float v[R] = {};
#pragma unroll
        for (int p = 0; p < P; ++p) {
          float of_x[8];
          x.get(p, of_x);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            float w[8];
            unpack(Pack<T>{ring[s][r][p]}, w);
#pragma unroll
            for (int i = 0; i < 8; ++i) v[r] = fmaf(w[i], of_x[i], v[r]);
            request(l + S * R + r, p, ring[s][r][p]);
          }
        }
        sum_scattered<32>(v);
        if (lane % (32 / R) == 0) sums[l - begin + lane / (32 / R)][warp] = v[0];
      }
    }
    __syncthreads();
    [[maybe_unused]] uint64_t key = 0;
    if (thread < ends) {
      float y = sum_warps(sums[kPair * thread]);
      float scale = 1.0f;
      if constexpr (kNorm) scale = rsqrtf(sum_warps(squares) * a.inverse + a.eps);
      y *= scale;
      if constexpr (kEnding == Ending::swiglu) {
        const float up = sum_warps(sums[2 * thread + 1]) * scale;
        y = y / (1.0f + __expf(-y)) * up;
      }
      Out* to = out + begin / kPair + thread;
      if constexpr (sizeof(Out) == 4) {
        *to = y;
        if (a.standing != nullptr) {
          key = rank_key(y, first + begin / kPair + thread);
          if (a.count) atomicAdd(&a.standing->counts[count_bin(ordered(y))], 1);
        }
      } else {
        store_half(to, y + before);
      }
    }
    if constexpr (sizeof(Out) == 4) {
      if (a.standing != nullptr && warp * 32 < ends) {
        key = largest(key);
        if (lane == 0)
          atomicMax(reinterpret_cast<unsigned long long*>(&a.standing->best), static_cast<unsigned long long>(key));
      }
    }
    if (end < rows) __syncthreads();
  }
}

template <typename T, bool kNorm, Ending kEnding, typename Out>
const void* kernel_for(int packs) {
  auto of = [](auto p) { return reinterpret_cast<const void*>(matvec_rows<T, decltype(p)::value, kNorm, kEnding, Out>); };
  if (packs <= kThreads) return of(Number<1>());
  if (packs <= 2 * kThreads) return of(Number<2>());
  if (packs <= 4 * kThreads) return of(Number<4>());
  if constexpr (!kNorm) {
    if (packs <= 7 * kThreads) return of(Number<7>());  // the 14,336 of an 8B model exactly
    if (packs <= 8 * kThreads) return of(Number<8>());
  }
  return nullptr;
}

template <typename T, bool kNorm, Ending kEnding, typename Out>
const char* launch(const MatVec& a, void* stream) {
  const int packs = static_cast<int>(a.columns / 8);
  const void* kernel = kernel_for<T, kNorm, kEnding, Out>(packs);
  if (kernel == nullptr) return "a row is too long";
  const int64_t most = int64_t{this_card().multiprocessors} * a.blocks;
  const int64_t blocks = a.outputs < most ? a.outputs : most;
  Call call{a.x, a.norm, a.weight, a.out, a.outputs * a.columns * 2, static_cast<int>(a.outputs), packs, packs * 16,
            a.eps, 1.0f / static_cast<float>(a.columns), a.standing, a.count};
  void* arguments[] = {&call};
  return launch_overlapping(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, a.overlap, arguments, stream);
}

template <typename T>
const char* launch(const MatVec& a, void* stream) {
  if (a.norm == nullptr)
    return a.add && !a.swiglu && !a.wide ? launch<T, false, Ending::add, T>(a, stream) : "without a norm it adds";
  if (a.add || (a.swiglu && a.wide)) return "with a norm it does not add, and SwiGLU is not fp32";
  if (a.swiglu) return launch<T, true, Ending::swiglu, T>(a, stream);
  return a.wide ? launch<T, true, Ending::store, float>(a, stream) : launch<T, true, Ending::store, T>(a, stream);
}

}  // namespace

const char* matvec_cuda(const MatVec& a, void* stream) {
  return a.bf16 ? launch<__nv_bfloat16>(a, stream) : launch<__half>(a, stream);
}

}  // namespace tinylm
