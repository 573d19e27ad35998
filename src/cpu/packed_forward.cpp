// One line of tasks, unit after unit: the keys of a unit are packed while the rows of the one before are computed, so that they
// are read from cache, and the threads meet nowhere until the end.
//
//   pack unit 0 | pack unit 1 | rows of unit 0 | pack unit 2 | rows of unit 1 | ..
//
// Tasks start in this order, so whatever a task waits for was started before it.

#include "cpu/packed_forward.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "cpu/buffer.h"
#include "cpu/parallel.h"

namespace flash_attn::cpu {
namespace {

// Units whose packed keys exist at a time: one is read, one is packed, and a third keeps slow threads from holding up fast
// ones, where it is small.
constexpr std::int64_t third_unit_limit = std::int64_t{4} << 20;  // floats of a unit

struct RowRange {
  std::int32_t begin;
  std::int32_t end;
};

struct Task {
  std::size_t unit;
  bool is_packing;
  std::int32_t block;  // of keys, to pack
  RowRange rows;       // else to compute
};

class Pipeline {
 public:
  Pipeline(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units)
      : level_(level), pass_(pass), threads_(threads), units_(units), progress_(units.size()) {
    std::int64_t most_blocks = 0;
    std::size_t most_rows = 1;
    for (const Unit& unit : units) {
      most_blocks = std::max<std::int64_t>(most_blocks, (unit.sequence.k.length + pass.key_block - 1) / pass.key_block);
      most_rows = std::max(most_rows, row_ranges(unit).size());
    }
    slot_size_ = most_blocks * pass.packed_block_size;
    // Short units: enough of them to feed every thread.
    const std::size_t for_threads = 2 + static_cast<std::size_t>(threads) / most_rows;
    slots_ = std::min(units.size(), std::max<std::size_t>(for_threads, slot_size_ <= third_unit_limit ? 3 : 2));
    packed_ = allocate(static_cast<std::int64_t>(slots_) * slot_size_);
    scratch_size_ = (level.forward_scratch_size(pass) + 15) / 16 * 16;
    scratch_ = allocate(scratch_size_ * threads);
    add_tasks();
  }

  void run() {
    parallel_for(static_cast<std::int64_t>(tasks_.size()), threads_, [&](std::int64_t i, int slot) {
      const Task& task = tasks_[static_cast<std::size_t>(i)];
      if (task.is_packing) {
        pack(task);
      } else {
        compute_rows(task, scratch_.get() + slot * scratch_size_);
      }
    });
  }

 private:
  struct Progress {
    std::int32_t blocks = 0;
    std::int32_t row_tasks = 0;
    std::atomic<std::int32_t> blocks_packed{0};
    std::atomic<std::int32_t> row_tasks_done{0};
  };

  static void wait_until(const std::atomic<std::int32_t>& value, std::int32_t target) {
    for (int spins = 0; value.load(std::memory_order_acquire) < target; ++spins) {
      if (spins > 100) std::this_thread::yield();
    }
  }

  /// The heaviest first, so that a unit ends even.
  std::vector<RowRange> row_ranges(const Unit& unit) const {
    const std::int32_t rows_per_task = panels_per_task * level_.panel_rows;
    std::vector<RowRange> ranges;
    for (std::int32_t row = 0; row < unit.packed_rows(); row += rows_per_task) {
      ranges.push_back({row, std::min(row + rows_per_task, unit.packed_rows())});
    }
    const auto cost = [&](const RowRange& rows) {
      const KeyRange keys = visible_keys_of_packed_rows(unit, rows.begin, rows.end);
      return std::int64_t{keys.end - keys.begin} * (rows.end - rows.begin);
    };
    std::stable_sort(ranges.begin(), ranges.end(), [&](const RowRange& a, const RowRange& b) { return cost(a) > cost(b); });
    return ranges;
  }

  void add_tasks() {
    for (std::size_t unit = 0; unit < units_.size(); ++unit) {
      add_packing(unit);
      if (unit > 0) add_rows(unit - 1);
    }
    if (!units_.empty()) add_rows(units_.size() - 1);
  }

  void add_packing(std::size_t unit) {
    const KeyRange seen = visible_keys_of_rows(units_[unit].rule, 0, units_[unit].rule.seqlen_q);
    for (std::int32_t block = seen.begin / pass_.key_block; block * pass_.key_block < seen.end; ++block) {
      tasks_.push_back({unit, true, block, {}});
      ++progress_[unit].blocks;
    }
  }

  void add_rows(std::size_t unit) {
    for (const RowRange& rows : row_ranges(units_[unit])) {
      tasks_.push_back({unit, false, 0, rows});
      ++progress_[unit].row_tasks;
    }
  }

  float* packed_keys(std::size_t unit) const { return packed_.get() + static_cast<std::int64_t>(unit % slots_) * slot_size_; }

  void pack(const Task& task) {
    if (task.unit >= slots_) {  // the unit whose place this one takes
      const Progress& before = progress_[task.unit - slots_];
      wait_until(before.row_tasks_done, before.row_tasks);
    }
    level_.pack_keys_values(pass_, units_[task.unit], task.block,
                            packed_keys(task.unit) + task.block * pass_.packed_block_size);
    progress_[task.unit].blocks_packed.fetch_add(1, std::memory_order_release);
  }

  void compute_rows(const Task& task, float* scratch) {
    Progress& progress = progress_[task.unit];
    wait_until(progress.blocks_packed, progress.blocks);
    const Unit& unit = units_[task.unit];
    const KeyRange all_keys = {0, unit.sequence.k.length};
    level_.forward_rows(
        pass_, {&unit, packed_keys(task.unit), task.rows.begin, task.rows.end, all_keys, true, {nullptr, nullptr}}, scratch);
    progress.row_tasks_done.fetch_add(1, std::memory_order_release);
  }

  const Kernels& level_;
  const ForwardPass& pass_;
  int threads_;
  const std::vector<Unit>& units_;
  std::vector<Progress> progress_;
  std::vector<Task> tasks_;
  std::size_t slots_ = 0;
  std::int64_t slot_size_ = 0;
  std::int64_t scratch_size_ = 0;
  Buffer packed_;
  Buffer scratch_;
};

}  // namespace

void forward_packed_units(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units) {
  if (!units.empty()) Pipeline(level, pass, threads, units).run();
}

}  // namespace flash_attn::cpu
