// AVX-512 with BF16 dot products.
#define FA_LEVEL avx512_bf16
#define FA_VECTOR_BYTES 64
#define FA_VECTOR_REGISTERS 32
#define FA_BFLOAT16_DOT 1
#define FA_PACK_AHEAD 1
#define FA_SOFTMAX_BESIDE 1
#define FA_TWO_STREAMS 1

#include "cpu/level.h"
