// AArch64 NEON.
#define FA_LEVEL neon
#define FA_VECTOR_BYTES 16
#define FA_VECTOR_REGISTERS 32

#include "cpu/level.h"
