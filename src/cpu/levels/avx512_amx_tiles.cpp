// The tile shapes of avx512_amx, its matrix tiles too, in baseline instructions.
#define FA_LEVEL avx512_amx_tiles
#define FA_VECTOR_BYTES 64
#define FA_VECTOR_REGISTERS 32
#define FA_MATRIX_TILES 1
#define FA_CODE_DOT 1
#define FA_TILES_FOR_FEW 1

#include "cpu/level.h"
