// The ops of the decode kernel, through LibTorch's stable ABI. Everything that would make the kernel wrong is checked here.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "decode.h"

#ifdef TINYLM_CUDA
// Weak: a torch for the CPU does not have it, and loads this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace tinylm::decode {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How the work is shared out among so many blocks, in clusters of `cluster`, of so many bytes of shared memory; shape: dim,
// layers, heads, kv_heads, head_dim, d_ff, vocab. Returns the exchange's words, bytes of shared memory, positions in half of
// the ring, for a launch that ends at `end` the runs of positions, their length and their results, then of each product: units,
// rows, run, skip, apart, width, parts, columns, stride, each, slot.
std::vector<int64_t> plan_of(std::vector<int64_t> shape, bool sampled, int64_t blocks, int64_t cluster, int64_t shared,
                             int64_t end, int64_t few_splits, int64_t target) {
  STD_TORCH_CHECK(shape.size() == 7, "decode_plan: shape must be dim, layers, heads, kv_heads, head_dim, d_ff, vocab");
  int values[7];
  for (int i = 0; i < 7; ++i) {
    STD_TORCH_CHECK(shape[i] > 0 && shape[i] <= INT32_MAX, "decode_plan: a shape of ", shape[i]);
    values[i] = static_cast<int>(shape[i]);
  }
  STD_TORCH_CHECK(cluster > 0 && blocks > 0 && blocks % cluster == 0, "decode_plan: ", blocks, " blocks in clusters of ",
                  cluster);
  const Shape s{values[0], values[1], values[2], values[3], values[4], values[5], values[6]};
  Plan p;
  const char* why = make_plan(s, sampled, static_cast<int>(blocks), static_cast<int>(cluster),
                              static_cast<int>(shared), &p);
  if (why != nullptr) throw std::runtime_error(why);
  STD_TORCH_CHECK(end > 0 && few_splits > 0 && target > 0, "decode_plan: end, few_splits and target must be positive");
  const Splits splits = make_splits(p, static_cast<int>(end), static_cast<int>(few_splits), static_cast<int>(target));
  std::vector<int64_t> all{p.words, p.shared, p.tile, splits.count, splits.span, splits.results};
  for (const Matrix& m : p.products)
    for (int value : {m.units, m.rows, m.run, m.skip, m.apart, m.width, m.parts, m.columns, m.stride, m.each, m.slot})
      all.push_back(value);
  return all;
}

#ifdef TINYLM_CUDA

const void* checked(const Tensor& t, const char* name, ScalarType dtype, int32_t device,
                    std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  STD_TORCH_CHECK(same, "decode: ", name, " has the wrong shape");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "decode: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.get_device_index() == device, "decode: ", name, " is on another device");
  STD_TORCH_CHECK(t.is_contiguous(), "decode: ", name, " must be contiguous");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, "decode: ", name, " must be aligned to 16 bytes");
  return t.data_ptr();
}

