// What the decode kernel takes, and how its work is shared out: plain numbers and pointers; no torch, no CUDA.
#pragma once

#include <cstdint>

namespace tinylm::decode {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMostLayers = 64;
constexpr int kMostWidth = 1024;   // a thread owns two numbers of the residual stream
constexpr int kPassColumns = 256;  // that a warp reads of a row at once: 16 bytes a lane
constexpr int kMostPasses = 4;
constexpr int kMostGroup = kWarps;  // query heads of one key head: a warp has one at least
constexpr int kMostStops = 32;
constexpr int kBins = 256;     // of the sampler's histogram
constexpr int kListed = 64;    // of a warp's logits, that may be among the largest
constexpr int kListable = kWarps * kListed;
constexpr int kSampler = 4 * (2 * kBins + 3 * kListable);  // bytes of shared memory
constexpr int kKept = 4;  // pairs of logits a thread that wait there too, if there is room
constexpr int kOwnShared = 4096;  // bytes of shared memory that the kernel takes beside what a plan gives it

// Parts of the work that a launch may leave out, to see what they take. What comes out means nothing then.
enum Leave { kLeaveAttention = 1, kLeaveMlp = 2, kLeaveHead = 4 };

struct Shape {
  int dim, layers, heads, kv_heads, head_dim, d_ff, vocab;  // vocab: ids that may be chosen
};

// A layer's four products and the head.
enum Product { kQkv, kOut, kGateUp, kDown, kHead, kProducts };
template <int P>
constexpr bool kNormed = P != kOut && P != kDown;  // behind a norm
template <int P>
constexpr int kRows = kNormed<P> ? 2 : 1;  // of a unit

// How the rows of one matrix are shared out. A unit is what one warp computes at a time: one row, or two that belong
// together: unit u has rows u + u / run * skip and that + apart. Block b of B has units b * units / B up to
// (b + 1) * units / B; where rows are long, `parts` warps share one, `columns` each, and whoever reads the results adds them.
struct Matrix {
  int units, rows;  // in all; of a unit
  int run, skip, apart;
  uint32_t inverse;  // of run, times 2^32, rounded up: u / run without a division, for u * run < 2^32; 0: run is 1
  int width, parts, columns, passes;  // numbers of a row; warps; numbers of a warp, in passes of kPassColumns
  int stride, each;  // units that a block computes at once; units of a warp, at most
  int slot;  // where its rows wait in shared memory, in bytes; -1: they do not fit and are read when needed

  int bytes(int blocks) const;  // of shared memory that all its rows of a block take
};

struct Plan {
  int blocks, cluster;  // blocks that reach one another's shared memory
  Matrix products[kProducts];
  int act, squares;  // floats of what a phase behind a norm reads; behind them, of the sum of squares; then what others read
  int tile;      // positions in each half of the ring of keys and values
  int ring;      // bytes: where its keys start, values after them
  int scratch, sums, places;  // bytes: of attention; of its warps' sums, and then of the sampler; of where results go
  int kept;      // pairs of logits a thread: kKept or 0
  int shared;    // bytes in all
  int group;     // query heads of a key head
  int most_splits;  // of a key head's positions, a multiple of `cluster`
  // Of attention: a position's chunks of 8 numbers, their logarithm (-1: it is none), what bits of its place turn them; of a
  // warp's work, sixty-fours of numbers and eights of heads, which are other warps'; warps that share positions; numbers that
  // one of them has of a head.
  int chunks, chunks_log2, turn, halves, eights, parts, pitch;
  // The exchange, in words of 8 bytes: of a layer, then of what comes after the last one, and all of one copy.
  int at[kHead], at_parts, at_attention, layer;  // `at`: of a product's results
  int at_logits, at_best, at_id, words;
};

// For so many blocks, a multiple of `cluster`, and bytes of shared memory a block. Null, or why there is none.
const char* make_plan(const Shape&, bool sampled, int blocks, int cluster, int shared, Plan*);

// Positions 0 to `end` in runs of `span`, one for each block of a key head: one, or as many as there are blocks in some
// clusters, of which each has one result. Fixed within a launch.
struct Splits {
  int count, span, results, runs;  // runs of a result
};
// `target` positions to a run. Up to `few` results, of up to twice as many positions to a run if the ring has them, whoever
// reads attention's results adds up; if it takes more, the blocks of each key head do, a phase of its own.
Splits make_splits(const Plan&, int end, int few, int target);

struct Layer {
  const void *attention_norm, *mlp_norm;
  const void* products[kHead];
};

// Weights, keys and values in one dtype, bf16 or fp16. Everything contiguous.
struct Decode {
  Shape shape;
  const void *embed, *head, *norm;
  Layer layers[kMostLayers];
  const float* rope;  // [2, context, head_dim]: (cos, cos), (-sin, sin); null: no rotation
  void *keys, *values;  // [layers, 1, kv_heads, context, head_dim]
  int64_t context, rope_context;  // of the cache, of the table
  int64_t embed_rows;
  int64_t* ids;         // of the row; ids[position] is the newest token
  int64_t* position;    // set at the end
  const int64_t* stops;
  uint64_t* exchange;  // [copies, plan.words]
  int32_t* status;     // [2]: what went wrong, where (layer, phase)
  int64_t exchange_words;
  int64_t first_position;
  uint64_t noise_start, noise_stride;  // of SplitMix64
  float eps, inverse_dim, temperature;
  uint32_t epoch;  // tag of the first token; those of the others follow
  int tokens, stop_count, top_k, copies, leave;
  int few_splits, target;  // see make_splits
  int cluster;  // blocks, at most
  bool bf16;
};

// On the current device, on the stream (a cudaStream_t); null, or why it cannot run. No tokens: checks alone.
const char* decode_cuda(const Decode&, void* stream);

}  // namespace tinylm::decode
