// The vocabulary of the kernels: vectors of one ISA level and the register tile that every matrix product is made of.
//
// A level (src/cpu/levels) says how wide its vectors are and how many registers it has, and includes the kernels; all of it
// lives in that level's own unnamed namespace, so that no function compiled for one level can be linked into another.
#pragma once

#include <cstdint>

#if !defined(FA_LEVEL)  // for tools that read a header alone
#define FA_LEVEL baseline
#define FA_VECTOR_BYTES 16
#define FA_VECTOR_REGISTERS 16
#endif

#if !defined(FA_SOFTMAX_BESIDE)  // 1: the level's processors add and shuffle in units beside their multipliers
#define FA_SOFTMAX_BESIDE 0
#endif

#if !defined(FA_MATRIX_TILES)  // 1: the level multiplies in tiles of a matrix unit, which takes bfloat16
#define FA_MATRIX_TILES 0
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FA_INLINE inline __attribute__((always_inline))

// Of large bodies, for speed alone: builds for tests, which do not need it, would take minutes longer.
#if defined(FA_INLINE_LESS)
#define FA_INLINE_IF_FAST
#else
#define FA_INLINE_IF_FAST __attribute__((always_inline))
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int lanes = FA_VECTOR_BYTES / 4;
constexpr int cache_line = 64;  // bytes

using Vec = float __attribute__((vector_size(FA_VECTOR_BYTES)));
using IVec = std::int32_t __attribute__((vector_size(FA_VECTOR_BYTES)));
using UVec = std::uint32_t __attribute__((vector_size(FA_VECTOR_BYTES)));

// A number as a type.
template <int value>
struct Constant {
  constexpr operator int() const { return value; }
};

// visit(0 as a constant), visit(1 as a constant), ..
template <int count, int first = 0, class Visit>
FA_INLINE void unroll(Visit visit) {
  if constexpr (first < count) {
    visit(Constant<first>{});
    unroll<count, first + 1>(visit);
  }
}

// What goes on beside a product.
struct NothingBeside {
  FA_INLINE void step() {}
};

// Through memcpy: no alignment is promised, whatever the compiler thinks of a vector's alias.
FA_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
FA_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }

// Past the caches where the level can, to a multiple of the value's size: a line that is written as a whole is not read first.
// Other threads may read it after streams_end.
template <class Value>
FA_INLINE void stream(char* p, Value x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(x) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
  if constexpr (sizeof(x) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(x));
#endif
  __builtin_memcpy(p, &x, sizeof(x));
}
FA_INLINE void streams_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// Keeps a pointer in one register: GCC makes one of every place that a loop reads relative to it, and spills them.
FA_INLINE void pin(const float*& p) { asm volatile("" : "+r"(p)); }
// x - 0 and not x + 0, which would be an addition for the sake of -0.
FA_INLINE Vec splat(float x) { return x - Vec{}; }
FA_INLINE IVec splat(std::int32_t x) { return x - IVec{}; }
FA_INLINE UVec splat(std::uint32_t x) { return x - UVec{}; }

FA_INLINE Vec select(IVec mask, Vec yes, Vec no) { return mask ? yes : no; }
FA_INLINE IVec bits_of(Vec x) { return reinterpret_cast<IVec>(x); }
FA_INLINE Vec from_bits(IVec x) { return reinterpret_cast<Vec>(x); }
FA_INLINE Vec to_float(IVec x) { return __builtin_convertvector(x, Vec); }
FA_INLINE IVec is_finite(Vec x) { return (bits_of(x) & 0x7f800000) != 0x7f800000; }
FA_INLINE bool any_of(IVec mask) {
#if defined(__AVX512DQ__) && FA_VECTOR_BYTES == 64
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  std::int32_t any = 0;
  for (int lane = 0; lane < lanes; ++lane) any |= mask[lane];
  return any != 0;
#endif
}
FA_INLINE Vec abs_of(Vec x) { return from_bits(bits_of(x) & 0x7fffffff); }

// a > b ? a : b, so b where either is NaN: write the operand whose NaN must survive second.
FA_INLINE Vec larger_of(Vec a, Vec b) {
#if defined(__AVX512F__) && FA_VECTOR_BYTES == 64
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
FA_INLINE Vec smaller_of(Vec a, Vec b) {
#if defined(__AVX512F__) && FA_VECTOR_BYTES == 64
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// The high half of a 32 x 32 bit product, for Philox.
FA_INLINE UVec mul_hi(UVec a, UVec b) {
#if defined(__AVX2__) && FA_VECTOR_BYTES == 32
  const __m256i even = _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(reinterpret_cast<__m256i>(a), 32),
                                       _mm256_srli_epi64(reinterpret_cast<__m256i>(b), 32));
  return reinterpret_cast<UVec>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#elif defined(__AVX512F__) && FA_VECTOR_BYTES == 64
  const __m512i even = _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(reinterpret_cast<__m512i>(a), 32),
                                       _mm512_srli_epi64(reinterpret_cast<__m512i>(b), 32));
  return reinterpret_cast<UVec>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#else
  using Wide = std::uint64_t __attribute__((vector_size(2 * FA_VECTOR_BYTES)));
  return __builtin_convertvector((__builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide)) >> 32, UVec);
#endif
}

