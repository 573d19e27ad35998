// What an ISA level provides, and the data a pass hands it. The passes (forward.cpp, backward.cpp) own memory, threads and order; a
// level's kernels own arithmetic.
#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/unit.h"

namespace flash_attn::cpu {

// K and V of a unit, packed in float32 one block of keys after the other: K [keys][head_dim], then V [dim panels][keys][panel],
// zero where no query of the sequence looks.
struct ForwardPass {
  const AttentionProblem* problem;
  const AttentionInputs* inputs;
  const ForwardOutputs* outputs;
  std::int32_t key_block;         // keys a block
  std::int64_t packed_block_size; // floats
};

struct ForwardTask {
  const Unit* unit;
  const float* packed;     // the unit's blocks from key 0 on; those that nobody sees are not filled
  std::int32_t row_begin;  // packed rows
  std::int32_t row_end;
};

struct Kernels {
  const char* name;

  // Tile shape, for whoever sizes buffers.
  std::int32_t panel_rows;  // query rows in the lanes of a score panel
  std::int32_t dim_panel;   // head dims in the lanes of an output panel
  std::int32_t tile_keys;   // a key block is a multiple of this

  std::int64_t (*packed_block_size)(const AttentionProblem& problem, std::int32_t key_block);
  void (*pack_keys_values)(const ForwardPass& pass, const Unit& unit, std::int32_t block, float* packed);
  std::int64_t (*forward_scratch_size)(const ForwardPass& pass);
  void (*forward_rows)(const ForwardPass& pass, const ForwardTask& task, float* scratch);
};

extern const Kernels baseline_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels neon_kernels;
// The tile shapes of a level in baseline instructions: their logic is tested on machines that lack the level.
extern const Kernels avx2_tiles_kernels;
extern const Kernels avx512_tiles_kernels;

}  // namespace flash_attn::cpu
