// Few rows over many keys: the keys are divided into runs that different threads take, whose results are combined by LSE
// (flash-decoding, Dao et al. 2023). Divisions depend on the shape alone, never on threads: so do results.
#pragma once

#include <vector>

#include "cpu/buffer.h"
#include "cpu/kernels.h"

namespace flash_attn::cpu {

struct KeyRun {
  const Unit* unit;
  KeyRange keys;
  bool is_first;  // of its unit: every unit has at least one, which may be empty
  Partial partial;
};

/// The runs of some units, side by side in order of keys, and room for what they give.
class KeyRuns {
 public:
  /// Divides the keys that each unit sees at multiples of `granule`. The units outlive this.
  KeyRuns(const Kernels& level, const AttentionProblem& problem, const std::vector<Unit>& units, std::int32_t granule);

  const std::vector<KeyRun>& runs() const { return runs_; }

  /// After every run: the results of the units that have several.
  void combine(const DecodePass& pass, int threads) const;

 private:
  const Kernels& level_;
  std::vector<KeyRun> runs_;
  std::vector<std::size_t> first_runs_;  // of each unit, and the end
  Buffer memory_;
};

}  // namespace flash_attn::cpu
