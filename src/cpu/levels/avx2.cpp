// AVX2, FMA and F16C.
#define FA_LEVEL avx2
#define FA_VECTOR_BYTES 32
#define FA_VECTOR_REGISTERS 16

#include "cpu/level.h"
