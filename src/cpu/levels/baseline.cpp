// What every CPU of the architecture has: SSE2 on x86-64.
#define FA_LEVEL baseline
#define FA_VECTOR_BYTES 16
#define FA_VECTOR_REGISTERS 16

#include "cpu/level.h"
