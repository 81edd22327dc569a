// Decode at batch 1: one kernel for many tokens, from the embedding to the choice.
//
// A step of a small model is some 30 products that depend on one another, each of a few KB a multiprocessor: what it takes is
// the time from one to the next, not their work. So one block stays on each multiprocessor, and
//  - there is no barrier among blocks: every value that passes from one to another carries its own flag (decode.cuh), and who
//    needs it polls for it, one trip through L2 where a barrier takes three;
//  - weights depend on nothing: each lane keeps what it will need of the next layer's matrices on its way to its own place in
//    shared memory (`prefetch`), so that they are there when the activations are; what does not fit is read from L2;
//  - every block keeps the whole residual stream, in fp32, two numbers a thread: norms need no exchange of their own;
//  - keys and values of earlier positions wait in shared memory too (decode_attention.cuh).
// So a phase is: poll, one barrier of the block, products, a warp's sum, a store. A trip through L2 takes .7 us, a dependent
// instruction 2.5 ns, a read of shared memory or a shuffle 15: so what does not depend on the input stands before the barrier,
// where it costs nothing, and behind it are some 150 instructions. The first warps fetch the input, the last ones multiply.
// Each product has a code of its own, because what a warp does between its store and the next barrier must take less than a
// trip.
//
// All blocks must be resident at once, which a cooperative launch guarantees. No wait is without end: see Watch.
//
// Reference: tinylm.generate.loop.Loop.step. Versions, time a token in bf16, tiny at contexts 128 / 1,024 / 4,096 and small
// at 128, from a script on H200s (not the suite), against what was expected:
//   all in the order of the phases: 75.5 / 84 / 109 and 213 us, not 40 / 50 / 60 and 150 (some 32 phases of 1.2 us). A timeline
//     from clock64 in the kernel: the next input is there already when a warp is done with product (.8), prefetch (.5) and
//     poll (.6)
//   one cluster of 16 blocks, exchange in distributed shared memory, weights streamed through a ring by bulk copies, tensor
//     cores: 168 / 191 / 279 and 776, not 30 to 40: a chunk of 24 KB takes .7 to .85 us, which L2 delivers in .34 (1.16 TB/s to
//     16 blocks of one cluster, 2.4 to 16 of none), attention 5 to 6; dropped
//   everything that can be before the barrier: 62 / 71 / 94 and 178, not 50 / 55 / 62 and 160. Nsight Compute: 10,700
//     instructions of a warp for a token, 7.7 cycles each; few waits for instructions (4%). A timeline: those who multiply come
//     last to the barrier, 1.1 us after their stores
//   a code for each product, so that which one it is and its sizes are no questions (8,650 instructions): 54 / 65 / 97 and 184,
//     not 53; and now those who fetch come last
//   polls begun after the prefetch, not before: 51 / 65 / 95 and 183
//   polls when nothing else is left to do: 47 / 59 / 90 and 162, not 51; with longer runs of positions that readers add up (288,
//     up to 12 of them) 4,096 in 86. Trips in vain come back a whole trip later, and are in the way of others:
//   two trips under way at once: 55 / 65 / 100 and 190, three: 58 / 70 / 104 and 192, not 45; dropped
//   a warp that remembers when its input came, and asks no sooner: 53 to 79, not 47: who is late makes all late; dropped
//   parts of attention as records with their weight, 16 bytes instead of 32: 48 / 57 / 81 and 159
//   those of a cluster's blocks added up in the shared memory of its first one: 4,096 in 78 and 8,192 in 91 instead of 98, not
//     65 and 82. Of four blocks, of which 120 find room; of two, 132, for the longest texts; for short ones it is slower
//   keys and values by bulk copies: 49 / 59 / 80, not 70 at 4,096; in two turns, a phase apart, the same; dropped
//   attention by tensor cores: 51 / 57 / 80, not 43 / 47 / 66. Nsight Compute, of 3,050 cycles from the queries to the result:
//     850 for scores and sums of 16 positions, 2,100 on both sides of its second barrier, for divisions by sizes that the launch
//     knows, places that are computed anew, and branches. With those in shared memory, and keys read before the queries are
//     there: 47.7 / 54 / 74 and 156
//   with results' places in a table, and one address of shared memory that the compiler does not ask the card for again: 47.5 /
//     55 / 74 and 154; attention is .2 us shorter, not .5. Among the k largest of 50,257 logits 27 us, not 56, by a list
//   warps that wait for nothing go through the instructions behind the barrier once before: of attention, 55 / 60 / 81 and
//     166; of products, 49.5 / 57 / 73 and 154; dropped
//   keys and values are the first to leave L2: what one token reads, 69 MB at 4,096, is more than its 50 MB, so each line was
//     gone when the next token came to it, words of the exchange among them. 47.0 / 52 / 62, not 47.5 / 55 / 66, and 8,192 in
//     76 instead of 90; half of them so: 72 and 91. Weights the last to leave beside it: no difference; the exchange the last
//     to leave, and nothing else: 73 and 86
//   one barrier for all warps of a block, also for those that have nothing to multiply, which had one of their own, as
//     compute-sanitizer's synccheck calls two divergent. Weights defined, for the compiler, by zeros before the wait: 48.3 /
//     53 / 64, small at 1,024 6 us more; in the branch of the idle warps alone: 45.1 / 50 / 62
// Top-k 200 came on top of that with 7.0 / 6.7 / 10.5 us, and 25 for small's 32,000 logits, at 1,024. Block 0 draws; by its
// timeline:
//   its ring as long as 4,096 tokens' runs are, as the sampler lies where attention's sums were; a bound from the threads' own
//     largest, by bins; a list of what reaches it, binned too: 5.1 / 5.1 / 6.4 and 21, not 2.1 at 128. Of 4.7 us behind the
//     logits 2.0 are the list's: 16 branches around stores, whose instructions come from L2 once a token
//   the list by predicated stores, the bound by lanes' ranks: 3.0 / 2.7 / 4.4 and 21
//   no word of each block's best where its logits say as much, bins filled while listing: 3.4 / 3.6 / 4.1; the list takes .5 us
//     longer so
//   lists of each warp: 3.2 / 3.1 / 4.1 and 18; this, with bins as chains, so that there are three barriers, logits in shared memory
//     and loops that are not unrolled: 3.3 / 3.3 / 3.5 and 14, not 2.6
//   the last loop gone through once before the logits are there: 49.0 / 53.0 / 65.5 in all instead of 48.9 / 53.6 / 65.7, not
//     48.5 / 53.2 / 65.2; dropped
#include "decode_attention.cuh"
#include "decode_choose.cuh"