// `tokens` more tokens after ids[first_position], their keys and values into the cache. weights: embedding, head, last norm,
// then of each layer attention_norm, qkv, out, mlp_norm, gate_up, down. rope: fp32 [2, context, head_dim], or empty.
// exchange: int64, zeros at first, used with an epoch (and up to epoch + tokens) only once. status: int32 [2], see decode.h.
void decode(std::vector<Tensor> weights, Tensor rope, Tensor keys, Tensor values, Tensor ids, Tensor position,
            Tensor stops, Tensor exchange, Tensor status, int64_t heads, int64_t vocab, int64_t first_position,
            int64_t tokens, int64_t epoch, double eps, double temperature, int64_t top_k, int64_t noise_start,
            int64_t noise_stride, int64_t copies, int64_t few_splits, int64_t target, int64_t cluster, int64_t leave) {
  STD_TORCH_CHECK(weights.size() >= 9 && weights.size() % 6 == 3, "decode: 3 weights and 6 for each layer are needed");
  const int64_t layers = static_cast<int64_t>(weights.size()) / 6;
  STD_TORCH_CHECK(layers <= kMostLayers, "decode: at most ", kMostLayers, " layers");
  STD_TORCH_CHECK(weights[0].dim() == 2 && keys.dim() == 5 && weights[8].dim() == 2, "decode: a tensor lacks dimensions");
  const int64_t dim = weights[0].size(1), d_ff = weights[8].size(1), rows = weights[0].size(0);
  const int64_t kv_heads = keys.size(2), context = keys.size(3), head_dim = keys.size(4), width = heads * head_dim;
  const int32_t device = weights[0].get_device_index();
  const ScalarType dtype = weights[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "decode: weights must be bf16 or fp16");
  for (int64_t value : {dim, d_ff, kv_heads, head_dim, heads, vocab, context})
    STD_TORCH_CHECK(value > 0 && value <= 1 << 24, "decode: a size of ", value);

  Decode a{};
  a.shape = {static_cast<int>(dim),      static_cast<int>(layers), static_cast<int>(heads), static_cast<int>(kv_heads),
             static_cast<int>(head_dim), static_cast<int>(d_ff),   static_cast<int>(vocab)};
  a.bf16 = dtype == ScalarType::BFloat16;
  a.embed_rows = rows;
  STD_TORCH_CHECK(vocab <= rows, "decode: ", vocab, " ids may be chosen, and the embedding has ", rows);
  a.embed = checked(weights[0], "the embedding", dtype, device, {rows, dim});
  a.head = checked(weights[1], "the head", dtype, device, {rows, dim});
  a.norm = checked(weights[2], "the last norm", dtype, device, {dim});
  for (int64_t n = 0; n < layers; ++n) {
    const Tensor* of = &weights[3 + 6 * n];
    Layer& layer = a.layers[n];
    layer.attention_norm = checked(of[0], "attention_norm", dtype, device, {dim});
    layer.products[kQkv] = checked(of[1], "qkv", dtype, device, {width + 2 * kv_heads * head_dim, dim});
    layer.products[kOut] = checked(of[2], "out", dtype, device, {dim, width});
    layer.mlp_norm = checked(of[3], "mlp_norm", dtype, device, {dim});
    layer.products[kGateUp] = checked(of[4], "gate_up", dtype, device, {2 * d_ff, dim});
    layer.products[kDown] = checked(of[5], "down", dtype, device, {dim, d_ff});
  }
  if (rope.numel() > 0) {
    STD_TORCH_CHECK(rope.dim() == 3, "decode: rope must be [2, context, head_dim]");
    a.rope_context = rope.size(1);
    a.rope = static_cast<const float*>(checked(rope, "rope", ScalarType::Float, device, {2, a.rope_context, head_dim}));
  }
  a.keys = const_cast<void*>(checked(keys, "keys", dtype, device, {layers, 1, kv_heads, context, head_dim}));
  a.values = const_cast<void*>(checked(values, "values", dtype, device, {layers, 1, kv_heads, context, head_dim}));
  a.context = context;
  auto numbers = [device](const Tensor& t, const char* name, ScalarType of) {
    return const_cast<void*>(checked(t, name, of, device, {t.numel()}));
  };
  a.ids = static_cast<int64_t*>(numbers(ids, "ids", ScalarType::Long));
  a.position = static_cast<int64_t*>(numbers(position, "position", ScalarType::Long));
  a.stops = static_cast<const int64_t*>(numbers(stops, "stops", ScalarType::Long));
  a.exchange = static_cast<uint64_t*>(numbers(exchange, "exchange", ScalarType::Long));
  a.status = static_cast<int32_t*>(numbers(status, "status", ScalarType::Int));
  STD_TORCH_CHECK(position.numel() == 1 && status.numel() == 2 && stops.numel() <= kMostStops,
                  "decode: position has 1 number, status 2, stops at most ", kMostStops);
  STD_TORCH_CHECK(tokens >= 0 && first_position >= 0 && first_position + tokens <= context &&
                      (a.rope == nullptr || first_position + tokens <= a.rope_context),
                  "decode: ", tokens, " tokens from position ", first_position, " pass the context");
  STD_TORCH_CHECK(first_position + tokens < ids.numel(), "decode: no room in ids for ", tokens, " tokens");
  STD_TORCH_CHECK(epoch > 0 && epoch + tokens <= INT32_MAX, "decode: an epoch of ", epoch);
  STD_TORCH_CHECK(copies >= 1 && copies <= 16 && few_splits >= 1 && target >= 1 && few_splits < 1 << 20 && target < 1 << 20,
                  "decode: copies must be 1 to 16, few_splits and target positive");
  STD_TORCH_CHECK(cluster == 1 || cluster == 2 || cluster == 4, "decode: clusters of ", cluster, " blocks");
  STD_TORCH_CHECK(eps > 0 && (temperature == 0 || static_cast<float>(temperature) > 0), "decode: eps ", eps, ", temperature ",
                  temperature);
  STD_TORCH_CHECK(top_k >= 0, "decode: top_k ", top_k);
  a.exchange_words = exchange.numel();
  a.first_position = first_position;
  a.noise_start = static_cast<uint64_t>(noise_start), a.noise_stride = static_cast<uint64_t>(noise_stride);
  a.inverse_dim = 1.0f / static_cast<float>(dim);
  a.eps = static_cast<float>(eps), a.temperature = static_cast<float>(temperature);
  a.epoch = static_cast<uint32_t>(epoch);
  a.tokens = static_cast<int>(tokens), a.stop_count = static_cast<int>(stops.numel());
  a.top_k = top_k < vocab ? static_cast<int>(top_k) : 0;
  a.copies = static_cast<int>(copies), a.leave = static_cast<int>(leave);
  a.few_splits = static_cast<int>(few_splits), a.target = static_cast<int>(target);
  a.cluster = static_cast<int>(cluster);

  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "decode: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "decode: no stream");
  const char* why = decode_cuda(a, stream);
  if (why != nullptr) throw std::runtime_error(why);
}

#endif

}  // namespace
}  // namespace tinylm::decode

STABLE_TORCH_LIBRARY_FRAGMENT(tinylm, m) {
  m.def(
      "decode_plan(int[] shape, bool sampled, int blocks, int cluster, int shared, int end, int few_splits, int target) -> int[]");
  m.def(
      "decode(Tensor[] weights, Tensor rope, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) ids, Tensor(d!) position,"
      " Tensor stops, Tensor(e!) exchange, Tensor(f!) status, int heads, int vocab, int first_position, int tokens,"
      " int epoch, float eps, float temperature, int top_k, int noise_start, int noise_stride, int copies,"
      " int few_splits, int target, int cluster, int leave) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tinylm, CompositeExplicitAutograd, m) {
  m.impl("decode_plan", TORCH_BOX(&tinylm::decode::plan_of));
}

#ifdef TINYLM_CUDA
STABLE_TORCH_LIBRARY_IMPL(tinylm, CUDA, m) { m.impl("decode", TORCH_BOX(&tinylm::decode::decode)); }
#endif
