// Few rows over many keys: the keys are divided into runs that different threads take, whose results are combined by LSE
// (flash-decoding, Dao et al. 2023). Divisions depend on the shape alone, never on threads: so do results.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace flash_attn::cpu {

struct KeyRun {
  const Unit* unit;
  KeyRange keys;
  bool is_first;  // of its unit: every unit has at least one, which may be empty
  Partial partial;
};

/// What reading so many keys and multiplying them with every row of the unit takes one thread, roughly.
Nanoseconds work_of(const AttentionProblem& problem, const Unit& unit, std::int64_t keys);

/// Whether a unit's keys are divided, at multiples of `granule`: there are many for a few rows, or num_splits asks for it.
bool are_keys_divided(const AttentionProblem& problem, const Unit& unit, std::int32_t granule);

/// The runs of some units, side by side in order of keys, and room for what they give.
class KeyRuns {
 public:
  /// Divides the keys that each unit sees at multiples of `granule`. The units outlive this.
  KeyRuns(const Kernels& level, const AttentionProblem& problem, const std::vector<Unit>& units, std::int32_t granule);

  /// Changes the order in which runs start to ascending `place_of(run)`.
  template <class PlaceOf>
  void start_in_order(PlaceOf place_of) {
    std::vector<decltype(place_of(runs_[0]))> places;
    places.reserve(runs_.size());
    for (const KeyRun& run : runs_) places.push_back(place_of(run));
    std::stable_sort(order_.begin(), order_.end(), [&](std::size_t a, std::size_t b) { return places[a] < places[b]; });
  }

  /// body(run, slot) for every run, at first in order of units and keys.
  template <class Body>
  void for_each(int threads, Body body) const {
    parallel_for(static_cast<std::int64_t>(runs_.size()), threads, work_,
                 [&](std::int64_t i, int slot) { body(runs_[order_[static_cast<std::size_t>(i)]], slot); });
  }

  /// After every run: the results of the units that have several.
  void combine(const DecodePass& pass, int threads) const;

 private:
  const Kernels& level_;
  std::vector<KeyRun> runs_;
  std::vector<std::size_t> first_runs_;  // of each unit, and the end
  std::vector<std::size_t> order_;       // in which runs start
  Nanoseconds work_ = 0;
  Nanoseconds combine_work_ = 0;
  Buffer memory_;
};

}  // namespace flash_attn::cpu
