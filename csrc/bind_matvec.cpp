// The ops of a token through a large model, csrc/matvec.h, through LibTorch's stable ABI. Everything that would make a
// kernel wrong is checked here.
#ifdef TINYLM_CUDA

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>

#include "matvec.h"

// Weak: a torch for the CPU does not have it, and loads this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace tinylm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What all tensors of a call share.
struct Place {
  ScalarType dtype;
  int32_t device;

  explicit Place(const Tensor& t) : dtype(t.scalar_type()), device(t.get_device_index()) {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "matvec: tensors must be bf16 or fp16");
  }
  bool bf16() const { return dtype == ScalarType::BFloat16; }

  void* operator()(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) const {
    return (*this)(t, name, sizes, dtype);
  }
  void* operator()(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, ScalarType of) const {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (int64_t size : sizes) same = same && t.size(d++) == size;
    STD_TORCH_CHECK(same, "matvec: ", name, " has the wrong shape");
    STD_TORCH_CHECK(t.scalar_type() == of, "matvec: ", name, " has the wrong dtype");
    STD_TORCH_CHECK(t.get_device_index() == device, "matvec: ", name, " is on another device");
    STD_TORCH_CHECK(t.is_contiguous(), "matvec: ", name, " must be contiguous");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, "matvec: ", name, " must be aligned to 16 bytes");
    return t.data_ptr();
  }

  template <class Kernel, class Arguments>
  void run(Kernel kernel, const Arguments& arguments) const {
    const torch::stable::accelerator::DeviceGuard guard(device);
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "matvec: this torch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "matvec: no stream");
    const char* why = kernel(arguments, stream);
    if (why != nullptr) throw std::runtime_error(why);
  }
};

void check_columns(int64_t columns, int64_t most) {
  STD_TORCH_CHECK(columns > 0 && columns % 8 == 0 && columns <= most, "matvec: ", columns,
                  " columns: they must be a multiple of 8, at most ", most);
}

int32_t blocks_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks >= 1 && blocks <= 32, "matvec: ", blocks, " blocks: 1 to 32");
  return static_cast<int32_t>(blocks);
}

// Of int64 words, zeros at first.
Standing* standing_of(const Place& place, const Tensor& standing, int64_t vocab) {
  return static_cast<Standing*>(place(standing, "standing", {choice_words(vocab)}, ScalarType::Long));
}

// out [n] = weight [n, columns] @ the norm of x [columns]. With swiglu: of weight [2 n, columns].
MatVec behind_norm(const Place& place, const Tensor& x, const Tensor& norm, double eps, const Tensor& weight,
                   const Tensor& out, ScalarType of, bool swiglu, bool overlap, int64_t blocks) {
  STD_TORCH_CHECK(weight.dim() == 2 && out.dim() == 1, "matvec: weight must be a matrix, out a vector");
  MatVec a{};
  a.outputs = out.size(0), a.columns = weight.size(1);
  check_columns(a.columns, kMostNormed);
  STD_TORCH_CHECK(a.outputs > 0 && a.outputs <= 1 << 28, "matvec: ", a.outputs, " outputs");
  a.wide = of == ScalarType::Float, a.swiglu = swiglu, a.bf16 = place.bf16(), a.overlap = overlap;
  STD_TORCH_CHECK(static_cast<float>(eps) > 0, "matvec: eps must be positive, got ", eps);
  a.x = place(x, "x", {a.columns});
  a.norm = place(norm, "norm", {a.columns});
  a.weight = place(weight, "weight", {a.outputs * (swiglu ? 2 : 1), a.columns});
  a.out = place(out, "out", {a.outputs}, of);
  a.eps = static_cast<float>(eps), a.blocks = blocks_of(blocks);
  return a;
}
void matvec_norm(Tensor x, Tensor norm, double eps, Tensor weight, Tensor out, bool swiglu, bool overlap, int64_t blocks) {
  const Place place(weight);
  place.run(matvec_cuda, behind_norm(place, x, norm, eps, weight, out, place.dtype, swiglu, overlap, blocks));
}
// The same into logits in fp32, and what matvec_choose needs to know of them into standing; count: for a top k too.
void matvec_logits(Tensor x, Tensor norm, double eps, Tensor weight, Tensor logits, Tensor standing, bool count,
                   bool overlap, int64_t blocks) {
  const Place place(weight);
  MatVec a = behind_norm(place, x, norm, eps, weight, logits, ScalarType::Float, false, overlap, blocks);
  a.standing = standing_of(place, standing, a.outputs), a.count = count;
  place.run(matvec_cuda, a);
}

