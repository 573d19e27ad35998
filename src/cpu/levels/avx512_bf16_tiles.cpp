// The tile shapes, bfloat16 pairs and codes of avx512_bf16 in baseline instructions.
#define FA_LEVEL avx512_bf16_tiles
#define FA_VECTOR_BYTES 64
#define FA_VECTOR_REGISTERS 32
#define FA_BFLOAT16_DOT 1
#define FA_CODE_DOT 1
#define FA_PACK_AHEAD 1
#define FA_SOFTMAX_BESIDE 1
#define FA_TWO_STREAMS 1

#include "cpu/level.h"
