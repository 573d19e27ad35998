// The few words that let one source serve g++, clang, nvcc and the Metal compiler.
//
// Everything in src/semantics takes values and returns values: no pointers, no std::, no exceptions.
#pragma once

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
#define FA_FN METAL_FUNC
#define FA_CONSTANT constant constexpr
namespace flash_attn {
using int32 = int;
using uint32 = uint;
// The words that a rule needs from a backend; a backend with vectors brings its own struct of them.
struct ScalarWords {
  static uint32 mul_hi(uint32 a, uint32 b) { return metal::mulhi(a, b); }
  static float tanh(float x) { return metal::precise::tanh(x); }
  static float abs(float x) { return metal::abs(x); }
  static float round(float x) { return metal::rint(x); }  // to nearest, ties to even
};
}  // namespace flash_attn
#else
#include <cmath>
#include <cstdint>
#if defined(__CUDACC__)
#define FA_FN static inline __host__ __device__
#else
// `static`, not just `inline`: a weak symbol compiled for AVX-512 must never be the one the linker keeps.
#define FA_FN [[maybe_unused]] static inline
#endif
#define FA_CONSTANT constexpr
namespace flash_attn {
using int32 = std::int32_t;
using uint32 = std::uint32_t;
// The words that a rule needs from a backend; a backend with vectors brings its own struct of them.
struct ScalarWords {
  FA_FN uint32 mul_hi(uint32 a, uint32 b) { return static_cast<uint32>((static_cast<std::uint64_t>(a) * b) >> 32); }
  FA_FN float tanh(float x) { return ::tanhf(x); }
  FA_FN float abs(float x) { return x < 0.0f ? -x : x; }
  FA_FN float round(float x) { return ::rintf(x); }  // to nearest, ties to even
};
}  // namespace flash_attn
#endif

namespace flash_attn {
FA_FN int32 min_of(int32 a, int32 b) { return a < b ? a : b; }
FA_FN int32 max_of(int32 a, int32 b) { return a > b ? a : b; }
FA_FN int32 clamp_to(int32 x, int32 low, int32 high) { return max_of(low, min_of(x, high)); }
}  // namespace flash_attn
