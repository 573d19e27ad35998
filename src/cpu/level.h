// Included once by each src/cpu/levels/*.cpp, which defines FA_LEVEL, FA_VECTOR_BYTES and FA_VECTOR_REGISTERS: all kernels of a
// level and its table.
#pragma once

#include "cpu/backward_kernel.h"
#include "cpu/forward_kernel.h"
#include "cpu/mask_gradient_kernel.h"

#define FA_JOIN_(a, b) a##b
#define FA_JOIN(a, b) FA_JOIN_(a, b)
#define FA_STRING_(a) #a
#define FA_STRING(a) FA_STRING_(a)

namespace flash_attn::cpu {

const Kernels FA_JOIN(FA_LEVEL, _kernels) = {
    FA_STRING(FA_LEVEL),
    FA_LEVEL::panel_rows,
    FA_LEVEL::dim_panel,
    FA_LEVEL::tile_keys,
    FA_LEVEL::row_block,
    FA_LEVEL::packed_block_size,
    FA_LEVEL::pack_keys_values,
    FA_LEVEL::forward_scratch_size,
    FA_LEVEL::forward_rows,
    FA_LEVEL::row_block_size,
    FA_LEVEL::dq_block_size,
    FA_LEVEL::backward_scratch_size,
    FA_LEVEL::prepare_rows,
    FA_LEVEL::add_sink_gradient,
    FA_LEVEL::backward_keys,
    FA_LEVEL::write_query_gradients,
    FA_LEVEL::mask_gradient_scratch_size,
    FA_LEVEL::add_mask_gradient,
};

}  // namespace flash_attn::cpu
