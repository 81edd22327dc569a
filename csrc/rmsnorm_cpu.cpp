// RMSNorm on the CPU. One task is some rows; each row is read twice, the second time from the cache.
//
// A row's sums are taken in an order that hidden and dtype fix, whatever the threads, the rows around it, the
// instruction set or the alignment: element i goes to lane i mod 64; a lane adds up 8 terms in fp32, lane l then takes
// in lanes l + 32 and l + 16, and the 16 that remain are added to sums in fp64. (For fp64 everything is in fp64.)
// Vectors are the compiler's, 64, 32 or 16 bytes wide, and no product is contracted with a sum, so that each width
// computes the same bits.
//
// Errors, in u = 2^-24: a sum of squares is off by 10 u (a square, 7 additions in a lane, 2 between lanes), rstd by
// 10 / 2 + 1 = 6 u, and an fp32 y = (h * rstd) * weight by 8 u of itself. (Second-order terms left out; fp64: the same
// in its u, and what its blocks add up.)
//
// dweight: the rows are cut into chunks of at most 64, each with a row of fp32 sums; a chunk takes groups of 1 to 8
// rows, adds up a group's terms one by one, and adds that to its sums. The chunks are added in fp64, in order. A term
// dy * (h * rstd) passes at most 7 + 8 additions (8 rows a group) to 0 + 64 (1 row a group), so that dweight is off by
// at most (64 + 3) u of the sum of the terms' sizes with the rstd that was given, 6 u more with the true one, and a
// rounding to the weight's dtype: c = 73, or c = 15 + 3 + 6 = 24 for a hidden up to 4096.
#include "rmsnorm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

// torch's own threads, because a library linked with OpenMP brings a second runtime beside torch's, whose threads
// compete with those for the cores; this one also heeds torch.set_num_threads and is there where OpenMP is not.
#include <torch/csrc/stable/c/shim.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions alone

#define TINYLM_INLINE inline __attribute__((always_inline))

