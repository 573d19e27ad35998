// What threads pack for each other, or for themselves: filled by one of them, when somebody needs it or before.
#pragma once

#include <cstdint>

#include "cpu/wait_until.h"

namespace flash_attn::cpu {

struct Unit;

// K and V of a block of a unit's keys.
struct PackedBlock {
  enum State : std::int32_t { empty, in_work, filled };

  float* floats = nullptr;
  std::int32_t state = empty;
};

// q of a task's rows, for the thread that packed it.
struct PackedRows {
  float* floats = nullptr;
  const Unit* unit = nullptr;  // whose rows they are; null: nobody's yet
  std::int32_t row_begin = 0;
};

static inline PackedBlock::State state_of(const PackedBlock& block) {
  return static_cast<PackedBlock::State>(__atomic_load_n(&block.state, __ATOMIC_ACQUIRE));
}

/// True for the one thread that is to fill the block.
static inline bool begin_filling(PackedBlock& block) {
  std::int32_t state = PackedBlock::empty;
  return __atomic_compare_exchange_n(&block.state, &state, std::int32_t{PackedBlock::in_work}, false, __ATOMIC_ACQUIRE,
                                     __ATOMIC_RELAXED);
}

static inline void end_filling(PackedBlock& block) {
  __atomic_store_n(&block.state, std::int32_t{PackedBlock::filled}, __ATOMIC_RELEASE);
}

static inline void wait_until_filled(const PackedBlock& block) {
  wait_until([&] { return state_of(block) == PackedBlock::filled; });
}

}  // namespace flash_attn::cpu
