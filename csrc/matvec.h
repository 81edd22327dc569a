// What one token through a large model takes besides its choice: plain pointers and sizes; no torch. The binding checks
// everything before. Vectors are a token's, matrices [rows, columns] and contiguous; all in bf16 or fp16 but where it says
// so, and aligned to 16 bytes.
//
// A kernel that `overlap`s starts while the one before it in the stream still ends, as far as weights and earlier tokens
// go, which it may then fetch: the kernel before must write neither. Where the card cannot, it starts when that has ended.
#pragma once

#include <cstdint>

namespace tinylm {

// How a matrix's rows are read; 0: what suits an H200.
struct Reading {
  int32_t blocks;  // of a multiprocessor
  int32_t ahead;   // rows of each block that L2 fetches while the kernel before still ends; -1: none
};

// y = weight @ x, with norm: weight @ (x * norm / sqrt(mean(x^2) + eps)); then
//   swiglu: out[i] = silu(y[i]) * y[outputs + i], of a matrix of 2 * outputs rows;  add: out += y;  else: out = y
struct MatVec {
  const void* x;       // [columns]
  const void* norm;    // [columns]; null: none
  const void* weight;
  void* out;           // [outputs]
  int64_t outputs, columns;  // columns: a multiple of 8, at most kMostColumns, with a norm kMostNormed
  float eps;
  bool bf16, swiglu, add, wide;  // wide: out is fp32
  bool overlap;
  Reading reading;
};
constexpr int64_t kMostColumns = 16384, kMostNormed = 8192;

// One query a head over positions 0..*position of a row's cache, where the new key and value go first:
//   qkv = [heads + 2 kv_heads, head_dim], queries, keys and values of the token;  both rotated but the values:
//   pair (i, i + head_dim / 2) of h: h * rope[0][position] + (other half of h) * rope[1][position]
struct OneQuery {
  const void* qkv;
  const void* rope;         // [2, positions, head_dim]
  const int64_t* position;
  void *keys, *values;      // [kv_heads, capacity, head_dim]
  void* out;                // [heads, head_dim]
  float* partials;          // one_query_partials(...) numbers
  int32_t* arrived;         // [heads]: zeros, as they are again afterwards
  int64_t rope_positions, capacity;
  int32_t heads, kv_heads, head_dim;  // head_dim: a multiple of 8, at most kMostHeadDim
  int32_t splits;           // most runs of positions of a head
  bool bf16, overlap;
};
constexpr int kMostHeadDim = 256, kMostSplits = 128;

// x = table[ids[*position]]
struct Embedding {
  const int64_t *ids, *position;
  const void* table;
  void* x;
  int64_t columns;  // a multiple of 8
};

// On the current device, on the stream (a cudaStream_t); null, or CUDA's message. Never synchronize.
const char* matvec_cuda(const MatVec&, void* stream);
const char* one_query_cuda(const OneQuery&, void* stream);
const char* embedding_cuda(const Embedding&, void* stream);
inline int64_t one_query_partials(int64_t heads, int64_t head_dim, int64_t splits) { return heads * splits * (head_dim + 2); }

}  // namespace tinylm
