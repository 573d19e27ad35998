// AVX-512 BF16: dot products of bfloat16 pairs into float32.
#include <immintrin.h>

#include "ceilings/level.h"
#include "ceilings/vector_loops.h"

namespace flash_attn::ceilings {
namespace {

double multiply_add(std::int64_t steps) {
  constexpr int accumulators = 24;
  constexpr int products = 32;  // of one instruction
  using Vec = Floats<64>::Vec;
  Vec bits = Vec{} + 1.0f;
  Floats<64>::launder(bits);
  const auto factor = (__m512bh)bits;
  Vec acc[accumulators];
  for (Vec& a : acc) {
    a = Vec{};
    Floats<64>::launder(a);
  }
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < accumulators; ++i) acc[i] = (Vec)_mm512_dpbf16_ps((__m512)acc[i], factor, factor);
  }
  for (Vec& a : acc) Floats<64>::launder(a);
  return 2.0 * products * accumulators * static_cast<double>(steps);
}

}  // namespace

const Level avx512_bf16 = {"avx512_bf16", multiply_add, nullptr};

}  // namespace flash_attn::ceilings
