// The two loops that every float32 level times, over vectors of a given width in the compiler's vector extensions.
#pragma once

#include <cstdint>
#include <cstring>

namespace flash_attn::ceilings {

#if defined(__aarch64__)
#define FA_VECTOR_REGISTER "+w"
#elif defined(__AVX512F__)
#define FA_VECTOR_REGISTER "+v"
#else
#define FA_VECTOR_REGISTER "+x"
#endif

template <int vector_bytes>
struct Floats {
  typedef float Vec __attribute__((vector_size(vector_bytes)));
  static constexpr int lanes = vector_bytes / 4;

  /// Hides a value's origin: a chain whose fixed point the compiler knows would be deleted, and the ceiling read too high.
  static void launder(Vec& value) { asm volatile("" : FA_VECTOR_REGISTER(value)); }

  /// `accumulators` independent chains: enough to cover the latency, few enough for the registers.
  template <int accumulators>
  static double multiply_add(std::int64_t steps) {
    Vec factor = Vec{} + 0.999f;
    Vec term = Vec{} + 0.001f;
    launder(factor);
    launder(term);
    Vec acc[accumulators];
    for (Vec& a : acc) {
      a = Vec{} + 1.0f;
      launder(a);
    }
    for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
      for (int i = 0; i < accumulators; ++i) acc[i] = acc[i] * factor + term;
    }
    for (Vec& a : acc) launder(a);
    return 2.0 * lanes * accumulators * static_cast<double>(steps);
  }

  /// From four stretches at once: up to a fifth faster than from one, whose prefetcher stops at every page's end.
  static float read(const float* data, std::int64_t count) {
    constexpr int stretches = 4;
    constexpr int sums = 8;
    const std::int64_t stretch = count / stretches;
    Vec sum[sums] = {};
    for (std::int64_t i = 0; i < stretch; i += sums * lanes) {
      for (int s = 0; s < stretches; ++s) {
#pragma GCC unroll 8
        for (int v = 0; v < sums; ++v) sum[v] += *reinterpret_cast<const Vec*>(data + s * stretch + i + v * lanes);
      }
    }
    float values[sums * lanes];
    std::memcpy(values, sum, sizeof sum);
    float total = 0.0f;
    for (float value : values) total += value;
    return total;
  }
};

}  // namespace flash_attn::ceilings
