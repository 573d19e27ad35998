// Intel's matrix unit (AMX): a tile of 16 x 32 bfloat16 times one of 32 x 16 into 16 x 16 float32.
#include <cstdint>

#include "ceilings/level.h"

namespace flash_attn::ceilings {
namespace {

struct alignas(64) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

/// Four accumulators, tmm0 to tmm3, of two tiles on the left and two on the right.
double multiply_add(std::int64_t steps) {
  constexpr int side = 16;
  constexpr int multiplications = 4;
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = side * sizeof(float);
    shapes.rows[tile] = side;
  }
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  asm volatile(
      "tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3\n"
      "tilezero %tmm4\n tilezero %tmm5\n tilezero %tmm6\n tilezero %tmm7");
  const std::int64_t rounds = steps / side;  // such a multiplication keeps the unit busy for as many cycles
  for (std::int64_t round = 0; round < rounds; ++round) {
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n tdpbf16ps %tmm7, %tmm4, %tmm1\n"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n tdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  asm volatile("tilerelease");
  return 2.0 * side * side * (2 * side) * multiplications * static_cast<double>(rounds);
}

}  // namespace

const Level avx512_amx = {"avx512_amx", multiply_add, nullptr};

}  // namespace flash_attn::ceilings