// out [n] += weight [n, columns] @ x [columns]
void matvec_add(Tensor x, Tensor weight, Tensor out, bool overlap, int64_t blocks) {
  const Place place(weight);
  STD_TORCH_CHECK(weight.dim() == 2, "matvec: weight must be a matrix");
  MatVec a{};
  a.outputs = weight.size(0), a.columns = weight.size(1);
  check_columns(a.columns, kMostColumns);
  STD_TORCH_CHECK(a.outputs > 0 && a.outputs <= 1 << 28, "matvec: ", a.outputs, " outputs");
  a.add = true, a.bf16 = place.bf16(), a.overlap = overlap;
  a.x = place(x, "x", {a.columns});
  a.weight = place(weight, "weight", {a.outputs, a.columns});
  a.out = place(out, "out", {a.outputs});
  a.blocks = blocks_of(blocks);
  place.run(matvec_cuda, a);
}

// See OneQuery. position [1] int64; partials [heads * splits * (head_dim + 2)] fp32; arrived [heads] int32, zeros.
void matvec_attention(Tensor qkv, Tensor rope, Tensor position, Tensor keys, Tensor values, Tensor out, Tensor partials,
                      Tensor arrived, int64_t splits, bool overlap) {
  const Place place(qkv);
  STD_TORCH_CHECK(keys.dim() == 3 && rope.dim() == 3 && out.dim() == 2, "matvec: keys, rope or out lacks dimensions");
  const int64_t heads = out.size(0), kv_heads = keys.size(0), head_dim = keys.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads <= 1 << 14, "matvec: ", heads,
                  " heads and ", kv_heads, " of keys");
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kMostHeadDim, "matvec: heads of ", head_dim,
                  ": they must be a multiple of 8, at most ", kMostHeadDim);
  STD_TORCH_CHECK(splits >= 1 && splits <= kMostSplits, "matvec: ", splits, " splits: 1 to ", kMostSplits);
  OneQuery a{};
  a.heads = static_cast<int32_t>(heads), a.kv_heads = static_cast<int32_t>(kv_heads);
  a.head_dim = static_cast<int32_t>(head_dim), a.splits = static_cast<int32_t>(splits);
  a.capacity = keys.size(1), a.rope_positions = rope.size(1);
  STD_TORCH_CHECK(a.capacity <= 1 << 30, "matvec: a cache of ", a.capacity, " positions");
  a.bf16 = place.bf16(), a.overlap = overlap;
  a.qkv = place(qkv, "qkv", {(heads + 2 * kv_heads) * head_dim});
  a.rope = place(rope, "rope", {2, a.rope_positions, head_dim});
  a.position = static_cast<const int64_t*>(place(position, "position", {1}, ScalarType::Long));
  a.keys = place(keys, "keys", {kv_heads, a.capacity, head_dim});
  a.values = place(values, "values", {kv_heads, a.capacity, head_dim});
  a.out = place(out, "out", {heads, head_dim});
  a.partials = static_cast<float*>(
      place(partials, "partials", {one_query_partials(heads, head_dim, splits)}, ScalarType::Float));
  a.arrived = static_cast<int32_t*>(place(arrived, "arrived", {heads}, ScalarType::Int));
  place.run(one_query_cuda, a);
}

