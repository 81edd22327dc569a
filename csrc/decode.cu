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
// So a phase is: poll, one barrier of the block, products, a warp's sum, a store.
//
// All blocks must be resident at once, which a cooperative launch guarantees. No wait is without end: see Watch.
//
// Reference: tinylm.generate.loop.Loop.step. Time a token, bf16, tiny at contexts 128 / 1,024 / 4,096 and small at 128, from a
// script on an H100 (not the suite), against what was expected (some 32 phases of 1.2 us):
//   this: 76 / 90 / 115 and 231 us, not 40 / 50 / 60 and 150; 1 to 8 copies of the exchange alike, 16 worse
#include "decode_attention.cuh"
#include "decode_choose.cuh"

namespace tinylm::decode {

template <typename T>
struct Step {
  Here& here;
  const Decode& a;
  const Plan& plan;
  const Attention<T> attention;
  float2 x = {};  // of the residual stream: numbers 2 * thread and the next
  unsigned weight = 0;  // of the next norm, beside x
  float rope = 1.0f;    // a number of the next position's row, of thread < head_dim
  uint64_t best = 0;    // of the logits that this lane has seen
  const bool owns;
  int turn = 0;  // which of the two buffers is filled next: one barrier between filling and reading is enough then

  __device__ Step(Here& here, const Splits& splits)
      : here(here), a(here.a), plan(here.plan), attention(here, splits), owns(2 * here.thread < a.shape.dim) {}

  __device__ const void* weights(int layer, int product) const {
    return product == kHead ? a.head : a.layers[layer].products[product];
  }
  __device__ int rows(int product) const { return product == kHead ? a.shape.vocab : INT_MAX; }
  __device__ void ask(int layer, int product) const {
    prefetch<T>(plan.products[product], here.fixed.mine[product][here.warp], weights(layer, product), rows(product), here);
  }
  // In the order in which they are used.
  __device__ void ask_all(int position) const {
#pragma unroll 1
    for (int product = 0; product < kProducts; ++product) {
      if (product == kOut) attention.prefetch(0, position);
      ask(0, product);
    }
  }

  // This thread's two numbers of a vector, as they lie there: to widen them would be to wait for them.
  __device__ unsigned two_of(const void* vector) const {
    return owns ? __ldg(static_cast<const unsigned*>(vector) + here.thread) : 0;
  }
  // What the token at `position` needs beside its embedding.
  __device__ void ask_first(int position) {
    const int width = a.shape.head_dim, half = width / 2, row = here.thread < half ? 0 : 1;
    if (a.rope != nullptr && here.thread < width && position < a.rope_context)
      rope = __ldg(a.rope + (row * a.rope_context + position) * width + here.thread - row * half);
    weight = two_of(a.layers[0].attention_norm);
  }

