// A thread takes a unit, packs its keys and computes its rows: packed keys are read by the core that wrote them, from its own
// cache. A thread that finds no unit left helps with those under way.
//
//   thread 0   pack unit 0 | rows of unit 0 | pack unit 2 | rows of unit 2 | ..
//   thread 1   pack unit 1 | rows of unit 1 | pack unit 3 | rows of unit 3 | ..

#include "cpu/packed_forward.h"

#include <algorithm>
#include <atomic>

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/wait_until.h"

namespace flash_attn::cpu {
namespace {

// A unit's tasks in the order in which they start: blocks of keys to pack, then rows to compute.
struct UnitWork {
  const Unit* unit;
  std::int32_t first_block;
  std::int32_t blocks;
  std::vector<RowRange> rows;

  std::atomic<float*> packed{nullptr};  // null until a thread has taken the unit
  std::atomic<std::int32_t> next_task{0};
  std::atomic<std::int32_t> blocks_packed{0};

  std::int32_t tasks() const { return blocks + static_cast<std::int32_t>(rows.size()); }
};

class PackedForward {
 public:
  PackedForward(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units)
      : level_(level), pass_(pass), work_(units.size()) {
    std::int64_t tasks = 0;
    std::int64_t most_blocks = 0;
    for (std::size_t i = 0; i < units.size(); ++i) {
      plan(units[i], work_[i]);
      tasks += work_[i].tasks();
      most_blocks = std::max<std::int64_t>(most_blocks, work_[i].first_block + work_[i].blocks);
    }
    threads_ = static_cast<int>(std::min<std::int64_t>(threads, tasks));
    unit_size_ = most_blocks * pass.packed_block_size;
    packed_ = allocate(std::min(threads_, static_cast<int>(units.size())) * unit_size_);
    scratch_size_ = (level.forward_scratch_size(pass) + 15) / 16 * 16;
    scratch_ = allocate(threads_ * scratch_size_);
  }

  void run() {
    parallel_for(threads_, threads_, [&](std::int64_t thread, int slot) {
      float* scratch = scratch_.get() + slot * scratch_size_;
      float* packed = nullptr;
      for (std::size_t i; (i = next_unit_.fetch_add(1, std::memory_order_relaxed)) < work_.size();) {
        if (!packed) packed = packed_.get() + buffers_taken_.fetch_add(1, std::memory_order_relaxed) * unit_size_;
        work_[i].packed.store(packed, std::memory_order_release);
        work_on(work_[i], scratch);
      }
      // Each helper begins elsewhere.
      for (std::size_t i = 0; i < work_.size(); ++i)
        work_on(work_[(i + static_cast<std::size_t>(thread)) % work_.size()], scratch);
    });
  }

 private:
  void plan(const Unit& unit, UnitWork& work) const {
    const KeyRange seen = unit.visible_keys();
    work.unit = &unit;
    work.first_block = seen.begin / pass_.key_block;
    work.blocks = seen.begin < seen.end ? (seen.end - 1) / pass_.key_block + 1 - work.first_block : 0;
    const std::int32_t rows_per_task = panels_per_task * level_.panel_rows;
    for (std::int32_t row = 0; row < unit.packed_rows(); row += rows_per_task) {
      work.rows.push_back({row, std::min(row + rows_per_task, unit.packed_rows())});
    }
    // The heaviest first, so that helpers end together.
    const auto cost = [&](const RowRange& rows) {
      const KeyRange keys = visible_keys_of_packed_rows(unit, rows.begin, rows.end);
      return std::int64_t{keys.end - keys.begin} * (rows.end - rows.begin);
    };
    std::stable_sort(work.rows.begin(), work.rows.end(),
                     [&](const RowRange& a, const RowRange& b) { return cost(a) > cost(b); });
  }

  // Runs tasks of a unit until all have started.
  void work_on(UnitWork& work, float* scratch) const {
    if (work.next_task.load(std::memory_order_relaxed) >= work.tasks()) return;
    wait_until([&] { return work.packed.load(std::memory_order_acquire) != nullptr; });
    for (std::int32_t task; (task = work.next_task.fetch_add(1, std::memory_order_relaxed)) < work.tasks();) {
      if (task < work.blocks) {
        pack(work, work.first_block + task);
      } else {
        compute_rows(work, static_cast<std::size_t>(task - work.blocks), scratch);
      }
    }
  }

  void pack(UnitWork& work, std::int32_t block) const {
    level_.pack_keys_values(pass_, *work.unit, block, work.packed + block * pass_.packed_block_size);
    work.blocks_packed.fetch_add(1, std::memory_order_release);
  }

  // A unit's tasks share what they ask for of the next one.
  Foreseen foreseen(const UnitWork& work, std::size_t task) const {
    const std::size_t next = next_unit_.load(std::memory_order_relaxed);
    if (next >= work_.size()) return {};
    const UnitWork& unit = work_[next];
    const KeyRange seen = unit.unit->visible_keys();
    const auto share = [&](std::size_t i) {
      return seen.begin + static_cast<std::int32_t>(std::int64_t{seen.end - seen.begin} * static_cast<std::int64_t>(i) /
                                                    static_cast<std::int64_t>(work.rows.size()));
    };
    if (seen.begin >= seen.end) return {};
    const bool is_last = task + 1 == work.rows.size();
    return {unit.unit, {share(task), share(task + 1)}, is_last ? unit.rows.front() : RowRange{0, 0}};
  }

  void compute_rows(const UnitWork& work, std::size_t task, float* scratch) const {
    const RowRange rows = work.rows[task];
    wait_until([&] { return work.blocks_packed.load(std::memory_order_acquire) == work.blocks; });
    const KeyRange all_keys = {0, work.unit->sequence.k.length};
    level_.forward_rows(
        pass_, {work.unit, work.packed, rows.begin, rows.end, all_keys, true, {nullptr, nullptr}, foreseen(work, task)},
        scratch);
  }

  const Kernels& level_;
  const ForwardPass& pass_;
  int threads_ = 1;
  std::vector<UnitWork> work_;
  std::atomic<std::size_t> next_unit_{0};
  std::atomic<std::int64_t> buffers_taken_{0};
  std::int64_t unit_size_ = 0;
  std::int64_t scratch_size_ = 0;
  Buffer packed_;
  Buffer scratch_;
};

}  // namespace

void forward_packed_units(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units) {
  if (!units.empty()) PackedForward(level, pass, threads, units).run();
}

}  // namespace flash_attn::cpu
