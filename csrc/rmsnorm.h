// What the kernels of RMSNorm take: plain pointers, sizes and strides; no torch. The binding checks everything before.
//
//   h = x + residual (rounded to its dtype) or x;  rstd = 1 / sqrt(mean(h^2) + eps);  y = h * rstd * weight
//   dh = rstd * (weight * dy - h * rstd^2 * mean(weight * dy * h)) + dsum;  dweight = sum over rows of dy * h * rstd
#pragma once

#include <cstdint>

namespace tinylm {

enum class Dtype : int32_t { f32, f16, bf16, f64 };  // f64 on the CPU alone

// Where the rows of a tensor start: row r = (i0, i1, ...) in mixed radix, the last index fastest, starts at
// sum(i_k * stride_k) elements. Dims are merged where they can be, so most tensors have one. A row is contiguous.
constexpr int kLeadDims = 6;
struct Rows {
  int32_t dims = 1;
  int64_t size[kLeadDims] = {};
  int64_t stride[kLeadDims] = {};  // in elements
};

// Outputs are contiguous; x, residual and dy have the dtype; rstd is fp32 [rows] (fp64 for f64).
struct RmsNorm {
  const void* x;
  Rows x_rows;
  const void* residual;  // null: none
  Rows residual_rows;
  const void* weight;  // [hidden], contiguous
  void* y;
  void* sum;   // h, where there is a residual
  void* rstd;  // null: not wanted
  int64_t rows, hidden;
  double eps;
  Dtype dtype;
  bool weight_f32;  // else in the dtype
};

struct RmsNormGrad {
  const void* dy;
  Rows dy_rows;
  const void* h;  // what was normed
  Rows h_rows;
  const void* dsum;  // gradient of h from elsewhere; null: none
  Rows dsum_rows;
  const void* weight;
  const void* rstd;
  void* dx;
  void* dweight;  // [hidden], in the weight's dtype
  float* partials;  // [rmsnorm_partials(...), hidden], on the GPU alone
  int64_t rows, hidden;
  Dtype dtype;
  bool weight_f32;
};

void rmsnorm_cpu(const RmsNorm&);
void rmsnorm_grad_cpu(const RmsNormGrad&);

// On the current device, on the stream (a cudaStream_t); null, or CUDA's message. Never synchronize. No rows: nothing
// is launched for y and dx, and dweight is set to zero.
const char* rmsnorm_cuda(const RmsNorm&, void* stream);
const char* rmsnorm_grad_cuda(const RmsNormGrad&, void* stream);
// Rows of fp32 scratch that the gradient needs on the current device, given all of it but `partials`.
const char* rmsnorm_partials(const RmsNormGrad&, int64_t* count);

}  // namespace tinylm
