// AVX-512 with a matrix unit for bfloat16.
#define FA_LEVEL avx512_amx
#define FA_VECTOR_BYTES 64
#define FA_VECTOR_REGISTERS 32
#define FA_MATRIX_TILES 1

#include "cpu/level.h"
