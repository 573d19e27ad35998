// Metal's language for g++ and clang: the words that MLX's kernels and ours use, and no others, so that a text which compiles
// here keeps to them. One topic, one header.
#pragma once

#include "msl/math.h"
#include "msl/scalar.h"
#include "msl/simd.h"
#include "msl/simdgroup_matrix.h"
#include "msl/threadgroup.h"
#include "msl/traits.h"
#include "msl/vec.h"
#include "msl/words.h"
