// Address spaces say nothing to a compiler of one memory; what they forbid is checked by the address-space pass.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define device
#define constant
#define threadgroup
#define thread
#define METAL_FUNC inline __attribute__((always_inline))

// For the shim's own functions that touch memory: the line of a finding is then the text's.
#define METAL_SHIM_INLINE __attribute__((always_inline)) constexpr

using uchar = uint8_t;
using ushort = uint16_t;
using uint = uint32_t;
using ulong = uint64_t;
