// The tile shapes of avx512_amx, its matrix tiles too, in baseline instructions.
#define FA_LEVEL avx512_amx_tiles
#define FA_VECTOR_BYTES 64
#define FA_VECTOR_REGISTERS 32
#define FA_BFLOAT16_TILES 1

#include "cpu/level.h"
