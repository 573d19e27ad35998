// AVX-512.
#include "ceilings/level.h"
#include "ceilings/vector_loops.h"

namespace flash_attn::ceilings {

const Level avx512 = {"avx512", Floats<64>::multiply_add<24>, Floats<64>::read};

}  // namespace flash_attn::ceilings
