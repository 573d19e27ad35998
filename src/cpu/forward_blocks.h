// The blocks of keys that a task goes through: packed where nobody has, and the next one while products run.
#pragma once

#include "cpu/matrix_tiles.h"
#include "cpu/pack_ahead.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Keys of a score tile of a whole panel: key blocks are a multiple. A panel of fewer rows may have larger ones, so that scores
// of as many keys past a block's end are computed, and ignored.
constexpr int forward_key_tile = FA_MATRIX_TILES ? 2 * matrix_tile : score_keys<panel_vectors>;
constexpr int most_keys_past_end = FA_MATRIX_TILES ? 2 * matrix_tile : score_keys<1>;

// A packed block: K [key block + overhang][dim words], V [dim panels][key words][dim_panel], for matrix tiles
// [terms][dims][key words]; sizes are those of float32.

inline std::int64_t packed_keys_size(const AttentionProblem& problem, std::int32_t key_block) {
  return std::int64_t{key_block + most_keys_past_end} * row_floats(problem.scored_dims());
}

inline std::int64_t packed_block_size(const AttentionProblem& problem, std::int32_t key_block) {
  return packed_keys_size(problem, key_block) + std::int64_t{key_block} * row_floats(round_up(problem.head_dim_v, dim_panel));
}

inline BlockParts parts_of_block(const ForwardPass& pass, float* floats) {
  return {floats, floats + packed_keys_size(*pass.problem, pass.key_block)};
}

// K, or K and V with qv; bfloat16 pairs lie in K as they do in its words.
template <class Operand>
inline void pack_scored_rows(const AttentionProblem& problem, const KeyReader& reader, KeyBlock keys, float* packed) {
  const int dim = problem.scored_dims();
  float buffer[padded_head_dim];
  for (int i = 0; i < keys.size; ++i, packed += row_words<Operand>(dim)) {
    reader.fetch_scored_ahead(keys.begin + i);
    if (const char* pairs = reader.template words_of_key<Operand>(keys.begin + i)) {
      const int used = dim / 2;
      std::memcpy(packed, pairs, static_cast<std::size_t>(used) * sizeof(float));
      std::memset(packed + used, 0, static_cast<std::size_t>(words<Operand>(dim) - used) * sizeof(float));
    } else {
      pack_row<Operand>(reader.view_scored(keys.begin + i, buffer), dim, packed);
    }
  }
}

template <class Operand>
inline void pack_keys_values(const ForwardPass& pass, const Unit& unit, std::int32_t block, float* packed) {
  const AttentionProblem& problem = *pass.problem;
  const KeyBlock keys = {block * pass.key_block, pass.key_block};
  const KeyReader reader(problem, *pass.inputs, unit);
  const BlockParts parts = parts_of_block(pass, packed);
  pack_scored_rows<Operand>(problem, reader, keys, parts.k);
  if constexpr (is_matrix_operand<Operand>) {
    pack_value_dims<Operand>(reader, values_of(problem, *pass.inputs), unit, keys, parts.v);
  } else {
    pack_value_panels<Operand>(reader, values_of(problem, *pass.inputs), unit, keys, parts.v);
  }
}

// Those of the task's unit, which other threads pack, too, or two of its own in turn.
template <class Operand>
class TaskBlocks {
 public:
  TaskBlocks(const ForwardPass& pass, const ForwardTask& task, KeyRange keys, float* own, PackAhead<Operand>& ahead)
      : pass_(pass), task_(task), ahead_(ahead), own_{{own}, {own + pass.packed_block_size}} {
    if (keys.begin >= keys.end) return;
    begin_ = keys.begin / pass.key_block;
    end_ = (keys.end - 1) / pass.key_block + 1;
  }
  static std::int64_t own_size(const ForwardPass& pass) { return 2 * pass.packed_block_size; }

  std::int32_t begin() const { return begin_; }
  std::int32_t end() const { return end_; }

  // The block, and from now on the next one is packed beside products, up to leave().
  BlockParts enter(std::int32_t block) {
    const BlockParts parts = parts_of_block(pass_, packed(block));
    if (block + 1 < end_) {
      if (!task_.blocks) place_of(block + 1).state = PackedBlock::empty;  // the block before is done with
      begin_filling_ahead(*task_.unit, block + 1, place_of(block + 1));
    } else if (const auto& next = task_.next.block; next.unit) {
      begin_filling_ahead(*next.unit, next.index, *next.packed);
    }
    return parts;
  }
  void leave() {
    if (!filling_) return;
    ahead_.finish_block();
    end_filling(*filling_);
    filling_ = nullptr;
  }

 private:
  PackedBlock& place_of(std::int32_t block) { return task_.blocks ? task_.blocks[block] : own_[block % 2]; }

  // By whoever gets to it first; while another thread is at work on it, the task's other blocks are packed.
  float* packed(std::int32_t block) {
    const PackedBlock& wanted = place_of(block);
    const std::int32_t end = task_.blocks ? end_ : block + 1;
    for (std::int32_t i = block; i < end && state_of(wanted) != PackedBlock::filled; ++i) {
      if (!begin_filling(place_of(i))) continue;
      pack_keys_values<Operand>(pass_, *task_.unit, i, place_of(i).floats);
      end_filling(place_of(i));
    }
    wait_until_filled(wanted);
    return wanted.floats;
  }

  void begin_filling_ahead(const Unit& unit, std::int32_t index, PackedBlock& block) {
    const AttentionProblem& problem = *pass_.problem;
    const KeyBlock keys = {index * pass_.key_block, pass_.key_block};
    if (state_of(block) != PackedBlock::empty) return;
    if (!ahead_.can_copy(problem, *pass_.inputs, unit, keys)) return ahead_.ask_for_block(problem, *pass_.inputs, unit, keys);
    if (!begin_filling(block)) return;
    ahead_.copy_block(problem, *pass_.inputs, unit, keys, parts_of_block(pass_, block.floats));
    filling_ = &block;
  }

  const ForwardPass& pass_;
  const ForwardTask& task_;
  PackAhead<Operand>& ahead_;
  std::int32_t begin_ = 0;
  std::int32_t end_ = 0;
  PackedBlock own_[2];
  PackedBlock* filling_ = nullptr;
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
