// AVX-512 F, BW, DQ, VL.
#define FA_LEVEL avx512
#define FA_VECTOR_BYTES 64
#define FA_VECTOR_REGISTERS 32

#include "cpu/level.h"