// See Choice. logits [vocab] fp32 and standing as matvec_logits leaves them; temperature 0: the likeliest; top_k 0: among
// all; table [at least vocab, columns].
void matvec_choose(Tensor logits, Tensor standing, double temperature, int64_t top_k, int64_t noise_start,
                   int64_t noise_stride, Tensor ids, Tensor position, Tensor table, Tensor x, bool overlap) {
  const Place place(table);
  STD_TORCH_CHECK(table.dim() == 2 && ids.dim() == 1 && logits.dim() == 1,
                  "matvec: table must be a matrix, ids and logits vectors");
  Choice a{};
  const int64_t vocab = logits.size(0);
  a.columns = table.size(1);
  STD_TORCH_CHECK(a.columns > 0 && a.columns % 8 == 0, "matvec: ", a.columns, " columns: they must be a multiple of 8");
  STD_TORCH_CHECK(vocab > 0 && vocab <= table.size(0) && vocab <= 1 << 28, "matvec: ", vocab, " logits for a table of ",
                  table.size(0));
  STD_TORCH_CHECK(temperature >= 0 && top_k >= 0, "matvec: temperature ", temperature, ", top_k ", top_k);
  a.logits = static_cast<const float*>(place(logits, "logits", {vocab}, ScalarType::Float));
  a.standing = standing_of(place, standing, vocab);
  a.undecided = reinterpret_cast<uint64_t*>(a.standing + 1);
  a.room = ids.size(0);
  a.ids = static_cast<int64_t*>(place(ids, "ids", {a.room}, ScalarType::Long));
  a.position = static_cast<int64_t*>(place(position, "position", {1}, ScalarType::Long));
  a.table = place(table, "table", {table.size(0), a.columns});
  a.x = place(x, "x", {a.columns});
  a.by = temperature > 0 ? std::max(static_cast<float>(1.0 / temperature), std::numeric_limits<float>::min()) : 0.0f;
  a.vocab = static_cast<int32_t>(vocab), a.top_k = top_k < vocab ? static_cast<int32_t>(top_k) : 0;
  a.noise_start = static_cast<uint64_t>(noise_start), a.noise_stride = static_cast<uint64_t>(noise_stride);
  a.overlap = overlap;
  place.run(choice_cuda, a);
}

// x [columns] = table [any, columns] at ids [any][position [1]], which must be within.
void matvec_embed(Tensor ids, Tensor position, Tensor table, Tensor x) {
  const Place place(table);
  STD_TORCH_CHECK(table.dim() == 2 && ids.dim() == 1, "matvec: table must be a matrix, ids a vector");
  Embedding a{};
  a.columns = table.size(1);
  STD_TORCH_CHECK(a.columns > 0 && a.columns % 8 == 0, "matvec: ", a.columns, " columns: they must be a multiple of 8");
  a.ids = static_cast<const int64_t*>(place(ids, "ids", {ids.size(0)}, ScalarType::Long));
  a.position = static_cast<const int64_t*>(place(position, "position", {1}, ScalarType::Long));
  a.table = place(table, "table", {table.size(0), a.columns});
  a.x = place(x, "x", {a.columns});
  place.run(embedding_cuda, a);
}

}  // namespace
}  // namespace tinylm

STABLE_TORCH_LIBRARY_FRAGMENT(tinylm, m) {
  m.def(
      "matvec_norm(Tensor x, Tensor norm, float eps, Tensor weight, Tensor(a!) out, bool swiglu, bool overlap,"
      " int blocks) -> ()");
  m.def(
      "matvec_logits(Tensor x, Tensor norm, float eps, Tensor weight, Tensor(a!) logits, Tensor(b!) standing, bool count,"
      " bool overlap, int blocks) -> ()");
  m.def("matvec_add(Tensor x, Tensor weight, Tensor(a!) out, bool overlap, int blocks) -> ()");
  m.def(
      "matvec_attention(Tensor qkv, Tensor rope, Tensor position, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) out,"
      " Tensor(d!) partials, Tensor(e!) arrived, int splits, bool overlap) -> ()");
  m.def(
      "matvec_choose(Tensor logits, Tensor(a!) standing, float temperature, int top_k, int noise_start,"
      " int noise_stride, Tensor(b!) ids, Tensor(c!) position, Tensor table, Tensor(d!) x, bool overlap) -> ()");
  m.def("matvec_embed(Tensor ids, Tensor position, Tensor table, Tensor(a!) x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tinylm, CUDA, m) {
  m.impl("matvec_norm", TORCH_BOX(&tinylm::matvec_norm));
  m.impl("matvec_logits", TORCH_BOX(&tinylm::matvec_logits));
  m.impl("matvec_add", TORCH_BOX(&tinylm::matvec_add));
  m.impl("matvec_attention", TORCH_BOX(&tinylm::matvec_attention));
  m.impl("matvec_choose", TORCH_BOX(&tinylm::matvec_choose));
  m.impl("matvec_embed", TORCH_BOX(&tinylm::matvec_embed));
}

#endif