// Lanes of a and b in turn: the first half of each, or the second.
FA_INLINE Vec interleave_low(Vec a, Vec b) {
#if FA_VECTOR_BYTES == 16
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#endif
}
FA_INLINE Vec interleave_high(Vec a, Vec b) {
#if FA_VECTOR_BYTES == 16
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

// Every second lane of a, then of b: the even ones, or the odd ones.
FA_INLINE Vec even_lanes(Vec a, Vec b) {
#if FA_VECTOR_BYTES == 16
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#endif
}
FA_INLINE Vec odd_lanes(Vec a, Vec b) {
#if FA_VECTOR_BYTES == 16
  return __builtin_shufflevector(a, b, 1, 3, 5, 7);
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#endif
}

// The same as interleave inside each 128-bit part, which costs half as much.
template <class V>
FA_INLINE V unpack_low(V a, V b) {
#if FA_VECTOR_BYTES == 16
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
#else
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
#endif
}
template <class V>
FA_INLINE V unpack_high(V a, V b) {
#if FA_VECTOR_BYTES == 16
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#endif
}

// The 128-bit parts of a and b in turn: the first half of each, or the second.
FA_INLINE Vec interleave_parts_low(Vec a, Vec b) {
#if FA_VECTOR_BYTES == 16
  return a;
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
#else
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
#endif
}
FA_INLINE Vec interleave_parts_high(Vec a, Vec b) {
#if FA_VECTOR_BYTES == 16
  return b;
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#endif
}

// The 128-bit parts of a vector.
using Part = float __attribute__((vector_size(16)));
template <int i>
FA_INLINE auto part_of(auto x) {
  return __builtin_shufflevector(x, x, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3);
}

// Those of each vector added: part i of the result belongs to x[i].
template <class V>
FA_INLINE V sums_of_parts(const V (&x)[lanes / 4]) {
#if FA_VECTOR_BYTES == 16
  return x[0];
#elif FA_VECTOR_BYTES == 32
  return __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(x[0], x[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  const auto halves = [](V a, V b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const V a = halves(x[0], x[1]);
  const V b = halves(x[2], x[3]);
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#endif
}

// The 128-bit parts of four vectors [row][part] as [part][row], or of two where a vector has two.
FA_INLINE void transpose_parts([[maybe_unused]] Vec (&rows)[lanes / 4]) {
#if FA_VECTOR_BYTES == 32
  const Vec first = rows[0];
  rows[0] = __builtin_shufflevector(first, rows[1], 0, 1, 2, 3, 8, 9, 10, 11);
  rows[1] = __builtin_shufflevector(first, rows[1], 4, 5, 6, 7, 12, 13, 14, 15);
#elif FA_VECTOR_BYTES == 64
  const auto low = [](Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  };
  const auto high = [](Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const Vec pairs[4] = {low(rows[0], rows[1]), low(rows[2], rows[3]), high(rows[0], rows[1]), high(rows[2], rows[3])};
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    rows[i] = __builtin_shufflevector(pairs[i], pairs[i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    rows[i + 1] = __builtin_shufflevector(pairs[i], pairs[i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#endif
}

// [4][4] of each 128-bit part in place, which costs least.
FA_INLINE void transpose_in_parts(Vec (&rows)[4]) {
  const Vec low[2] = {unpack_low(rows[0], rows[2]), unpack_low(rows[1], rows[3])};
  const Vec high[2] = {unpack_high(rows[0], rows[2]), unpack_high(rows[1], rows[3])};
  rows[0] = unpack_low(low[0], low[1]);
  rows[1] = unpack_high(low[0], low[1]);
  rows[2] = unpack_low(high[0], high[1]);
  rows[3] = unpack_high(high[0], high[1]);
}

// [lanes][lanes] in place: inside parts, then the parts.
FA_INLINE void transpose(Vec (&rows)[lanes]) {
  Vec columns[4][lanes / 4];  // [column of a part][four rows]
#pragma GCC unroll 4
  for (int i = 0; i < lanes / 4; ++i) {
    Vec four[4] = {rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]};
    transpose_in_parts(four);
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) columns[column][i] = four[column];
  }
#pragma GCC unroll 4
  for (int column = 0; column < 4; ++column) {
    transpose_parts(columns[column]);
#pragma GCC unroll 4
    for (int part = 0; part < lanes / 4; ++part) rows[4 * part + column] = columns[column][part];
  }
}

// visit(column, vector) for every column: the elements of `rows` in that column. Reads whole vectors, so rows reach up to
// round_up(columns, lanes).
template <class Visit>
FA_INLINE void visit_columns(const float* const (&rows)[lanes], int columns, Visit visit) {
  for (int column = 0; column < columns; column += lanes) {
    Vec block[lanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < lanes; ++lane) block[lane] = load(rows[lane] + column);
    transpose(block);
    const int count = columns - column < lanes ? columns - column : lanes;
    for (int i = 0; i < count; ++i) visit(column + i, block[i]);
  }
}

// Tile shapes. Scores: `panel_vectors` vectors of query rows by score_keys<N> keys. Products with V, dO, Q, K: dim_vectors
// vectors of head dims by value_rows<N> rows.
constexpr bool many_registers = FA_VECTOR_REGISTERS >= 32;
// P is computed beside products.
constexpr bool softmax_beside = FA_SOFTMAX_BESIDE;
static_assert(!softmax_beside || many_registers, "a register tile would leave no registers");
constexpr int panel_vectors = 3;
constexpr int panel_rows = panel_vectors * lanes;
constexpr int dim_vectors = 2;
constexpr int dim_panel = dim_vectors * lanes;
template <int N>
constexpr int score_keys = many_registers ? 8
                                          : (N == 3   ? 4
                                             : N == 2 ? 6
                                                      : 12);
// Never more than a panel of N vectors has.
template <int N>
constexpr int value_rows = N == 3 ? (many_registers ? 12 : 6) : (many_registers && (lanes > 4 || N == 2) ? 8 : 4);
constexpr int tile_keys = many_registers ? 24 : 12;  // a multiple of every tile's keys: no product runs past a block

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