namespace tinylm::decode {

constexpr int kAlone = 8;  // runs of positions whose results are added up faster without clusters

template <typename T>
struct Step {
  Here& here;
  const Decode& a;
  const Plan& plan;
  const Attention<T> attention;
  float2 x = {};  // of the residual stream: numbers 2 * thread and the next
  unsigned weight = 0;  // of the next norm, beside x
  const bool owns;

  __device__ Step(Here& here, const Splits& splits)
      : here(here), a(here.a), plan(here.plan), attention(here, splits), owns(2 * here.thread < a.shape.dim) {}

  template <int P>
  __device__ const void* weights(int layer) const {
    if constexpr (P == kHead) return a.head;
    else return a.layers[layer].products[P];
  }
  template <int P>
  __device__ void ask(int layer) const {
    prefetch<T, P>(plan.products[P], here.fixed.mine[P][here.warp], weights<P>(layer), a.shape.vocab, here);
  }
  // In the order in which they are used.
  __device__ void ask_all(int position) const {
    ask<kQkv>(0);
    ask<kOut>(0);
    attention.prefetch(0, position);
    ask<kGateUp>(0);
    ask<kDown>(0);
    ask<kHead>(0);
  }

  // This thread's two numbers of a vector, as they lie there: to widen them would be to wait for them.
  __device__ unsigned two_of(const void* vector) const {
    return owns ? __ldg(static_cast<const unsigned*>(vector) + here.thread) : 0;
  }
  // Where the result of a unit goes: lanes 0 to 15 have what becomes of its first row, the others what becomes of the second
  // one, if there is one, and one lane each of them writes one copy.
  template <int P>
  __device__ uint64_t* to(int at) const {
    const int lane = here.lane, half = P == kQkv && lane >= 16 ? a.shape.head_dim / 2 : 0;
    return here.words_of(lane % 16) + at + half;
  }

