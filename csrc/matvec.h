// What one token through a large model takes: plain pointers and sizes; no torch. The binding checks everything before.
// Vectors are a token's, matrices [rows, columns] and contiguous; all in bf16 or fp16 but where it says so, and aligned to
// 16 bytes.
//
// A kernel that `overlap`s starts while those before it in the stream still end, as far as weights, earlier tokens and the
// position go, which it may then fetch: no kernel back to the last one that did not overlap may write them. So a token's
// first kernel does not: the one before it has moved the position. Where the card cannot, all start when others have ended.
#pragma once

#include <cstdint>

namespace tinylm {

// What is known of a token's logits once they are all there; zeros before, as they are again when it is chosen.
constexpr int kCountBits = 12, kCounts = 1 << kCountBits;
struct Standing {
  uint64_t best;   // rank_key (choice.cuh) of the largest
  uint64_t drawn;  // draw_key of what is drawn so far
  int32_t undecided, arrived;
  alignas(16) int32_t counts[kCounts];  // by the first bits of their order
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
  int32_t blocks;      // of a multiprocessor
  Standing* standing;  // of an out in fp32: where its best goes; null: nowhere
  bool count;          // and its counts
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

// ids[*position + 1] = the likeliest, or with `by` a draw among the top_k likeliest; then *position += 1, and
// x = table[ids[*position]]
struct Choice {
  const float* logits;  // [vocab]
  Standing* standing;   // with its best, and with top_k its counts
  uint64_t* undecided;  // [vocab]
  int64_t *ids, *position;
  const void* table;
  void* x;
  int64_t room;     // of ids: past it none is written
  int64_t columns;  // a multiple of 8
  uint64_t noise_start, noise_stride;  // see choice.cuh
  float by;         // 1 / temperature; 0: the likeliest
  int32_t vocab, top_k;  // top_k 0: among all
  bool overlap;
};
// Words of 8 bytes: a Standing, and the undecided behind it.
constexpr int64_t choice_words(int64_t vocab) { return static_cast<int64_t>(sizeof(Standing)) / 8 + vocab; }

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
const char* choice_cuda(const Choice&, void* stream);
const char* embedding_cuda(const Embedding&, void* stream);
inline int64_t one_query_partials(int64_t heads, int64_t head_dim, int64_t splits) { return heads * splits * (head_dim + 2); }

}  // namespace tinylm