namespace tinylm {
namespace {

constexpr int kLanes = 64, kDepth = 8, kFold = 16;
constexpr int64_t kChunkRows = 64, kChunks = 16, kGroupRows = 8;
// Below this many elements a second thread costs more than it brings (at::parallel_for's own grain).
constexpr int64_t kGrain = 32768;

// A vector of `Bytes`, of compute type C: float, or double for fp64.
template <class C, int Bytes>
struct Simd {
  static constexpr int width = Bytes / sizeof(C);
  typedef C V __attribute__((vector_size(Bytes)));
  typedef uint32_t U32 __attribute__((vector_size(width * 4)));
  typedef int32_t I32 __attribute__((vector_size(width * 4)));
  typedef uint16_t U16 __attribute__((vector_size(width * 2)));
  typedef float F32 __attribute__((vector_size(width * 4)));
};

template <class To, class From>
TINYLM_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
TINYLM_INLINE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Stored types: how S::width of them become a vector and, rounded to nearest even, come back.
struct F32 {
  float value;
  using Compute = float;
  template <class S>
  static TINYLM_INLINE typename S::V load(const F32* p) {
    return __builtin_convertvector(read<typename S::F32>(p), typename S::V);
  }
  template <class S>
  static TINYLM_INLINE void store(F32* p, const typename S::V& v) {
    const auto narrow = __builtin_convertvector(v, typename S::F32);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
};

struct F64 {
  double value;
  using Compute = double;
  template <class S>
  static TINYLM_INLINE typename S::V load(const F64* p) {
    return read<typename S::V>(p);
  }
  template <class S>
  static TINYLM_INLINE void store(F64* p, const typename S::V& v) {
    std::memcpy(p, &v, sizeof(v));
  }
};

struct BF16 {
  uint16_t value;
  using Compute = float;
  template <class S>
  static TINYLM_INLINE typename S::V load(const BF16* p) {
    const auto wide = __builtin_convertvector(read<typename S::U16>(p), typename S::U32) << 16;
    return bits<typename S::V>(wide);
  }
  template <class S>
  static TINYLM_INLINE void store(BF16* p, const typename S::V& v) {
    const auto u = bits<typename S::U32>(v);
    const auto rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const auto nan = bits<typename S::U32>(v != v);  // all ones where NaN, which adding could turn into inf
    const auto narrow = __builtin_convertvector((rounded & ~nan) | (((u >> 16) | 0x40) & nan), typename S::U16);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
};

struct F16 {
  uint16_t value;
  using Compute = float;
  template <class S>
  static TINYLM_INLINE typename S::V load(const F16* p) {
    using U = typename S::U32;
    const U h = __builtin_convertvector(read<typename S::U16>(p), U);
    const U magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
    // The exponents' biases differ by 112, and scaling by a power of two is exact, for subnormals too.
    const U finite = bits<U>(bits<typename S::V>(magnitude) * 0x1p112f);
    const U special = bits<U>(magnitude >= (0x7c00u << 13));  // inf and NaN
    return bits<typename S::V>((finite & ~special) | ((magnitude | 0x7f800000u) & special) | sign);
  }
  template <class S>
  static TINYLM_INLINE void store(F16* p, const typename S::V& v) {
    using U = typename S::U32;
    const U u = bits<U>(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    const U odd = (magnitude >> 13) & 1;
    const U normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
    // The sum's last bit is fp16's smallest subnormal: the addition rounds, and leaves the digits at the end.
    const U small = bits<U>(bits<typename S::V>(magnitude) + 0.5f) - 0x3f000000u;
    const U is_small = bits<U>(magnitude < (113u << 23)), is_big = bits<U>(magnitude >= (143u << 23));
    const U is_nan = bits<U>(magnitude > 0x7f800000u);
    const U big = 0x7c00u | (is_nan & (0x200u | ((magnitude >> 13) & 0x3ff)));
    const U narrow = (small & is_small) | (big & is_big) | (normal & ~is_small & ~is_big) | sign;
    const auto stored = __builtin_convertvector(narrow, typename S::U16);
    std::memcpy(p, &stored, sizeof(stored));
  }
};

// 64 elements to read at p, of which `left` are there: p itself, or a copy with zeros after the row's end.
template <class T>
TINYLM_INLINE const T* whole(const T* p, int64_t left, T* pad) {
  if (left >= kLanes) return p;
  std::memset(static_cast<void*>(pad), 0, kLanes * sizeof(T));
  std::memcpy(static_cast<void*>(pad), p, left * sizeof(T));
  return pad;
}

// A row's sums, as the head of this file tells.
template <class S>
struct Sum {
  typename S::V lanes[kLanes / S::width];
  double total[kFold] = {};