  // All of a warp's units, N passes each, with what stands from `act` on, once `fill` has put it there and all warps have met.
  // Those of a product behind a norm lack a factor, whose squares are summed up beside.
  template <int P, int N, typename Fill>
  __device__ __forceinline__ void multiply(int layer, const Mine& mine, int count, const float* act,
                                           const Fill& fill) const {
    const Matrix& m = plan.products[P];
    const int lane = here.lane;
    const bool puts = (P == kQkv ? lane % 16 : lane) < a.copies;
    Rows<kRows<P>, N> rows;
    uint64_t* goes_to = nullptr;
    if (count > 0) {
      rows.template load<T, P>(m, mine, 0, mine.row, weights<P>(layer), a.shape.vocab, here);
      goes_to = pinned(to<P>(layer * plan.layer + mine.at));
    } else {
      rows = {};  // else the compiler keeps them in memory
    }
    fill();
    __syncthreads();
    if (count == 0) return;
    int unit = mine.first, pair = mine.pair;
    float factor = 1.0f;
    uint64_t best = 0;
#pragma unroll 1
    for (int k = 0;;) {
      float sum[kRows<P>];
      rows.template times<T>(reinterpret_cast<const float4*>(act), sum);
      float cos = 1.0f, sin = 0.0f;
      if constexpr (P == kQkv) {
        cos = static_cast<const volatile float&>(here.fixed.rope[0][pair]);
        sin = static_cast<const volatile float&>(here.fixed.rope[1][pair]);  // -sin turns the first
      }
      float value = sum[0];
      if constexpr (kNormed<P>) {
        float4 squares[2] = {};
        if (k == 0) {
          const float* squared = act + plan.act;
          squares[0] = read_now(squared);
          if (plan.squares > 128) squares[1] = read_now(squared + 128);
#pragma unroll 1
          for (int i = 256; i < plan.squares; i += 128) {
            const float4 more = read_now(squared + i);
            squares[0].x += more.x, squares[0].y += more.y, squares[0].z += more.z, squares[0].w += more.w;
          }
        }
        value = lane < 16 ? sum[0] : sum[1];
        float other = lane < 16 ? sum[1] : sum[0];
        value += __shfl_xor_sync(~0u, other, 16);
        if (k == 0) {
          float square = ((squares[0].x + squares[0].y) + (squares[0].z + squares[0].w)) +
                         ((squares[1].x + squares[1].y) + (squares[1].z + squares[1].w));
          square += __shfl_xor_sync(~0u, square, 16);
#pragma unroll
          for (int offset = 8; offset > 0; offset /= 2) {
            value += __shfl_xor_sync(~0u, value, offset);
            square += __shfl_xor_sync(~0u, square, offset);
          }
          factor = rsqrtf(fmaf(square, a.inverse_dim, a.eps));
        } else {
#pragma unroll
          for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
        }
        value *= factor;
        if constexpr (P == kHead) {
          const int token = 2 * unit + (lane < 16 ? 0 : 1);
          const uint64_t key = token < a.shape.vocab ? rank_key(value, token) : 0;
          best = key > best ? key : best;
          if (a.temperature > 0.0f && lane % 16 == 0)
            put_word(a.exchange + plan.at_logits + token, word(value, here.watch.tag));
        } else {
          other = __shfl_xor_sync(~0u, value, 16);
          value = P == kQkv ? fmaf(value, cos, lane < 16 ? other * sin : -other * sin)
                            : __fdividef(value, 1.0f + exp2_fast(-kLog2e * value)) * other;
        }
      } else {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
      }
      if (P != kHead && puts) put_word(goes_to, word(value, here.watch.tag));
      if (++k >= count) break;
      unit = pinned(unit) + m.stride;  // nothing of what follows is to be computed before the first unit
      const int run = run_of(m, unit);
      goes_to += m.stride;
      if constexpr (P == kQkv) {
        goes_to = to<P>(layer * plan.layer + plan.at[P] + unit + run * m.run);
        pair = run < a.shape.heads + a.shape.kv_heads ? unit - run * m.run : kNoTurn;
      }
      rows.template load<T, P>(m, here.fixed.mine[P][here.warp], k, unit + run * m.skip, weights<P>(layer),
                                pinned(a.shape.vocab), here);
    }
    if constexpr (P == kHead) here.fixed.keys[here.warp] = largest(best);
  }