  // x plus a product's rows, `parts` words each.
  __device__ void add(int words, int parts) {
    if (!owns) return;
    constexpr int kFew = 2;
#pragma unroll 1
    for (int p = 0; p < parts; p += kFew) {
      int at[kFew];
      float2 got[kFew];
      const int n = min(kFew, parts - p);
#pragma unroll
      for (int k = 0; k < kFew; ++k) at[k] = words + 2 * (here.thread * parts + p + k);
      take<kFew>(here.watch, here.words, at, n, got);
#pragma unroll
      for (int k = 0; k < kFew; ++k) {
        if (k >= n) break;
        if (parts == 1) {
          x.x += got[k].x, x.y += got[k].y;
        } else {
          (2 * (p + k) < parts ? x.x : x.y) += got[k].x + got[k].y;
        }
      }
    }
  }
  // x times the norm's weight, to all warps once they have met.
  __device__ void norm(float* to) const {
    float square = 0.0f;
    const float2 by = widen2(weight, T());
    if (owns) {
      *reinterpret_cast<float2*>(to + act_at(2 * here.thread)) = make_float2(x.x * by.x, x.y * by.y);
      square = fmaf(x.x, x.x, x.y * x.y);
    }
    if (here.warp * 64 < a.shape.dim) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) square += __shfl_xor_sync(~0u, square, offset);
    }
    if (here.lane == 0) reinterpret_cast<float*>(here.fixed.squares[turn])[here.warp] = square;
  }
  // The factor that is still missing then.
  __device__ float rstd() const {
    const float4(&s)[kWarps / 4] = here.fixed.squares[turn];
    float4 sum = {};
#pragma unroll
    for (int i = 0; i < kWarps / 4; ++i) sum.x += s[i].x, sum.y += s[i].y, sum.z += s[i].z, sum.w += s[i].w;
    return rsqrtf(((sum.x + sum.y) + (sum.z + sum.w)) * a.inverse_dim + a.eps);
  }
  // A vector out of the exchange.
  __device__ void fill(float* to, int pairs, int words) const {
    constexpr int kFew = 4;
#pragma unroll 1
    for (int j = here.thread; j < pairs; j += kFew * kThreads) {
      int at[kFew];
      float2 got[kFew];
      const int n = min(kFew, (pairs - j + kThreads - 1) / kThreads);
#pragma unroll
      for (int k = 0; k < kFew; ++k) at[k] = words + 2 * (j + k * kThreads);
      take<kFew>(here.watch, here.words, at, n, got);
#pragma unroll
      for (int k = 0; k < kFew; ++k)
        if (k < n) *reinterpret_cast<float2*>(to + act_at(2 * (j + k * kThreads))) = got[k];
    }
  }

  // What a product gives a warp: of a unit's rows, or of its part of them.
  __device__ void finish(int product, int words, int unit, int part, float value, float rstd) {
    const int lane = here.lane, half = a.shape.head_dim / 2;
    if (product == kOut || product == kDown) {
      here.put(words + plan.at[product] + unit * plan.products[product].parts + part, value, lane);
      return;
    }
    value *= rstd;
    const float other = __shfl_xor_sync(~0u, value, 16);
    if (product == kQkv) {
      const int run = run_of(plan.products[kQkv], unit), pair = unit - run * half;
      if (unit < (a.shape.heads + a.shape.kv_heads) * half) {
        const float cos = here.fixed.rope[0][pair], sin = here.fixed.rope[1][pair];  // -sin turns the first
        value = fmaf(value, cos, lane < 16 ? other * sin : -other * sin);
      }
      here.put(words + plan.at[kQkv] + unit + run * half + (lane < 16 ? 0 : half), value, lane % 16);
    } else if (product == kGateUp) {
      if (lane < 16) here.put(words + plan.at[kGateUp] + unit, __fdividef(value, 1.0f + exp2_fast(-kLog2e * value)) * other, lane);
    } else {
      const int token = 2 * unit + (lane < 16 ? 0 : 1);
      const uint64_t key = token < a.shape.vocab ? rank_key(value, token) : 0;
      best = key > best ? key : best;
      if (a.temperature > 0.0f && lane % 16 == 0)
        put_word(a.exchange + plan.at_logits + token, word(value, here.watch.tag));
    }
  }

  // The token after `token`, which stands at `position`; -1 if a block gave up.
  __device__ int run(int token, int position, const Splits& splits) {
    const int layers = a.shape.layers, width = a.shape.heads * a.shape.head_dim;
    const unsigned embedded = two_of(static_cast<const T*>(a.embed) + int64_t{token} * a.shape.dim);
    if (a.rope != nullptr && here.thread < a.shape.head_dim) {
      const int half = a.shape.head_dim / 2, row = here.thread < half ? 0 : 1;
      here.fixed.rope[row][here.thread - row * half] = rope;
    }
    x = widen2(embedded, T());
    best = 0;
    int previous = -1;  // the product that x lacks
    const int end = position / splits.span + 1;  // runs of positions that are begun
#pragma unroll 1
    for (int i = 0; i <= kHead * layers; ++i) {
      const int layer = i / kHead, product = layer < layers ? i % kHead : +kHead, next = layer + 1 < layers ? layer + 1 : 0;
      const int words = layer * plan.layer;
      float* act = here.act(turn);
      float factor = 1.0f;
      here.watch.where = layer * 16 + product;
      if (product == kOut) {
        weight = two_of(a.layers[layer].mlp_norm);
        if (!(a.leave & kLeaveAttention)) {
          attention.run(words, layer, position);
          if (splits.count > a.few_splits) attention.combine(words, layer, end);
        }
        attention.prefetch(next, position + (next == 0 ? 1 : 0));
        here.watch.where = layer * 16 + product;
        if (2 * here.thread < width) {
          const float2 two = a.leave & kLeaveAttention
                                 ? take(here.watch, here.words, words + plan.at[kQkv] + 2 * here.thread)
                                 : Attention<T>::result(here, splits, words, end, here.thread);
          *reinterpret_cast<float2*>(act + act_at(2 * here.thread)) = two;
        }
      } else if (product == kDown) {
        weight = two_of(layer + 1 < layers ? a.layers[layer + 1].attention_norm : a.norm);
        if (!(a.leave & kLeaveMlp)) fill(act, a.shape.d_ff / 2, words + plan.at[kGateUp]);
      } else {
        if (previous >= 0)
          add((product == kGateUp ? words : words - plan.layer) + plan.at[previous], plan.products[previous].parts);
        norm(act);
      }
      __syncthreads();
      if (product != kOut && product != kDown) factor = rstd();
      turn ^= 1;
      const bool left = product == kHead ? a.leave & kLeaveHead : product >= kGateUp && a.leave & kLeaveMlp;
      if (!left) {
        multiply<T>(plan.products[product], here.fixed.mine[product][here.warp], weights(layer, product), rows(product), here, act,
                    [&](int unit, int part, float value) { finish(product, words, unit, part, value, factor); });
        if (product == kOut || product == kDown) previous = product;
      } else if (product == kDown) {
        previous = -1;
      }
      ask(next, product);
    }
    here.watch.where = layers * 16 + kChoose;
    ask_first(position + 1);
    return choose(here, best, position + 1);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    decode_tokens(const __grid_constant__ Decode a, const __grid_constant__ Plan plan, const __grid_constant__ Splits splits) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Static fixed;
  static_assert(sizeof(Static) <= kOwnShared);
  const int thread = static_cast<int>(threadIdx.x);
  Here here{a, plan, fixed, shared, static_cast<int>(blockIdx.x), thread / 32, thread % 32, thread,
            a.exchange + int64_t{blockIdx.x % a.copies} * plan.words, {a.status, a.epoch}};
  // What no copy fills, beyond a row's end, is to count as nothing.
  for (int i = thread; i < plan.shared / 16; i += kThreads) reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  if (thread < 64) fixed.rope[0][thread] = 1.0f, fixed.rope[1][thread] = 0.0f;
  if (thread < kProducts * kWarps)
    fixed.mine[thread / kWarps][thread % kWarps] =
        share_of(plan.products[thread / kWarps], here.block, plan.blocks, thread % kWarps);
  if (thread < kWarps) {
    const int group = a.shape.heads / a.shape.kv_heads;
    fixed.group_head[thread] = thread % group, fixed.group_part[thread] = thread / group;
  }
  if (thread == 0) {
    fixed.dead = fixed.bin = fixed.need = 0;
    fixed.group_parts = kWarps * a.shape.kv_heads / a.shape.heads;
    fixed.kv_head = here.block / splits.count;
    fixed.split = fixed.kv_head < a.shape.kv_heads ? here.block % splits.count : -1;
  }
  int position = static_cast<int>(a.first_position), done = 0;
  int64_t token = a.ids[position];
  if (token < 0 || token >= a.embed_rows) {
    if (here.block == 0 && thread == 0) here.watch.fail(kNoToken);
    here.watch.dead = true, token = 0;
  }
  if (*static_cast<volatile int32_t*>(a.status) != 0) here.watch.dead = true;
  __syncthreads();

  Step<T> step(here, splits);
  step.ask_all(position);
  step.ask_first(position);
  bool stopped = false;
  for (; done < a.tokens && !stopped; ++done, ++position, ++here.watch.tag) {
    token = step.run(static_cast<int>(token), position, splits);
    if (token < 0) break;
    if (here.block == 0 && thread == 0) a.ids[position + 1] = token;
    for (int i = 0; i < a.stop_count; ++i) stopped = stopped || a.stops[i] == token;
  }
  copies_left<0>();
  if (here.block == 0 && thread == 0) {
    // After a stop its token again; after a failure no token at all.
    for (int i = done; i < a.tokens; ++i) a.ids[a.first_position + i + 1] = token;
    *a.position = a.first_position + a.tokens;
    a.status[3] = done;
  }
}

