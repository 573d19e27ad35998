// AVX2 and FMA.
#include "ceilings/level.h"
#include "ceilings/vector_loops.h"

namespace flash_attn::ceilings {

const Level avx2 = {"avx2", Floats<32>::multiply_add<12>, Floats<32>::read};

}  // namespace flash_attn::ceilings