  // A product, from its input on: polled for, added up or attended to, multiplied, put. Two buffers of input in turn: one
  // barrier between filling and reading is enough then, and after the head there are those of the choice.
  template <int P>
  __device__ __forceinline__ void phase(int layer, int position, const Splits& splits) {
    const Matrix& m = plan.products[P];
    // What follows from the thread alone the compiler would compute once for all layers, and keep.
    here.thread = pinned(here.thread), here.lane = here.thread % 32;
    const int words = layer * plan.layer, thread = here.thread, layers = a.shape.layers;
    const bool left = P == kHead ? a.leave & kLeaveHead : P >= kGateUp && a.leave & kLeaveMlp;
    float* const act = here.act(P % 2);
    // This thread's input: pairs from + k * step, k < n.
    constexpr int kFew = 2;
    Pairs<kFew> got;
    const uint64_t* from = here.words() + words + 2 * thread;
    int step = 2 * kThreads, n;
    here.watch.where = layer * 16 + P;
    if constexpr (P == kOut) {
      weight = two_of(a.layers[layer].mlp_norm);
      from += (a.leave & kLeaveAttention) ? plan.at[kQkv] : plan.at_attention;
      n = 2 * thread < m.width ? 1 : 0;
    } else if constexpr (P == kDown) {
      weight = two_of(layer + 1 < layers ? a.layers[layer + 1].attention_norm : a.norm);
      from += plan.at[kGateUp];
      n = left ? 0 : (a.shape.d_ff / 2 - thread + kThreads - 1) / kThreads;
    } else {
      constexpr bool kAttended = P == kGateUp;  // else it is the MLP's result that x lacks
      from += kAttended ? plan.at[kOut] : plan.at[kDown] - plan.layer;
      step = a.shape.dim;
      n = plan.products[kAttended ? kOut : kDown].parts;
      if (!owns || (!kAttended && (layer == 0 || a.leave & kLeaveMlp))) n = 0;
    }
    int asked = n;
    const uint64_t* at[kFew] = {from, from + step};
    // Before the input can be there: what was just used is asked for, of the next layer. (The head's: by `choose`.)
    const int next = P < kHead && layer + 1 < layers ? layer + 1 : 0;
    if constexpr (P == kQkv) {
      if (layer > 0) ask<kDown>(layer);
    } else if constexpr (P == kOut) {
      ask<kQkv>(next);
    } else if constexpr (P == kGateUp) {
      ask<kOut>(next);
      attention.prefetch(next, position + (next == 0 ? 1 : 0));
    } else if constexpr (P == kDown) {
      ask<kGateUp>(next);
    } else {
      ask<kDown>(next);
    }
    if constexpr (P == kOut) {
      if (!(a.leave & kLeaveAttention)) {
        const int end = position / (splits.span * splits.runs) + 1;  // results that are begun
        attention.run(words, layer, position);
        if (splits.results > a.few_splits) {
          attention.combine(words, layer, end);
        } else if (splits.results > 1) {
          if (n > 0) got.set(0, Attention<T>::result(here, words, end, thread));
          asked = 0;
        }
      }
      here.watch.where = layer * 16 + P;
    }
    const Mine mine = here.fixed.mine[P][here.warp];
    const int count = left ? 0 : same(mine.count);
    // Four groups at least were asked for after this product's: five a layer, and the head's. Two after attention's.
    if (P == kQkv && splits.span <= Attention<T>::kEarly) copies_left<2>();
    else copies_left<4>();
    auto fill = [&]() __attribute__((always_inline)) {
      if (asked > 0) got = take(here.watch, at, asked);
      if constexpr (!kNormed<P>) {
#pragma unroll 1
        for (int k = 0; k < n; k += kFew) {
          if (k > 0) {
            at[0] += kFew * step, at[1] += kFew * step;
            got = take(here.watch, at, n - k);
          }
          *reinterpret_cast<float2*>(act + act_at(2 * (thread + k * kThreads))) = got[0];
          if (k + 1 < n) *reinterpret_cast<float2*>(act + act_at(2 * (thread + (k + 1) * kThreads))) = got[1];
        }
      } else {
        x.x += got[0].x + got[1].x, x.y += got[0].y + got[1].y;
#pragma unroll 1
        for (int k = kFew; k < n; ++k) {
          const float2 more = take(here.watch, from + k * step);
          x.x += more.x, x.y += more.y;
        }
        // x times the norm's weight, and what the factor is made of that is still missing then.
        if (owns) {
          const float2 by = widen2(weight, T());
          *reinterpret_cast<float2*>(act + act_at(2 * thread)) = make_float2(x.x * by.x, x.y * by.y);
          act[plan.act + thread] = fmaf(x.x, x.x, x.y * x.y);
        }
      }
    };
    if (mine.slot < 0 && count > 0) foresee<T, P>(m, mine, weights<P>(layer), a.shape.vocab, here);
    const float* first = act + pinned(mine.act + 4 * here.lane);
    // All warps of a block come by the same copy, and to the same barrier.
    if (m.passes == 2) {
      multiply<P, 2>(layer, mine, count, first, fill);
    } else if (m.passes == 3) {
      multiply<P, 3>(layer, mine, count, first, fill);
    } else if (m.passes == 4) {
      multiply<P, 4>(layer, mine, count, first, fill);
    } else {
      multiply<P, 1>(layer, mine, count, first, fill);
    }
  }