namespace {

template <typename T>
const char* launch(const Decode& a, const Plan& plan, const Splits& splits, int device, cudaStream_t stream) {
  const void* kernel = reinterpret_cast<const void*>(decode_tokens<T>);
  auto told = [](cudaError_t error) {
    cudaGetLastError();  // it is told here, and not again
    return cudaGetErrorString(error);
  };
  // Always the same: another thread may be about to launch the kernel with more. The rest is the kernel's own.
  const int most = static_cast<int>(this_card().shared_block) - kOwnShared;
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return told(error);
  int cooperative = 0, fit = 0;
  if (auto error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device)) return told(error);
  if (!cooperative) return "the card has no cooperative launches";
  if (auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kThreads, plan.shared))
    return told(error);
  if (fit < 1) return "a block of 512 threads does not fit a multiprocessor";
  if (a.tokens == 0) return nullptr;
  void* arguments[] = {const_cast<Decode*>(&a), const_cast<Plan*>(&plan), const_cast<Splits*>(&splits)};
  if (auto error = cudaLaunchCooperativeKernel(kernel, dim3(plan.blocks), dim3(kThreads), arguments, plan.shared, stream))
    return told(error);
  return nullptr;
}

}  // namespace

const char* decode_cuda(const Decode& a, void* stream) {
  static_assert(sizeof(Decode) + sizeof(Plan) + sizeof(Splits) <= 4096, "a kernel's arguments");
  int device = 0;
  cudaGetDevice(&device);
  const Card& card = this_card();
  Plan plan;
  if (const char* why = make_plan(a.shape, a.temperature > 0.0f, card.multiprocessors,
                                  static_cast<int>(card.shared_block), &plan))
    return why;
  if (a.exchange_words < a.copies * plan.words) return "the exchange is too small";
  if ((a.leave & kLeaveHead) && a.temperature > 0.0f) return "sampling needs the head";
  const Splits splits = make_splits(plan, static_cast<int>(a.first_position) + a.tokens, a.few_splits, a.target);
  auto* on = static_cast<cudaStream_t>(stream);
  return a.bf16 ? launch<__nv_bfloat16>(a, plan, splits, device, on) : launch<__half>(a, plan, splits, device, on);
}

}  // namespace tinylm::decode
