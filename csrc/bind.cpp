// The ops of namespace tinylm, through LibTorch's stable ABI: one build serves torch 2.11 and later. Everything that
// would make a kernel wrong is checked here, because torch.ops.tinylm.* can be called directly; what Python says of the
// same mistakes is in tinylm/ops/rmsnorm_cuda.py. Compiled with TINYLM_CUDA where the .cu files are.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "rmsnorm.h"

#ifdef TINYLM_CUDA
// Weak: a torch for the CPU does not have it, and loads this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace tinylm {
namespace {

// What a caller did wrong; the arguments after the condition are the message.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// What torch says of an error it has written to stderr by then.
void ok(AOTITorchError code) { require(code == AOTI_TORCH_SUCCESS, "tinylm: a call of torch's failed"); }

const int32_t kF32 = aoti_torch_dtype_float32(), kF16 = aoti_torch_dtype_float16(), kBF16 = aoti_torch_dtype_bfloat16(),
              kF64 = aoti_torch_dtype_float64();

Dtype tag_of(int32_t dtype) {
  if (dtype == kF32) return Dtype::f32;
  if (dtype == kBF16) return Dtype::bf16;
  if (dtype == kF16) return Dtype::f16;
  require(dtype == kF64, "rmsnorm: x must be float32, float16, bfloat16 or float64");
  return Dtype::f64;
}

// A tensor, through its handle: torch::stable::Tensor and TORCH_BOX put a shared pointer around each argument and a
// second handle around each result, 0.2 us a call of rmsnorm_inference (of 1.8; a row of 64 on a CPU).
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_; }
  AtenTensorHandle get() const { return handle_; }
  StableIValue release() { return torch::stable::detail::from(std::exchange(handle_, nullptr)); }

  int64_t dim() const {
    int64_t dim;
    ok(aoti_torch_get_dim(handle_, &dim));
    return dim;
  }
  const int64_t* sizes() const {
    int64_t* sizes;
    ok(aoti_torch_get_sizes(handle_, &sizes));
    return sizes;
  }
  const int64_t* strides() const {
    int64_t* strides;
    ok(aoti_torch_get_strides(handle_, &strides));
    return strides;
  }
  int32_t dtype() const {
    int32_t dtype;
    ok(aoti_torch_get_dtype(handle_, &dtype));
    return dtype;
  }
  int32_t device() const {
    int32_t index;
    ok(aoti_torch_get_device_index(handle_, &index));
    return index;
  }
  void* data() const {
    void* data;
    ok(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }
  Tensor contiguous() const {
    AtenTensorHandle same;
    ok(aoti_torch_new_tensor_handle(handle_, &same));
    const auto copy = torch::stable::contiguous(torch::stable::Tensor(same));
    ok(aoti_torch_new_tensor_handle(copy.get(), &same));
    return Tensor(same);
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Arguments are the callee's to free.
Tensor argument(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }

// A tensor whose rows are contiguous: the one given, or a copy of it.
struct Input {
  const Tensor& given;
  Tensor copy;
  const int64_t* sizes;
  int64_t dim;
  Rows rows;

  explicit Input(const Tensor& t) : given(t), sizes(t.sizes()), dim(t.dim()) {
    require(dim > 0 && sizes[dim - 1] > 0, "rmsnorm: the last dimension must exist and not be empty");
    if (!merge(t.strides())) {
      copy = t.contiguous();
      merge(copy.strides());
    }
  }

  const void* data() const { return (copy ? copy : given).data(); }
  int64_t hidden() const { return sizes[dim - 1]; }
  int64_t count() const {  // of rows
    int64_t count = 1;
    for (int64_t d = 0; d < dim - 1; ++d) count *= sizes[d];
    return count;
  }
  bool like(const Input& other) const { return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes); }

 private:
  // Leading dims become as few as can be, the outermost first; false if that is too many, or a row is not contiguous.
  bool merge(const int64_t* strides) {
    if (strides[dim - 1] != 1 && sizes[dim - 1] != 1) return false;
    int32_t dims = 0;
    for (int64_t d = 0; d < dim - 1; ++d) {
      if (sizes[d] == 1) continue;
      if (dims > 0 && rows.stride[dims - 1] == sizes[d] * strides[d]) {
        rows.size[dims - 1] *= sizes[d];
        rows.stride[dims - 1] = strides[d];
        continue;
      }
      if (dims == kLeadDims) return false;
      rows.size[dims] = sizes[d];
      rows.stride[dims++] = strides[d];
    }
    if (dims == 0) {
      rows.size[0] = 1;
      rows.stride[0] = 0;
    }
    rows.dims = dims ? dims : 1;
    return dims < 2 || count() <= INT32_MAX;  // the kernels divide row numbers of 32 bits
  }
};

// [hidden], contiguous, in the dtype of x or fp32.
struct Weight {
  const Tensor& given;
  Tensor copy;
  bool f32;

  Weight(const Tensor& t, int64_t hidden, int32_t dtype) : given(t) {
    require(t.dim() == 1 && t.sizes()[0] == hidden, "rmsnorm: weight must be [", hidden, "], the last dimension of x");
    const int32_t own = t.dtype();
    f32 = own == kF32;
    require(own == dtype || f32, "rmsnorm: weight must have the dtype of x, or float32");
    if (hidden > 1 && t.strides()[0] != 1) copy = t.contiguous();
  }
  const void* data() const { return (copy ? copy : given).data(); }
};

// Where a call runs, and what differs there.
template <bool cuda>
class Device {
 public:
  // The device that all share. On the CPU there is nothing to ask: any other device's kernel goes before its.
  template <class... Tensors>
  explicit Device(const Tensor& x, const Tensors&... others) {
    if constexpr (cuda) {
      index_ = x.device();
      require(index_ >= 0 && ((others.device() == index_) && ...), "rmsnorm: all tensors must be on one device");
      int32_t current;
      ok(aoti_torch_get_current_device_index(&current));
      if (current != index_) guard_.emplace(index_);
    }
  }

  // A contiguous output.
  Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype) const {
    static const int32_t type = cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
    constexpr int64_t kFew = 8;
    int64_t few[kFew], *strides = few, stride = 1;
    std::unique_ptr<int64_t[]> many;
    if (dim > kFew) {
      many.reset(new int64_t[dim]);
      strides = many.get();
    }
    for (int64_t d = dim; d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
    AtenTensorHandle handle;
    require(aoti_torch_empty_strided(dim, sizes, strides, dtype, type, index_, &handle) == AOTI_TORCH_SUCCESS,
            "rmsnorm: out of memory: no room for an output of ", stride, " elements");
    return Tensor(handle);
  }

  void run(const RmsNorm& p) const {
#ifdef TINYLM_CUDA
    if constexpr (cuda) return check(rmsnorm_cuda(p, stream()));
#endif
    rmsnorm_cpu(p);
  }

  void run(RmsNormGrad& p) const {
#ifdef TINYLM_CUDA
    if constexpr (cuda) {
      int64_t sizes[] = {0, p.hidden};
      check(rmsnorm_partials(p, &sizes[0]));
      const Tensor partials = empty(sizes, 2, kF32);
      p.partials = static_cast<float*>(partials.data());
      return check(rmsnorm_grad_cuda(p, stream()));
    }
#endif
    rmsnorm_grad_cpu(p);
  }

 private:
  int32_t index_ = 0;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;

#ifdef TINYLM_CUDA
  void* stream() const {
    require(aoti_torch_get_current_cuda_stream, "rmsnorm: this torch has no CUDA");
    void* stream;
    ok(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }
  static void check(const char* error) { require(!error, "rmsnorm: CUDA: ", error); }
#endif
};

template <bool cuda>
Dtype tag_on(int32_t dtype) {
  const Dtype tag = tag_of(dtype);
  require(!cuda || tag != Dtype::f64, "rmsnorm: float64 is for the CPU alone");
  return tag;
}

struct Outputs {
  Tensor y, sum, rstd;
};

template <bool cuda>
Outputs forward(const Device<cuda>& device, const Tensor& x_, const Tensor* residual_, const Tensor& weight_, double eps,
                bool want_rstd) {
  const Input x(x_);
  const int32_t dtype = x_.dtype();
  RmsNorm p{};
  p.dtype = tag_on<cuda>(dtype);
  const Weight weight(weight_, x.hidden(), dtype);
  require(p.dtype == Dtype::f64 ? eps > 0 : static_cast<float>(eps) > 0,
          "rmsnorm: eps must be positive in the dtype of the sum, got ", eps);
  p.x = x.data();
  p.x_rows = x.rows;
  p.weight = weight.data();
  p.weight_f32 = weight.f32;
  p.rows = x.count();
  p.hidden = x.hidden();
  p.eps = eps;
  std::optional<Input> residual;
  if (residual_) {
    residual.emplace(*residual_);
    require(residual_->dtype() == dtype && residual->like(x), "add_rmsnorm: residual must have the shape and dtype of x");
    p.residual = residual->data();
    p.residual_rows = residual->rows;
  }
  Outputs out;
  out.y = device.empty(x.sizes, x.dim, dtype);
  p.y = out.y.data();
  if (residual_) {
    out.sum = device.empty(x.sizes, x.dim, dtype);
    p.sum = out.sum.data();
  }
  if (want_rstd) {
    out.rstd = device.empty(x.sizes, x.dim - 1, p.dtype == Dtype::f64 ? kF64 : kF32);
    p.rstd = out.rstd.data();
  }
  device.run(p);
  return out;
}

template <bool cuda>
void backward(StableIValue* stack, const Device<cuda>& device, const Tensor& dy_, const Tensor* dsum_, const Tensor& h_,
              const Tensor& weight_, const Tensor& rstd_) {
  const Input h(h_), dy(dy_);
  const int32_t dtype = h_.dtype();
  RmsNormGrad p{};
  p.dtype = tag_on<cuda>(dtype);
  const Weight weight(weight_, h.hidden(), dtype);
  require(dy_.dtype() == dtype && dy.like(h), "rmsnorm: dy must have the shape and dtype of x");
  require(rstd_.dtype() == (p.dtype == Dtype::f64 ? kF64 : kF32) && rstd_.dim() == h.dim - 1 &&
              std::equal(h.sizes, h.sizes + h.dim - 1, rstd_.sizes()),
          "rmsnorm: rstd must be what the forward gave");
  std::optional<Input> dsum;
  if (dsum_) {
    dsum.emplace(*dsum_);
    require(dsum_->dtype() == dtype && dsum->like(h), "add_rmsnorm: dsum must have the shape and dtype of x");
    p.dsum = dsum->data();
    p.dsum_rows = dsum->rows;
  }
  bool packed;
  ok(aoti_torch_is_contiguous(rstd_.get(), &packed));
  const Tensor rstd = packed ? Tensor() : rstd_.contiguous();
  p.dy = dy.data();
  p.dy_rows = dy.rows;
  p.h = h.data();
  p.h_rows = h.rows;
  p.weight = weight.data();
  p.weight_f32 = weight.f32;
  p.rstd = (packed ? rstd_ : rstd).data();
  p.rows = h.count();
  p.hidden = h.hidden();
  Tensor dx = device.empty(h.sizes, h.dim, dtype);
  Tensor dweight = device.empty(&p.hidden, 1, weight.f32 ? kF32 : dtype);
  p.dx = dx.data();
  p.dweight = dweight.data();
  device.run(p);
  stack[0] = dx.release();
  stack[1] = dweight.release();
}

// The ops, on the dispatcher's stack: arguments are taken from it, results put on it.

template <bool cuda, bool want_rstd>
void rmsnorm(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = argument(stack[0]), weight = argument(stack[1]);
  const double eps = torch::stable::detail::to<double>(stack[2]);
  Outputs out = forward<cuda>(Device<cuda>(x, weight), x, nullptr, weight, eps, want_rstd);
  stack[0] = out.y.release();
  if (want_rstd) stack[1] = out.rstd.release();
}

template <bool cuda, bool want_rstd>
void add_rmsnorm(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = argument(stack[0]), residual = argument(stack[1]), weight = argument(stack[2]);
  const double eps = torch::stable::detail::to<double>(stack[3]);
  Outputs out = forward<cuda>(Device<cuda>(x, residual, weight), x, &residual, weight, eps, want_rstd);
  stack[0] = out.y.release();
  stack[1] = out.sum.release();
  if (want_rstd) stack[2] = out.rstd.release();
}

template <bool cuda>
void rmsnorm_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor dy = argument(stack[0]), x = argument(stack[1]), weight = argument(stack[2]), rstd = argument(stack[3]);
  backward<cuda>(stack, Device<cuda>(x, dy, weight, rstd), dy, nullptr, x, weight, rstd);
}

template <bool cuda>
void add_rmsnorm_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor dy = argument(stack[0]), dsum = argument(stack[1]), sum = argument(stack[2]),
               weight = argument(stack[3]), rstd = argument(stack[4]);
  backward<cuda>(stack, Device<cuda>(sum, dy, dsum, weight, rstd), dy, &dsum, sum, weight, rstd);
}

template <bool cuda>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("rmsnorm", rmsnorm<cuda, true>);
  m.impl("rmsnorm_inference", rmsnorm<cuda, false>);
  m.impl("rmsnorm_backward", rmsnorm_backward<cuda>);
  m.impl("add_rmsnorm", add_rmsnorm<cuda, true>);
  m.impl("add_rmsnorm_inference", add_rmsnorm<cuda, false>);
  m.impl("add_rmsnorm_backward", add_rmsnorm_backward<cuda>);
}

}  // namespace
}  // namespace tinylm

STABLE_TORCH_LIBRARY(tinylm, m) {
  m.def("rmsnorm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rmsnorm_inference(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rmsnorm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
  m.def("add_rmsnorm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def("add_rmsnorm_inference(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)");
  m.def(
      "add_rmsnorm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor rstd)"
      " -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(tinylm, CPU, m) { tinylm::implement<false>(m); }

#ifdef TINYLM_CUDA
STABLE_TORCH_LIBRARY_IMPL(tinylm, CUDA, m) { tinylm::implement<true>(m); }
#endif
