// NEON.
#include "ceilings/level.h"
#include "ceilings/vector_loops.h"

namespace flash_attn::ceilings {

const Level neon = {"neon", Floats<16>::multiply_add<24>, Floats<16>::read};

}  // namespace flash_attn::ceilings
