// What the kernels of a token share: launches that overlap, and loads that know whether what they read may still change.
#pragma once

#include "matvec.h"
#include "rows.cuh"

namespace tinylm {

// Until all that earlier kernels of the stream wrote can be read. One block at least of every kernel must: the next kernel
// takes the end of this one for the end of all before it.
__device__ inline void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel starts once every block has said so.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What is read once and never changes, such as a matrix: past L1. Where it is not wanted `to` keeps what it has.
__device__ inline void stream16(uint4& to, bool wanted, const void* from) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %4, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%5]; }"
               : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
               : "r"(static_cast<unsigned>(wanted)), "l"(from));
}

// What another kernel, or another block, has written: from L2, since L1 may hold what was there before. (Not __ldcg,
// which the compiler may move to before a wait.)
__device__ inline void fresh16(uint4& to, bool wanted, const void* from) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %4, 0; @p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%5]; }"
               : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
               : "r"(static_cast<unsigned>(wanted)), "l"(from)
               : "memory");
}
__device__ inline float fresh(const float* from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}
__device__ inline int fresh(const int* from) {
  int value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ inline uint64_t fresh(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
__device__ inline int64_t fresh(const int64_t* from) {
  return static_cast<int64_t>(fresh(reinterpret_cast<const uint64_t*>(from)));
}
// Counts a block in, of those that share work; returns how many came before. Of one thread behind a barrier of its block:
// what the block wrote is seen by whoever counts in after it, behind a barrier of its own.
__device__ inline int arrive(int32_t* count) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
}
template <typename T>
__device__ inline float fresh_half(const T* from) {
  unsigned short bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(from) : "memory");
  return widen2(bits, T()).x;
}

template <typename T>
__device__ inline void store_half(T* to, float value) {
  *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(narrow2(make_float2(value, 0.0f), T()));
}

__device__ inline int count_bin(unsigned ordered) { return static_cast<int>(ordered >> (32 - kCountBits)); }

// Over L lanes, of V numbers of each: a lane gets the sums of max(1, V / L) of them, from the returned index on.
template <int L, int V>
__device__ int sum_scattered(float (&v)[V]) {
  const int lane = threadIdx.x % 32;
  int index = 0;
#pragma unroll
  for (int offset = L / 2, half = V / 2; offset > 0; offset /= 2, half /= 2) {
    if (half > 0) {
      const bool upper = lane & offset;
#pragma unroll
      for (int i = 0; i < V / 2; ++i) {
        if (i >= half) continue;
        const float give = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
        v[i] = keep + __shfl_xor_sync(~0u, give, offset);
      }
      index += upper ? half : 0;
    } else {
      v[0] += __shfl_xor_sync(~0u, v[0], offset);
    }
  }
  return index;
}

// On the host: a launch that may overlap the end of the kernel before.
inline const char* launch_overlapping(const void* kernel, dim3 blocks, int threads, bool overlap, void** arguments, void* stream) {
  // A multiprocessor has one division into L1 and shared memory at a time, and a kernel that wants another one waits there
  // until the kernel before it has left. So all want the same: nothing here needs L1.
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  cudaLaunchConfig_t launch = {};
  cudaLaunchAttribute attribute = {};
  launch.gridDim = blocks;
  launch.blockDim = dim3(threads);
  launch.stream = static_cast<cudaStream_t>(stream);
  if (overlap && this_card().clusters) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    launch.attrs = &attribute, launch.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelExC(&launch, kernel, arguments);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is told here, and not again
  return cudaGetErrorString(error);
}

}  // namespace tinylm
