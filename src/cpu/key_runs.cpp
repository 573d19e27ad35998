#include "cpu/key_runs.h"

#include <algorithm>
#include <numeric>

namespace flash_attn::cpu {
namespace {

// Elements of K and V in a run. Long runs: starting one costs 2 us in cache and 6 from memory, with what it takes to combine
// its result. A sequence too short for several of them has shorter ones, so that threads that are awake can share it.
constexpr std::int64_t elements_of_run = 1024 * 1024;
constexpr std::int64_t elements_of_short_run = 512 * 1024;
constexpr std::int64_t short_runs = 4;      // at most
constexpr std::int64_t shortest_run = 128;  // keys
constexpr std::int32_t max_runs = 256;

std::vector<KeyRange> divide(const AttentionProblem& problem, const Unit& unit, std::int32_t granule) {
  const KeyRange seen = visible_keys_of_unit(unit);
  const std::int32_t first_granule = seen.begin / granule;
  const std::int32_t granules = seen.begin < seen.end ? (seen.end + granule - 1) / granule - first_granule : 0;
  const std::int64_t keys = seen.end - seen.begin;
  const std::int64_t elements = keys * unit.kv_heads * (problem.head_dim + problem.head_dim_v);
  const std::int64_t useful = std::max(elements / elements_of_run, std::min(elements / elements_of_short_run, short_runs));
  const std::int64_t wanted = problem.num_splits > 0 ? problem.num_splits : std::min(useful, keys / shortest_run);
  const auto count = static_cast<std::int32_t>(std::clamp<std::int64_t>(wanted, 1, std::clamp(granules, 1, max_runs)));
  std::vector<KeyRange> runs;
  std::int32_t begin = seen.begin;
  for (std::int32_t i = 1; i <= count; ++i) {
    const auto end = (first_granule + std::int64_t{granules} * i / count) * granule;
    runs.push_back({begin, i == count ? std::max(seen.begin, seen.end) : static_cast<std::int32_t>(end)});
    begin = runs.back().end;
  }
  return runs;
}

}  // namespace

Nanoseconds work_of(const AttentionProblem& problem, const Unit& unit, std::int64_t keys) {
  // An element of K or V takes an eighth of a nanosecond, and a 64th a row.
  return keys * unit.kv_heads * (problem.head_dim + problem.head_dim_v) * (8 + unit.rows_of_head()) / 64;
}

bool are_keys_divided(const AttentionProblem& problem, const Unit& unit, std::int32_t granule) {
  return divide(problem, unit, granule).size() > 1;
}

KeyRuns::KeyRuns(const Kernels& level, const AttentionProblem& problem, const std::vector<Unit>& units, std::int32_t granule)
    : level_(level) {
  const std::int64_t row_size = level.partial_row_size(problem);
  std::int64_t floats = 0;
  for (const Unit& unit : units) {
    first_runs_.push_back(runs_.size());
    const std::vector<KeyRange> ranges = divide(problem, unit, granule);
    work_ += work_of(problem, unit, ranges.back().end - ranges.front().begin);
    for (const KeyRange& keys : ranges) runs_.push_back({&unit, keys, runs_.size() == first_runs_.back(), {nullptr, nullptr}});
    if (ranges.size() > 1) floats += static_cast<std::int64_t>(ranges.size()) * unit.packed_rows() * (row_size + 1);
  }
  first_runs_.push_back(runs_.size());
  order_.resize(runs_.size());
  std::iota(order_.begin(), order_.end(), std::size_t{0});

  combine_work_ = floats / 8;
  memory_ = allocate(floats);
  float* next = memory_.get();
  for (std::size_t unit = 0; unit < units.size(); ++unit) {
    if (first_runs_[unit + 1] - first_runs_[unit] == 1) continue;
    const std::int64_t rows = units[unit].packed_rows();
    for (std::size_t run = first_runs_[unit]; run < first_runs_[unit + 1]; ++run) {
      runs_[run].partial = {next, next + rows * row_size};
      next += rows * (row_size + 1);
    }
  }
}

void KeyRuns::combine(const DecodePass& pass, int threads) const {
  parallel_for(static_cast<std::int64_t>(first_runs_.size()) - 1, threads, combine_work_, [&](std::int64_t unit, int) {
    const std::size_t begin = first_runs_[static_cast<std::size_t>(unit)];
    const std::size_t end = first_runs_[static_cast<std::size_t>(unit) + 1];
    if (end - begin == 1) return;
    std::vector<Partial> parts;
    for (std::size_t run = begin; run < end; ++run) parts.push_back(runs_[run].partial);
    level_.combine_partials(pass, *runs_[begin].unit, parts.data(), static_cast<std::int32_t>(parts.size()));
  });
}

}  // namespace flash_attn::cpu
