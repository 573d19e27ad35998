// What is measured of one instruction set. Each levels/*.cpp defines one, compiled with that set's flags.
#pragma once

#include <cstdint>

namespace flash_attn::ceilings {

struct Level {
  const char* name;
  // Runs `steps` multiply-adds on every accumulator, from registers only, and returns the operations done, 2 a multiply-add.
  double (*multiply_add)(std::int64_t steps);
  // Reads count floats, a multiple of 4096 bytes aligned to 64, and returns something that depends on all of them; null where
  // a level is there for its multiply-add alone.
  float (*read)(const float* data, std::int64_t count);
};

#if defined(__x86_64__)
extern const Level baseline, avx2, avx512, avx512_bf16, avx512_amx;
#elif defined(__aarch64__)
extern const Level neon;
#else
extern const Level baseline;
#endif

}  // namespace flash_attn::ceilings
