// The tile shapes of avx2 in baseline instructions: the compiler splits the vectors.
#define FA_LEVEL avx2_tiles
#define FA_VECTOR_BYTES 32
#define FA_VECTOR_REGISTERS 16

#include "cpu/level.h"
