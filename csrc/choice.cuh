// What every kernel that chooses a token does: logits in their order, and the noise of a draw.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tinylm {

// Orders (value, index) as an integer: the larger value, then the smaller index. No key is 0.
__device__ inline unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of_ordered(unsigned bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
__device__ inline uint64_t rank_key(float value, int index) {
  return uint64_t{ordered(value)} << 32 | ~static_cast<unsigned>(index);
}
__device__ inline int index_of(uint64_t key) { return static_cast<int>(~static_cast<unsigned>(key)); }
__device__ inline float value_of(uint64_t key) { return value_of_ordered(static_cast<unsigned>(key >> 32)); }
__device__ inline unsigned largest(unsigned key) {  // of a warp
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, key);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) key = max(key, __shfl_xor_sync(~0u, key, offset));
  return key;
#endif
}
__device__ inline uint64_t largest(uint64_t key) {
#if __CUDA_ARCH__ >= 800
  const unsigned high = static_cast<unsigned>(key >> 32), most = largest(high);
  return uint64_t{most} << 32 | largest(high == most ? static_cast<unsigned>(key) : 0);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(~0u, key, offset);
    key = other > key ? other : key;
  }
  return key;
#endif
}

// What the lower lanes of a warp have, added up.
__device__ inline int lower_lanes(int own) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int sum = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += other;
  }
  return sum - own;
}

// Sampling, as tinylm.generate.sampling has it: argmax(p / noise) among the top k, noise of Exponential(1) that is a pure
// function of the row's seed, the position and the token (SplitMix64). This is its logarithm.
__device__ inline float log_noise(uint64_t state) {
  uint64_t x = (state ^ state >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  x = (x ^ x >> 31) & 0x7fffffffffffffffull;
  const float uniform = fminf(fmaxf(__ll2float_rn(static_cast<long long>(x)) * 0x1p-63f, 0x1p-63f), 1.0f - 0x1p-24f);
  return logf(-log1pf(-uniform));
}
constexpr uint64_t kNoiseStep = 0x9E3779B97F4A7C15ull;  // from a token to the next

// The key of a token of this logit, of which the largest is drawn; high: the largest logit, by: 1 / temperature.
__device__ inline uint64_t draw_key(float logit, float high, float by, uint64_t state, int token) {
  return rank_key((logit - high) * by - log_noise(state + static_cast<uint64_t>(token) * kNoiseStep), token);
}

}  // namespace tinylm