  // The token after `token`, which stands at `position`; -1 if a block gave up.
  __device__ __forceinline__ int run(int token, int position, const Splits& splits) {
    const int layers = a.shape.layers, thread = here.thread;
    const unsigned embedded = two_of(static_cast<const T*>(a.embed) + int64_t{token} * a.shape.dim);
    weight = two_of(a.layers[0].attention_norm);
    if (const int width = a.shape.head_dim; a.rope != nullptr && thread < width) {
      const int half = width / 2, row = thread < half ? 0 : 1;
      here.fixed.rope[row][thread - row * half] =
          __ldg(a.rope + (row * a.rope_context + position) * width + thread - row * half);
    }
    x = widen2(embedded, T());
    if (thread < kWarps) here.fixed.keys[thread] = 0;
#pragma unroll 1
    for (int layer = 0; layer < layers; ++layer) {
      phase<kQkv>(layer, position, splits);
      phase<kOut>(layer, position, splits);
      phase<kGateUp>(layer, position, splits);
      phase<kDown>(layer, position, splits);
    }
    phase<kHead>(layers, position, splits);
    here.watch.where = layers * 16 + kChoose;
    return choose(here, position + 1, [this] { ask<kHead>(0); });
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    decode_tokens(const __grid_constant__ Decode a, const __grid_constant__ Plan plan, const __grid_constant__ Splits splits) {
  extern __shared__ __align__(128) unsigned char all_shared[];
  // One address for all of it, and the compiler does not know where it comes from: it would ask the card again each time.
  unsigned where = shared_address(all_shared);
  asm volatile("" : "+r"(where));
  auto* const own = static_cast<unsigned char*>(__cvta_shared_to_generic(where));
  Static& fixed = *reinterpret_cast<Static*>(own);
  unsigned char* const shared = own + kOwnShared;
  static_assert(sizeof(Static) <= kOwnShared);
  const int thread = static_cast<int>(threadIdx.x);
  Here here{a, plan, fixed, shared, static_cast<int>(blockIdx.x), same(thread / 32), thread % 32, thread,
            static_cast<int>(blockIdx.x) % a.copies, {a.status, a.epoch}};
  // What no copy fills, beyond a row's end, is to count as nothing.
  for (int i = thread; i < plan.shared / 16; i += kThreads) reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  if (thread <= kNoTurn) fixed.rope[0][thread] = 1.0f, fixed.rope[1][thread] = 0.0f;
  if (thread < kProducts * kWarps)
    fixed.mine[thread / kWarps][thread % kWarps] =
        share_of(a, plan, thread / kWarps, here.block, thread % kWarps);
  if (thread == 0) {
    fixed.dead = 0;
    barrier_init(&fixed.gathered);
    fixed.kv_head = here.block / splits.count;
    fixed.split = fixed.kv_head < a.shape.kv_heads ? here.block % splits.count : -1;
    fixed.rank = fixed.split % splits.runs;
    // Four warps' sums a lane, if there are lanes enough.
    fixed.pairs = plan.group << (4 + plan.halves);
    fixed.adds_log2 = plan.parts * splits.runs > 16 && 16 * fixed.pairs <= kThreads ? 4 : 4 * fixed.pairs <= kThreads ? 2 : 0;
    fixed.at_result = splits.results == 1 ? plan.at_attention
                                          : plan.at_parts + fixed.split / splits.runs * a.shape.heads * a.shape.head_dim;
  }
  int position = static_cast<int>(a.first_position), token = 0;
  if (const int64_t id = a.ids[position]; id >= 0 && id < a.embed_rows) {
    token = static_cast<int>(id);
  } else {
    if (here.block == 0 && thread == 0) here.watch.fail(kNoToken);
    here.watch.dead = true;
  }
  if (*static_cast<volatile int32_t*>(a.status) != 0) here.watch.dead = true;
  __syncthreads();
  if (plan.cluster > 1) meet_cluster();

  Step<T> step(here, splits);
  step.attention.begin();
  step.ask_all(position);
  bool stopped = false;
  auto done = [&] { return static_cast<int>(here.watch.tag - a.epoch); };  // tokens
  for (; done() < a.tokens && !stopped; ++position, ++here.watch.tag) {
    token = step.run(token, position, splits);
    if (token < 0) break;
    if (here.block == 0 && thread == 0) a.ids[position + 1] = token;
    for (int i = 0; i < a.stop_count; ++i) stopped = stopped || a.stops[i] == token;
  }
  copies_left<0>();
  if (plan.cluster > 1) meet_cluster();  // no block goes that another one may still write to
  if (here.block == 0 && thread == 0) {
    // After a stop its token again; after a failure no token at all.
    for (int i = done(); i < a.tokens; ++i) a.ids[a.first_position + i + 1] = token;
    *a.position = a.first_position + a.tokens;
  }
}

const char* decode_cuda(const Decode& a, void* stream) {
  static_assert(sizeof(Decode) + sizeof(Plan) + sizeof(Splits) <= 4096, "a kernel's arguments");
  const void* kernel = a.bf16 ? reinterpret_cast<const void*>(decode_tokens<__nv_bfloat16>)
                              : reinterpret_cast<const void*>(decode_tokens<__half>);
  auto told = [](cudaError_t error) {
    cudaGetLastError();  // it is told here, and not again
    return cudaGetErrorString(error);
  };
  const Card& card = this_card();
  // Always the same: another thread may be about to launch the kernel with more.
  const int most = static_cast<int>(card.shared_block);
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return told(error);
  int device = 0, cooperative = 0, fit = 0;
  cudaGetDevice(&device);
  if (auto error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device)) return told(error);
  if (!cooperative) return "the card has no cooperative launches";
  if (auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kThreads, most)) return told(error);
  if (fit < 1) return "a block of 512 threads does not fit a multiprocessor";

  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeCooperative, attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension, attributes[1].val.clusterDim = {1, 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(kThreads), launch.dynamicSmemBytes = most, launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = attributes;
  Plan plan;
  // Clusters of four leave some multiprocessors without work on most cards, those of two none: they are for where those
  // of four would have runs twice as long. Few runs' results are added up faster without.
  const int end = static_cast<int>(a.first_position) + a.tokens, runs = (end + a.target - 1) / a.target;
  for (int cluster = card.clusters && runs > kAlone ? a.cluster : 1;; cluster /= 2) {
    int blocks = static_cast<int>(card.multiprocessors);
    launch.numAttrs = cluster > 1 ? 2 : 1;
    if (cluster > 1) {
      attributes[1].val.clusterDim.x = cluster;
      launch.gridDim = dim3(blocks / cluster * cluster);
      int clusters = 0;
      if (auto error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch)) told(error), clusters = 0;
      if (5 * clusters * cluster < 4 * blocks) continue;
      blocks = clusters * cluster;
    }
    const char* why = make_plan(a.shape, a.temperature > 0.0f, blocks, cluster, static_cast<int>(card.shared_block), &plan);
    if (cluster == 1 && why != nullptr) return why;
    if (why == nullptr && (cluster <= 2 || end <= 2 * a.target * plan.most_splits)) break;
  }
  if (a.exchange_words < a.copies * plan.words) return "the exchange is too small";
  if ((a.leave & kLeaveHead) && a.temperature > 0.0f) return "sampling needs the head";
  const Splits splits = make_splits(plan, end, a.few_splits, a.target);
  if (a.tokens == 0) return nullptr;
  launch.gridDim = dim3(plan.blocks), launch.dynamicSmemBytes = plan.shared + kOwnShared;
  void* arguments[] = {const_cast<Decode*>(&a), &plan, const_cast<Splits*>(&splits)};
  if (auto error = cudaLaunchKernelExC(&launch, kernel, arguments)) return told(error);
  return nullptr;
}

}  // namespace tinylm::decode
