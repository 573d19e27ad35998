// What an ISA level provides, and the data a pass hands it. The passes (forward.cpp, backward.cpp) own memory, threads and
// order; a level's kernels own arithmetic.
#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/packed_block.h"
#include "cpu/read_ahead.h"
#include "cpu/unit.h"

namespace flash_attn::cpu {

// K and V of a unit are packed in blocks of keys: K [keys][head_dim], then V [dim panels][keys][panel], zero where no query of
// the sequence looks.
struct ForwardPass {
  const AttentionProblem* problem;
  const AttentionInputs* inputs;
  const ForwardOutputs* outputs;
  std::int32_t key_block;          // keys a block
  std::int64_t packed_block_size;  // floats
};

// A result over some of the keys.
struct Partial {
  float* o;         // [rows][partial_row_size]; null: the task has all keys, the result is the caller's
  float* lse_log2;  // [rows]
};

struct RowRange {
  std::int32_t begin;
  std::int32_t end;
};

// What the thread of a task reads after it, to be packed while it multiplies.
struct Foreseen {
  struct {
    const Unit* unit = nullptr;  // null: none
    std::int32_t index = 0;
    PackedBlock* packed = nullptr;
  } block;
  struct {
    const Unit* unit = nullptr;  // null: none
    RowRange range = {0, 0};     // packed rows
    PackedRows* packed = nullptr;
  } rows;
};

struct ForwardTask {
  const Unit* unit;
  PackedBlock* blocks;        // the unit's, from key 0 on; null: the task packs its own
  const PackedRows* queries;  // may be of these rows
  std::int32_t row_begin;     // packed rows
  std::int32_t row_end;
  KeyRange keys;  // from a whole block on
  bool is_first;  // of the unit's runs of keys
  Partial partial;
  Foreseen next;
};

// Few rows over many keys: a task has some kv heads of a sequence and a run of its keys.
struct DecodePass {
  const AttentionProblem* problem;
  const AttentionInputs* inputs;
  const ForwardOutputs* outputs;
};

constexpr std::int32_t max_decode_rows = 512;  // of a task

struct DecodeTask {
  const Unit* unit;
  KeyRange keys;
  bool is_first;  // of the unit's runs
  Partial partial;
  ReadAhead read_ahead;
};

// Backward. The rows of a unit are prepared once, one block after the other; dQ gathers in float32 blocks of the same rows.
struct BackwardBlocks {
  std::int32_t keys;            // of a key block
  std::int32_t rows;            // packed rows of a row block
  std::int64_t row_block_size;  // floats that a prepared row block takes
  std::int64_t dq_block_size;   // floats that a row block of dQ takes
  std::int64_t scratch_size;    // floats that a thread needs
};

struct BackwardPass {
  const AttentionProblem* problem;
  const AttentionInputs* inputs;
  const BackwardInputs* saved;
  const Gradients* gradients;
  BackwardBlocks blocks;
};

struct BackwardTask {
  const Unit* unit;
  std::int32_t block;      // of keys
  float* rows;             // the unit's prepared row blocks
  float* dq;               // the unit's row blocks of dQ; null: not wanted
  std::int32_t* dq_turns;  // per row block, the key block that may add to dQ next; null: the caller runs them in order
};

// The new rows of a sequence, cut to what its cache can take.
struct NewRows {
  std::int32_t batch;
  std::int32_t cache_row;   // or row of the block table
  std::int32_t first_slot;  // of the cache
  Extent rows;              // of NewKeys
  std::int32_t rotary_base;
};

struct AppendPass {
  const AttentionProblem* problem;
  const AttentionInputs* inputs;
  const NewKeys* new_keys;
  const RotaryTable* rotary;
  const WritableCache* cache;
  const NewRows* sequences;
  std::int32_t sequence_count;
};

// One head of k or of v, all sequences in order: no two threads ever write one slot, whatever the block table says.
struct AppendTask {
  std::int32_t kv_head;
  bool values;  // else keys
};

struct RotatePass {
  const AttentionProblem* problem;
  const AttentionInputs* inputs;
  const RotaryTable* rotary;
  const Tensor* rotated;
};

struct RotateTask {
  std::int32_t batch;
  Extent rows;  // of q
  std::int32_t head;
  std::int32_t rotary_base;
};

struct MaskGradientTask {
  const Unit* unit;  // of one head
  std::int32_t row_begin;
  std::int32_t block;  // of keys
  float* dmask;        // element (query, key) at query * row_stride + key * key_stride; a stride of 0 sums
  std::int64_t row_stride;
  std::int64_t key_stride;
};

struct Kernels {
  const char* name;

  // Tile shape, for whoever sizes buffers.
  std::int32_t panel_rows;        // query rows in the lanes of a score panel
  std::int32_t forward_key_tile;  // a key block of forward is a multiple

  std::int64_t (*packed_block_size)(const AttentionProblem& problem, std::int32_t key_block);
  void (*pack_keys_values)(const ForwardPass& pass, const Unit& unit, std::int32_t block, float* packed);
  std::int64_t (*forward_scratch_size)(const ForwardPass& pass);
  void (*forward_rows)(const ForwardPass& pass, const ForwardTask& task, float* scratch);

  std::int64_t (*decode_scratch_size)(const DecodePass& pass, std::int32_t rows);
  std::int64_t (*partial_row_size)(const AttentionProblem& problem);
  void (*decode)(const DecodePass& pass, const DecodeTask& task, float* scratch);
  void (*combine_partials)(const DecodePass& pass, const Unit& unit, const Partial* parts, std::int32_t count);

  void (*append_rows)(const AppendPass& pass, const AppendTask& task);
  void (*rotate_rows)(const RotatePass& pass, const RotateTask& task);

  BackwardBlocks (*backward_blocks)(const BackwardPass& pass);  // of a pass that has all but its blocks
  void (*prepare_rows)(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, float* rows);
  void (*add_sink_gradient)(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* rows,
                            double* dsink);
  void (*backward_keys)(const BackwardPass& pass, const BackwardTask& task, float* scratch);
  void (*write_query_gradients)(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* dq);

  void (*add_mask_gradient)(const BackwardPass& pass, const MaskGradientTask& task, float* scratch);
};

extern const Kernels baseline_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels avx512_amx_kernels;
extern const Kernels neon_kernels;
// The tile shapes of a level in baseline instructions: their logic is tested on machines that lack the level.
extern const Kernels avx2_tiles_kernels;
extern const Kernels avx512_tiles_kernels;
extern const Kernels avx512_bf16_tiles_kernels;
extern const Kernels avx512_amx_tiles_kernels;

}  // namespace flash_attn::cpu
