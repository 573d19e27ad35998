// Intel's matrix unit (AMX): tiles of 16 x 16 words, two of which it multiplies into a third. bfloat16 pairs in, float32 out.
//
// Built without the unit, the same tiles are multiplied by vectors, so that all around them is tested on any machine.
#pragma once

#include "cpu/operand.h"

#if !defined(FA_BFLOAT16_TILES)  // 1: the level has forward multiply bfloat16 in matrix tiles
#define FA_BFLOAT16_TILES 0
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int matrix_tile = 16;  // words a side

#if FA_BFLOAT16_TILES && defined(__AVX512BF16__)

// The unit's registers, all of the full size, for as long as this lives.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      std::uint8_t palette = 1;
      std::uint8_t start_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = matrix_tile * sizeof(float);
      config.rows[tile] = matrix_tile;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

template <int tile>
FA_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
FA_INLINE void load_tile(const float* p, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride * 4), "i"(tile) : "memory");
}
template <int tile>
FA_INLINE void store_tile(float* p, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride * 4), "i"(tile) : "memory");
}
template <int c, int a, int b>
FA_INLINE void multiply_add_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// C [M tiles][N tiles] += A [M tiles][depth tiles] B [depth tiles][N tiles], or = where C is not to be read. Strides from row
// to row, in floats.
template <int M, int N>
FA_INLINE void multiply_tiles(bool add, float* c, std::int64_t c_stride, const float* a, std::int64_t a_stride, const float* b,
                              std::int64_t b_stride, int depth) {
  static_assert(M * N <= 6);
  constexpr int a_tile = 6;
  constexpr int b_tile = 7;
  const auto c_at = [&](int m, int n) { return c + m * matrix_tile * c_stride + n * matrix_tile; };
  unroll<M * N>([&](auto i) {
    if (add) {
      load_tile<i>(c_at(i / N, i % N), c_stride);
    } else {
      clear_tile<i>();
    }
  });
  for (int k = 0; k < depth; ++k) {
    unroll<M>([&](auto m) {
      load_tile<a_tile>(a + m * matrix_tile * a_stride + k * matrix_tile, a_stride);
      unroll<N>([&](auto n) {
        load_tile<b_tile>(b + k * matrix_tile * b_stride + n * matrix_tile, b_stride);
        multiply_add_tiles<m * N + n, a_tile, b_tile>();
      });
    });
  }
  unroll<M * N>([&](auto i) { store_tile<i>(c_at(i / N, i % N), c_stride); });
}

#else

struct MatrixUnit {};

template <int M, int N>
inline void multiply_tiles(bool add, float* c, std::int64_t c_stride, const float* a, std::int64_t a_stride, const float* b,
                           std::int64_t b_stride, int depth) {
  for (int row = 0; row < M * matrix_tile; ++row) {
    for (int column = 0; column < N * matrix_tile; column += lanes) {
      float* destination = c + row * c_stride + column;
      Vec sum = add ? load(destination) : Vec{};
      for (int k = 0; k < depth * matrix_tile; ++k) {
        sum = Bfloat16Operand::multiply_add(sum, splat(a[row * a_stride + k]), load(b + k * b_stride + column));
      }
      store(destination, sum);
    }
  }
}

#endif

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
