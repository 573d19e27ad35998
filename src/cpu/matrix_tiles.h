// Intel's matrix unit (AMX): tiles of 16 x 16 words, two of which it multiplies into a third. bfloat16 pairs in, float32 out.
//
// Built without the unit, the same tiles are multiplied by vectors, so that all around them is tested on any machine.
#pragma once

#include "cpu/operand.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int matrix_tile = 16;  // words a side
constexpr int matrix_registers = 8;

// An operand in memory: [terms][rows][stride], see MatrixOperand.
struct TermRows {
  const float* first;
  std::int64_t stride;  // floats from row to row
  std::int64_t term;    // and from term to term

  const float* at(int of_term, std::int64_t row, std::int64_t word) const {
    return first + of_term * term + row * stride + word;
  }
};

// Tiles of A in a product with a panel, three tiles of B: as many as leave registers for what stays from term to term.
template <int terms>
constexpr int tiles_of_left = terms == 1 ? 2 : 1;

#if FA_MATRIX_TILES && defined(__AVX512BF16__)

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
    for (int tile = 0; tile < matrix_registers; ++tile) {
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

// C [M tiles][N tiles] += A [M tiles][depth tiles] B [depth tiles][N tiles], or = where C is not to be read; its stride in
// floats. After each N products comes a step of what goes on beside.
template <int terms, int M, int N, class Beside = NothingBeside>
FA_INLINE void multiply_tiles(bool add, float* c, std::int64_t c_stride, const TermRows& a, const TermRows& b, int depth,
                              Beside&& beside = {}) {
  // Tiles of A and of B stay in registers from term to term, or each takes the place of the last.
  constexpr bool stay = M * N + M + N <= matrix_registers;
  constexpr int a_tile = M * N;
  constexpr int b_tile = a_tile + 1 + stay * (M - 1);
  static_assert(b_tile < matrix_registers && (stay || terms == 1));
  const auto c_at = [&](int m, int n) { return c + m * matrix_tile * c_stride + n * matrix_tile; };
  unroll<M * N>([&](auto i) FA_INLINE_IF_FAST {
    if (add) {
      load_tile<i>(c_at(i / N, i % N), c_stride);
    } else {
      clear_tile<i>();
    }
  });
  for (int k = 0; k < depth * matrix_tile; k += matrix_tile) {
    visit_terms<terms>([&](auto i, auto j, auto changes_a, auto changes_b) FA_INLINE_IF_FAST {
      unroll<M>([&](auto m) FA_INLINE_IF_FAST {
        constexpr int of_a = stay ? a_tile + m : a_tile;
        if constexpr (changes_a) load_tile<of_a>(a.at(i, m * matrix_tile, k), a.stride);
        unroll<N>([&](auto n) FA_INLINE_IF_FAST {
          constexpr int of_b = stay ? b_tile + n : b_tile;
          constexpr bool is_new = decltype(changes_b){} && (!stay || decltype(m){} == 0);
          if constexpr (is_new) load_tile<of_b>(b.at(j, k, n * matrix_tile), b.stride);
          multiply_add_tiles<decltype(m){} * N + n, of_a, of_b>();
        });
        beside.step();
      });
    });
  }
  unroll<M * N>([&](auto i) FA_INLINE_IF_FAST { store_tile<i>(c_at(i / N, i % N), c_stride); });
}

#else

struct MatrixUnit {};

template <int terms, int M, int N, class Beside = NothingBeside>
inline void multiply_tiles(bool add, float* c, std::int64_t c_stride, const TermRows& a, const TermRows& b, int depth,
                           Beside&& = {}) {
  for (int row = 0; row < M * matrix_tile; ++row) {
    for (int column = 0; column < N * matrix_tile; column += lanes) {
      float* destination = c + row * c_stride + column;
      Vec sum = add ? load(destination) : Vec{};
      // A pair of terms after the other: the unit rounds less often than a sum that is large from the beginning.
      visit_terms<terms>([&](int i, int j, auto, auto) {
        for (int k = 0; k < depth * matrix_tile; ++k) {
          sum = Bfloat16Operand::multiply_add(sum, splat(*a.at(i, row, k)), load(b.at(j, k, column)));
        }
      });
      store(destination, sum);
    }
  }
}

#endif

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
