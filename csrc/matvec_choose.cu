// A token's end and the next one's beginning: of the logits the choice, and of the chosen one its row of the embedding.
//
// The head's product has found the likeliest meanwhile, and counted all logits by the first kCountBits bits of their order.
// So for the top k each block knows at once which bin the k-th is in: what lies above is surely drawn from, what lies
// below is not, and only of those within is the rank to be found, by the last block that arrives: from 10 further bits,
// then the last 10. That is exact for any k and any logits, and fast where few share a bin: 250 or so of a bell of
// 128,256 at k = 200. Nothing depends on the order in which blocks come.
#include "choice.cuh"
#include "matvec.cuh"

namespace tinylm {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kFineBits = (32 - kCountBits) / 2;
static_assert(kCountBits + 2 * kFineBits == 32);

struct Found {
  int bin, rank;  // which bin, and which of its own
};

// The bin that the rank-th largest is in, counted from 1, of bins that hold as many; needs a barrier before and has one
// behind.
template <int kBins>
__device__ Found find(const int* bins, int rank, int (&totals)[kWarps], Found& found) {
  constexpr int kEach = kBins / kThreads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, base = kBins - (thread + 1) * kEach;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) own += bins[base + i];
  int above = lower_lanes(own);
  if (lane == 31) totals[warp] = above + own;
  __syncthreads();
  for (int w = 0; w < warp; ++w) above += totals[w];
  if (above < rank && rank <= above + own) {
    int bin = base + kEach - 1;
    for (; above + bins[bin] < rank; --bin) above += bins[bin];
    found = {bin, rank - above};
  }
  __syncthreads();
  return found;
}

__device__ void embed(const void* table, int64_t id, void* x, int64_t columns) {
  const int64_t packs = columns / 8;
  const uint4* from = static_cast<const uint4*>(table) + id * packs;
#pragma unroll 1
  for (int64_t c = threadIdx.x; c < packs; c += kThreads) static_cast<uint4*>(x)[c] = __ldg(from + c);
}

template <bool kDraw>
__global__ void __launch_bounds__(kThreads, 1) choose_token(const __grid_constant__ Choice a) {
  __shared__ __align__(16) int bins[kDraw ? kCounts : 1];
  __shared__ int totals[kWarps];
  __shared__ uint64_t keys[kWarps];
  __shared__ Found found;
  __shared__ bool last;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  Standing& standing = *a.standing;
  auto block_largest = [&](uint64_t key) {  // of warp 0 alone; a barrier within
    key = largest(key);
    if (lane == 0) keys[warp] = key;
    __syncthreads();
    return largest(keys[lane % kWarps]);
  };

  wait_for_earlier();
  uint64_t best = fresh(&standing.best);
  const int64_t place = fresh(a.position) + 1;
  if constexpr (kDraw) {
    const float high = value_of(best);
    const uint64_t state = a.noise_start + static_cast<uint64_t>(place) * a.noise_stride;
    Found cut = {-1, 0};  // all are above
    if (a.top_k > 0) {
      constexpr int kEach = kCounts / kThreads / 4;
      uint4 counts[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) fresh16(counts[i], true, standing.counts + (i * kThreads + thread) * 4);
#pragma unroll
      for (int i = 0; i < kEach; ++i) reinterpret_cast<uint4*>(bins)[i * kThreads + thread] = counts[i];
      __syncthreads();
      cut = find<kCounts>(bins, a.top_k, totals, found);
    }
    uint64_t drawn = 0;
    for (int i = blockIdx.x * kThreads + thread; i < a.vocab; i += gridDim.x * kThreads) {
      const float logit = fresh(a.logits + i);
      const int bin = count_bin(ordered(logit));
      if (bin > cut.bin) {
        const uint64_t key = draw_key(logit, high, a.by, state, i);
        drawn = key > drawn ? key : drawn;
      } else if (bin == cut.bin) {
        a.undecided[atomicAdd(&standing.undecided, 1)] = rank_key(logit, i);
      }
    }
    drawn = block_largest(drawn);
    if (thread == 0 && drawn != 0)
      atomicMax(reinterpret_cast<unsigned long long*>(&standing.drawn), static_cast<unsigned long long>(drawn));
    __syncthreads();
    if (thread == 0) last = arrive(&standing.arrived) == static_cast<int>(gridDim.x) - 1;
    __syncthreads();
    if (!last) return;
    best = 0;
    if (a.top_k > 0) {
      const int count = fresh(&standing.undecided);
      unsigned least = static_cast<unsigned>(cut.bin) << (32 - kCountBits);
      if (cut.rank < count) {
        constexpr int kFine = 1 << kFineBits;
        int rank = cut.rank;
#pragma unroll
        for (int shift = kFineBits; shift >= 0; shift -= kFineBits) {
          for (int i = thread; i < kFine; i += kThreads) bins[i] = 0;
          __syncthreads();
          for (int i = thread; i < count; i += kThreads) {
            const unsigned bits = static_cast<unsigned>(fresh(a.undecided + i) >> 32);
            if ((bits ^ least) >> (shift + kFineBits) == 0) atomicAdd(&bins[bits >> shift & (kFine - 1)], 1);
          }
          __syncthreads();
          const Found finer = find<kFine>(bins, rank, totals, found);
          least |= static_cast<unsigned>(finer.bin) << shift, rank = finer.rank;
        }
      }
      for (int i = thread; i < count; i += kThreads) {
        const uint64_t each = fresh(a.undecided + i);
        if (static_cast<unsigned>(each >> 32) < least) continue;  // as likely as the k-th is among them
        const uint64_t key = draw_key(value_of(each), high, a.by, state, index_of(each));
        best = key > best ? key : best;
      }
      best = block_largest(best);
      __syncthreads();  // keys are read above, and written below
      for (int i = thread; i < kCounts; i += kThreads) standing.counts[i] = 0;
    }
    if (thread == 0) {
      drawn = fresh(&standing.drawn);
      keys[0] = drawn > best ? drawn : best;
      standing.drawn = 0, standing.undecided = 0, standing.arrived = 0;
    }
    __syncthreads();
    best = keys[0];
  }
  const int64_t chosen = min(max(index_of(best), 0), a.vocab - 1);  // whatever came of it, a token
  embed(a.table, chosen, a.x, a.columns);
  __syncthreads();  // all have read what the next token starts with
  if (thread == 0) {
    if (place >= 0 && place < a.room) a.ids[place] = chosen;
    *a.position = place;
    standing.best = 0;
  }
}

__global__ void __launch_bounds__(kThreads) embed_token(const __grid_constant__ Embedding a) {
  embed(a.table, fresh(a.ids + fresh(a.position)), a.x, a.columns);
}

}  // namespace

const char* choice_cuda(const Choice& a, void* stream) {
  Choice call = a;
  void* arguments[] = {&call};
  if (a.by == 0.0f)
    return launch_overlapping(reinterpret_cast<const void*>(choose_token<false>), dim3(1), kThreads, a.overlap, arguments, stream);
  const int most = this_card().multiprocessors, blocks = (a.vocab + kThreads - 1) / kThreads;
  return launch_overlapping(reinterpret_cast<const void*>(choose_token<true>), dim3(blocks < most ? blocks : most), kThreads, a.overlap,
               arguments, stream);
}

const char* embedding_cuda(const Embedding& a, void* stream) {
  Embedding call = a;
  void* arguments[] = {&call};
  return launch_overlapping(reinterpret_cast<const void*>(embed_token), dim3(1), kThreads, false, arguments, stream);
}

}  // namespace tinylm