  TINYLM_INLINE void clear() {
    for (auto& lane : lanes) lane = typename S::V{};
  }
  TINYLM_INLINE void fold() {
    for (int half = kLanes / S::width / 2; half * S::width >= kFold; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    for (int k = 0; k < kFold / S::width; ++k)
      for (int i = 0; i < S::width; ++i) total[k * S::width + i] += lanes[k][i];
  }
  TINYLM_INLINE double value() {
    for (int half = kFold / 2; half; half /= 2)
      for (int l = 0; l < half; ++l) total[l] += total[l + half];
    return total[0];
  }
};

inline int64_t offset(const Rows& rows, int64_t row) {
  if (rows.dims == 1) return row * rows.stride[0];
  int64_t at = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    at += row % rows.size[d] * rows.stride[d];
    row /= rows.size[d];
  }
  return at + row * rows.stride[0];
}

template <class C>
inline C rstd_of(double total, int64_t hidden, double eps) {
  // As in the fp32 specification: a sum that fp32 cannot hold is inf, and eps is what fp32 makes of it.
  const C narrow = static_cast<C>(total);
  const double mean = std::isinf(narrow) ? narrow : total / static_cast<double>(hidden);
  return static_cast<C>(1.0 / std::sqrt(mean + static_cast<double>(static_cast<C>(eps))));
}

template <class T, class W, int Bytes>
TINYLM_INLINE void forward(const RmsNorm& p, int64_t begin, int64_t end) {
  using C = typename T::Compute;
  using S = Simd<C, Bytes>;
  constexpr int width = S::width, vectors = kLanes / width;
  const int64_t hidden = p.hidden;
  const W* weight = static_cast<const W*>(p.weight);
  T pad[kLanes], pad2[kLanes];
  W weight_pad[kLanes];

  for (int64_t row = begin; row < end; ++row) {
    const T* h = static_cast<const T*>(p.x) + offset(p.x_rows, row);
    if (p.residual) {
      const T* residual = static_cast<const T*>(p.residual) + offset(p.residual_rows, row);
      T* sum = static_cast<T*>(p.sum) + row * hidden;
      for (int64_t i = 0; i < hidden; i += kLanes) {
        const T *a = whole(h + i, hidden - i, pad), *b = whole(residual + i, hidden - i, pad2);
        T* out = hidden - i < kLanes ? pad : sum + i;
        for (int k = 0; k < kLanes; k += width)
          T::template store<S>(out + k, T::template load<S>(a + k) + T::template load<S>(b + k));
        if (out == pad) std::memcpy(static_cast<void*>(sum + i), pad, (hidden - i) * sizeof(T));
      }
      h = sum;
    }

    Sum<S> squares;
    for (int64_t block = 0; block < hidden; block += kLanes * kDepth) {
      squares.clear();
      for (int64_t i = block; i < std::min(hidden, block + kLanes * kDepth); i += kLanes) {
        const T* a = whole(h + i, hidden - i, pad);
        for (int k = 0; k < vectors; ++k) {
          const auto v = T::template load<S>(a + k * width);
          squares.lanes[k] += v * v;
        }
      }
      squares.fold();
    }
    const C rstd = rstd_of<C>(squares.value(), hidden, p.eps);
    if (p.rstd) static_cast<C*>(p.rstd)[row] = rstd;

    T* y = static_cast<T*>(p.y) + row * hidden;
    for (int64_t i = 0; i < hidden; i += kLanes) {
      const T* a = whole(h + i, hidden - i, pad);
      const W* w = whole(weight + i, hidden - i, weight_pad);
      T* out = hidden - i < kLanes ? pad : y + i;
      for (int k = 0; k < kLanes; k += width)
        T::template store<S>(out + k, (T::template load<S>(a + k) * rstd) * W::template load<S>(w + k));
      if (out == pad) std::memcpy(static_cast<void*>(y + i), pad, (hidden - i) * sizeof(T));
    }
  }
}

// How the rows are cut for dweight: by rows and hidden alone.
struct Cut {
  int64_t group, chunk, chunks;
  Cut(int64_t rows, int64_t hidden) {
    // Between the two times that a group's rows are read they should stay in the cache: 2 tensors, 256 KiB in fp32.
    group = kGroupRows;
    while (group > 1 && group * hidden > kGroupRows * 4096) group /= 2;
    const int64_t even = (rows + kChunks - 1) / kChunks;
    chunk = std::min(kChunkRows, (even + group - 1) / group * group);
    chunks = chunk ? (rows + chunk - 1) / chunk : 0;
  }
};

template <class T, class W, int Bytes>
TINYLM_INLINE void backward(const RmsNormGrad& p, const Cut& cut, void* partials, int64_t begin, int64_t end) {
  using C = typename T::Compute;
  using S = Simd<C, Bytes>;
  constexpr int width = S::width, vectors = kLanes / width;
  const int64_t hidden = p.hidden;
  const W* weight = static_cast<const W*>(p.weight);
  const C* rstds = static_cast<const C*>(p.rstd);
  T pad[kLanes], pad2[kLanes], pad3[kLanes];
  W weight_pad[kLanes];

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    C* sums = static_cast<C*>(partials) + chunk * hidden;
    const int64_t last = std::min(p.rows, (chunk + 1) * cut.chunk);
    for (int64_t first = chunk * cut.chunk; first < last; first += cut.group) {
      const int64_t rows = std::min(cut.group, last - first);
      const T *dys[kGroupRows], *hs[kGroupRows], *dsums[kGroupRows];
      C means[kGroupRows];
      for (int64_t r = 0; r < rows; ++r) {
        const T* dy = dys[r] = static_cast<const T*>(p.dy) + offset(p.dy_rows, first + r);
        const T* h = hs[r] = static_cast<const T*>(p.h) + offset(p.h_rows, first + r);
        dsums[r] = p.dsum ? static_cast<const T*>(p.dsum) + offset(p.dsum_rows, first + r) : nullptr;
        const C rstd = rstds[first + r];
        Sum<S> dots;
        for (int64_t block = 0; block < hidden; block += kLanes * kDepth) {
          dots.clear();
          for (int64_t i = block; i < std::min(hidden, block + kLanes * kDepth); i += kLanes) {
            const T *a = whole(h + i, hidden - i, pad), *b = whole(dy + i, hidden - i, pad2);
            const W* w = whole(weight + i, hidden - i, weight_pad);
            for (int k = 0; k < vectors; ++k)
              dots.lanes[k] += (T::template load<S>(b + k * width) * W::template load<S>(w + k * width)) *
                               (T::template load<S>(a + k * width) * rstd);
          }
          dots.fold();
        }
        means[r] = static_cast<C>(dots.value() / static_cast<double>(hidden));
      }

      for (int64_t i = 0; i < hidden; i += kLanes) {
        const bool tail = hidden - i < kLanes;
        const W* w = whole(weight + i, hidden - i, weight_pad);
        typename S::V sum[vectors];
        for (auto& s : sum) s = typename S::V{};
        for (int64_t r = 0; r < rows; ++r) {
          const T *a = whole(hs[r] + i, hidden - i, pad), *b = whole(dys[r] + i, hidden - i, pad2);
          const T* d = dsums[r] ? whole(dsums[r] + i, hidden - i, pad3) : nullptr;
          const C rstd = rstds[first + r], mean = means[r];
          T* dx = static_cast<T*>(p.dx) + (first + r) * hidden + i;
          T* out = tail ? pad : dx;
          for (int k = 0; k < vectors; ++k) {
            const auto normed = T::template load<S>(a + k * width) * rstd;
            const auto dy = T::template load<S>(b + k * width);
            auto dh = (dy * W::template load<S>(w + k * width) - normed * mean) * rstd;
            if (d) dh += T::template load<S>(d + k * width);
            sum[k] += dy * normed;
            T::template store<S>(out + k * width, dh);
          }
          if (tail) std::memcpy(static_cast<void*>(dx), pad, (hidden - i) * sizeof(T));
        }
        C edge[kLanes];
        C* out = tail ? edge : sums + i;
        const bool fresh = first == chunk * cut.chunk;
        if (tail && !fresh) std::memcpy(edge, sums + i, (hidden - i) * sizeof(C));
        for (int k = 0; k < vectors; ++k) {
          const auto s = fresh ? sum[k] : read<typename S::V>(out + k * width) + sum[k];
          std::memcpy(out + k * width, &s, sizeof(s));
        }
        if (tail) std::memcpy(sums + i, edge, (hidden - i) * sizeof(C));
      }
    }
  }
}

// Adds the chunks up, for blocks [begin, end) of 64 columns.
template <class T, class W, int Bytes>
TINYLM_INLINE void add_chunks(const RmsNormGrad& p, const Cut& cut, void* partials, int64_t begin, int64_t end) {
  using C = typename T::Compute;
  using S = Simd<C, Bytes>;
  for (int64_t i = begin * kLanes; i < std::min(p.hidden, end * kLanes); i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, p.hidden - i);
    double total[kLanes] = {};
    for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
      const C* sums = static_cast<const C*>(partials) + chunk * p.hidden + i;
      if (count == kLanes)
        for (int l = 0; l < kLanes; ++l) total[l] += sums[l];
      else
        for (int l = 0; l < count; ++l) total[l] += sums[l];
    }
    C narrow[kLanes];
    for (int l = 0; l < kLanes; ++l) narrow[l] = static_cast<C>(total[l]);
    W rounded[kLanes];
    for (int k = 0; k < kLanes; k += S::width) W::template store<S>(rounded + k, read<typename S::V>(narrow + k));
    std::memcpy(static_cast<void*>(static_cast<W*>(p.dweight) + i), rounded, count * sizeof(W));
  }
}

// What runs over a range of rows, chunks or blocks of columns, for one pair of dtypes and one width of vectors.
struct Kernels {
  void (*forward)(const RmsNorm&, int64_t, int64_t);
  void (*backward)(const RmsNormGrad&, const Cut&, void*, int64_t, int64_t);
  void (*add_chunks)(const RmsNormGrad&, const Cut&, void*, int64_t, int64_t);
};

#define TINYLM_KERNELS(Name, Bytes, Target)                                                              \
  template <class T, class W>                                                                            \
  struct Name {                                                                                          \
    Target static void f(const RmsNorm& p, int64_t begin, int64_t end) { forward<T, W, Bytes>(p, begin, end); } \
    Target static void b(const RmsNormGrad& p, const Cut& cut, void* s, int64_t begin, int64_t end) {    \
      backward<T, W, Bytes>(p, cut, s, begin, end);                                                      \
    }                                                                                                    \
    Target static void a(const RmsNormGrad& p, const Cut& cut, void* s, int64_t begin, int64_t end) {    \
      add_chunks<T, W, Bytes>(p, cut, s, begin, end);                                                    \
    }                                                                                                    \
    static constexpr Kernels kernels = {f, b, a};                                                        \
  };

TINYLM_KERNELS(Narrow, 16, )
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TINYLM_X86 1
TINYLM_KERNELS(Avx2, 32, __attribute__((target("avx2"))))
TINYLM_KERNELS(Avx512, 64, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

template <template <class, class> class Isa>
const Kernels& kernels_of(Dtype dtype, bool weight_f32) {
  switch (dtype) {
    case Dtype::f16: return weight_f32 ? Isa<F16, F32>::kernels : Isa<F16, F16>::kernels;
    case Dtype::bf16: return weight_f32 ? Isa<BF16, F32>::kernels : Isa<BF16, BF16>::kernels;
    case Dtype::f64: return weight_f32 ? Isa<F64, F32>::kernels : Isa<F64, F64>::kernels;
    default: return Isa<F32, F32>::kernels;
  }
}

const Kernels& kernels_for(Dtype dtype, bool weight_f32) {
#ifdef TINYLM_X86
#ifndef TINYLM_VECTOR_BYTES
#define TINYLM_VECTOR_BYTES 64  // smaller: for a test that each width computes the same bits
#endif
  static const int widest = [] {
    __builtin_cpu_init();
    if (TINYLM_VECTOR_BYTES >= 64 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return 64;
    return TINYLM_VECTOR_BYTES >= 32 && __builtin_cpu_supports("avx2") ? 32 : 16;
  }();
  if (widest == 64) return kernels_of<Avx512>(dtype, weight_f32);
  if (widest == 32) return kernels_of<Avx2>(dtype, weight_f32);
#endif
  return kernels_of<Narrow>(dtype, weight_f32);
}

// f(begin, end) over [0, count) on torch's threads, at least `grain` at a time.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count) f(0, count);
    return;
  }
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  torch_parallel_for(0, count, grain, call, const_cast<void*>(static_cast<const void*>(&f)));
}

int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)); }

}  // namespace

void rmsnorm_cpu(const RmsNorm& p) {
  const auto run = kernels_for(p.dtype, p.weight_f32).forward;
  parallel(p.rows, grain_of(p.hidden), [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

void rmsnorm_grad_cpu(const RmsNormGrad& p) {
  const Kernels& kernels = kernels_for(p.dtype, p.weight_f32);
  const Cut cut(p.rows, p.hidden);
  const size_t bytes = p.dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
  const std::unique_ptr<char[]> partials(new char[cut.chunks * p.hidden * bytes]);
  parallel(cut.chunks, grain_of(cut.chunk * p.hidden),
           [&](int64_t begin, int64_t end) { kernels.backward(p, cut, partials.get(), begin, end); });
  parallel((p.hidden + kLanes - 1) / kLanes, grain_of(cut.chunks * kLanes),
           [&](int64_t begin, int64_t end) { kernels.add_chunks(p, cut, partials.get(), begin, end); });
}

}  // namespace tinylm
