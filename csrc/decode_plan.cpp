// How a decode step's work is shared out among blocks and warps, and what waits in shared memory.
#include <algorithm>

#include "decode.h"

namespace tinylm::decode {
namespace {

constexpr int kMostPositions = 512;  // of a ring: more of them are read in turns
constexpr int kFewestPositions = 16;
constexpr int kMostSums = 2112;  // numbers of attention that a block's warps add up

int up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

Matrix share(int units, int width, int rows, int run, int skip, int apart, int blocks) {
  Matrix m{};
  m.units = units, m.width = width, m.rows = rows, m.run = run, m.skip = skip, m.apart = apart;
  m.parts = 1, m.slot = -1;
  m.inverse = run == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + run - 1) / run);
  while (up((width + m.parts - 1) / m.parts, kPassColumns) > kMostPasses * kPassColumns) m.parts *= 2;
  m.columns = up((width + m.parts - 1) / m.parts, kPassColumns);
  m.passes = m.columns / kPassColumns;
  m.stride = kWarps / m.parts;
  m.each = ((units + blocks - 1) / blocks + m.stride - 1) / m.stride;
  return m;
}

}  // namespace

int Matrix::bytes(int blocks) const {
  const int most = (units + blocks - 1) / blocks;
  return std::min(kWarps, most * parts) * each * rows * passes * 512;
}

const char* make_plan(const Shape& s, bool sampled, int blocks, int cluster, int shared, Plan* plan) {
  const int group = s.kv_heads > 0 ? s.heads / s.kv_heads : 0, width = s.heads * s.head_dim;
  if (s.dim < 8 || s.dim > kMostWidth || s.dim % 8) return "dim must be a multiple of 8, at most 1024";
  if (s.head_dim < 8 || s.head_dim > 128 || s.head_dim % 8) return "head_dim must be a multiple of 8, at most 128";
  if (width > kMostWidth) return "heads * head_dim must be at most 1024";
  if (group < 1 || group > kMostGroup || s.heads % s.kv_heads) return "kv_heads must divide heads, by at most 16";
  if (s.layers < 1 || s.layers > kMostLayers) return "at most 64 layers";
  if (s.d_ff < 8 || s.d_ff % 8 || s.d_ff > 8 * kMostWidth) return "d_ff must be a multiple of 8, at most 8192";
  if (s.vocab < 1 || s.vocab > 1 << 20) return "vocab_size must be at most 2^20";
  if (blocks / cluster < s.kv_heads) return "the card has fewer multiprocessors than the model has kv_heads";
  Plan p{};
  p.blocks = blocks, p.cluster = cluster, p.group = group;
  const int half = s.head_dim / 2, heads = s.heads + 2 * s.kv_heads;
  p.products[kQkv] = share(heads * half, s.dim, kRows<kQkv>, half, half, half, blocks);  // pairs that RoPE turns
  p.products[kOut] = share(s.dim, width, kRows<kOut>, s.dim, 0, 0, blocks);
  p.products[kGateUp] = share(s.d_ff, s.dim, kRows<kGateUp>, s.d_ff, 0, s.d_ff, blocks);  // a number's gate and the number itself
  p.products[kDown] = share(s.dim, s.d_ff, kRows<kDown>, s.dim, 0, 0, blocks);
  p.products[kHead] = share((s.vocab + 1) / 2, s.dim, kRows<kHead>, 1, 1, 1, blocks);
  p.most_splits = blocks / cluster / s.kv_heads * cluster;
  p.chunks = s.head_dim / 8, p.turn = p.chunks % 8 == 0 ? 7 : 0;
  p.chunks_log2 = -1;
  for (int log2 = 0; log2 < 5; ++log2)
    if (p.chunks == 1 << log2) p.chunks_log2 = log2;
  p.halves = (s.head_dim + 63) / 64, p.eights = (group + 7) / 8;
  p.pitch = p.halves * 64 + 4;
  p.parts = std::clamp(kMostSums / (group * p.pitch), 1, kWarps / (p.halves * p.eights));

  // Two buffers of input in turn: behind a norm, and not.
  auto floats = [&p](int product) { return p.products[product].columns * p.products[product].parts; };
  p.act = floats(kQkv), p.squares = up(s.dim / 2, 128);
  int at = 4 * (p.act + p.squares + std::max(floats(kOut), floats(kDown)));
  p.scratch = at;
  at += p.eights * p.halves * 4 * 512 + up(4 * s.head_dim, 128);  // queries, newest key and value
  p.sums = at;
  const int room = shared - kOwnShared, kept = 8 * kThreads * kKept;
  p.kept = sampled && at + kSampler + kept <= room / 2 ? kKept : 0;
  const int sampler = sampled ? kSampler + (p.kept > 0 ? kept : 0) : 0;
  at += up(std::max(4 * cluster * p.parts * group * p.pitch, sampler), 128);  // of every warp of a cluster
  p.places = at;
  at += up(8 * (group << (4 + p.halves)), 128);
  const int position = 2 * 2 * s.head_dim;  // bytes of a key and a value
  // Keys and values go first, but leave most of a small shared memory to weights.
  const int least = std::clamp(std::min(room / 4, room - at) / position / 16 * 16, kFewestPositions, 128);
  if (at + least * position > room) return "it takes more shared memory than the card has";
  int left = room - at - least * position;
  for (Matrix& m : p.products) {
    const int bytes = m.bytes(blocks);
    if (bytes > left) continue;
    m.slot = at;
    at += bytes, left -= bytes;
  }
  p.ring = at;
  p.tile = std::min(kMostPositions, least + left / position / 16 * 16) / 2;
  p.shared = p.ring + 2 * p.tile * position;

  int words = 0;
  auto take = [&words](int count) {
    const int start = words;
    words += up(count, 16);  // lines of 128 bytes
    return start;
  };
  p.at[kQkv] = take(heads * s.head_dim);
  p.at_parts = take(p.most_splits / cluster * width);
  p.at_attention = take(width);
  p.at[kOut] = take(s.dim * p.products[kOut].parts);
  p.at[kGateUp] = take(s.d_ff);
  p.at[kDown] = take(s.dim * p.products[kDown].parts);
  p.layer = words;
  words *= s.layers;
  p.at_logits = take(sampled ? 2 * p.products[kHead].units : 0);
  p.at_best = take(2 * 2 * blocks);  // of tokens of even and of odd number
  p.at_id = take(2 * 2);
  p.words = words;
  *plan = p;
  return nullptr;
}

Splits make_splits(const Plan& plan, int end, int few, int target) {
  if (2 * end <= 3 * target || plan.most_splits == 1) return {1, end, 1, 1};
  const int most = std::min(2 * plan.tile, 2 * target) * plan.cluster;  // positions of a result, where few are wanted
  int results = (end + target * plan.cluster - 1) / (target * plan.cluster);
  if (results > few && (end + most - 1) / most <= few) results = few;
  results = std::min(results, plan.most_splits / plan.cluster);
  const int span = (end + results * plan.cluster - 1) / (results * plan.cluster), of_result = span * plan.cluster;
  results = (end + of_result - 1) / of_result;
  return {results * plan.cluster, span, results, plan.cluster};
}

}  // namespace tinylm::decode
