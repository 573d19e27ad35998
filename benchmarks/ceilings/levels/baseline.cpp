// What every processor of the family has: on x86-64 SSE2, where a multiply-add is two instructions.
#include "ceilings/level.h"
#include "ceilings/vector_loops.h"

namespace flash_attn::ceilings {

const Level baseline = {"baseline", Floats<16>::multiply_add<12>, Floats<16>::read};

}  // namespace flash_attn::ceilings
