// The tile shapes of avx512 in baseline instructions: the compiler splits the vectors.
#define FA_LEVEL avx512_tiles
#define FA_VECTOR_BYTES 64
#define FA_VECTOR_REGISTERS 32

#include "cpu/level.h"
