// A thread takes a unit and computes its rows. A block of keys is packed when it is first needed, or before, while the thread
// multiplies the one before it: it is read by the core that wrote it, from its own cache. A thread that finds no unit left
// helps with those under way.
//
//   thread 0   rows of unit 0, blocks 1, 2, ..; block 0 of unit 2 | rows of unit 2, ..
//   thread 1   rows of unit 1, blocks 1, 2, ..; block 0 of unit 3 | rows of unit 3, ..

#include "cpu/packed_forward.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu/buffer.h"
#include "cpu/key_runs.h"
#include "cpu/parallel.h"
#include "cpu/wait_until.h"

namespace flash_attn::cpu {
namespace {

// A unit's row tasks in the order in which they start, and its blocks of keys.
struct UnitWork {
  const Unit* unit = nullptr;
  std::vector<RowRange> rows;
  std::int32_t first_block = 0;
  std::int32_t block_end = 0;
  PackedBlock* blocks = nullptr;  // [block_end]

  std::atomic<bool> has_memory{false};
  std::atomic<std::size_t> next_task{0};
  std::atomic<int> helpers{0};  // at work on tasks

  // The index of a task that nobody has started, or more than there are.
  std::size_t start_task() { return next_task.fetch_add(1, std::memory_order_acq_rel); }
  std::int32_t block_count() const { return block_end - first_block; }

  // Where blocks lie: in two places by turns if no other task reads them again, else each in its own, of which the first two
  // are for units' first blocks. The first one of the next unit is packed while the last one of this unit is in use.
  bool takes_turns() const { return rows.size() == 1; }
  std::int32_t places() const { return takes_turns() ? 2 : block_count() + 1; }
  std::int32_t place_of(std::int32_t block, std::int32_t first) const {
    if (takes_turns()) return (first + block) % 2;
    return block == 0 ? first : block + 1;
  }
  std::int32_t first_place_after(std::int32_t first) const { return (first + (takes_turns() ? block_count() : 1)) % 2; }
};

class PackedForward {
 public:
  PackedForward(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units)
      : level_(level), pass_(pass), work_(units.size()) {
    std::size_t tasks = 0;
    std::size_t blocks = 0;
    for (std::size_t i = 0; i < units.size(); ++i) {
      const KeyRange seen = visible_keys_of_unit(units[i]);
      plan(units[i], seen, work_[i]);
      tasks += work_[i].rows.size();
      blocks += static_cast<std::size_t>(work_[i].block_end);
      places_ = std::max(places_, work_[i].places());
      time_ += work_of(*pass.problem, units[i], std::max(seen.end - seen.begin, 0));
    }
    blocks_.resize(blocks);
    PackedBlock* next = blocks_.data();
    for (UnitWork& work : work_) work.blocks = std::exchange(next, next + work.block_end);

    threads_ = static_cast<int>(std::min(static_cast<std::size_t>(threads), tasks));
    rows_size_ = std::int64_t{rows_per_task() + pass.problem->group()} * pass.problem->scored_dims();  // of whole groups
    memory_size_ = places_ * pass.packed_block_size + 2 * rows_size_;
    memory_ = allocate(std::min(threads_, static_cast<int>(units.size())) * memory_size_);
    scratch_size_ = (level.forward_scratch_size(pass) + 15) / 16 * 16;
    scratch_ = allocate(threads_ * scratch_size_);
  }

  void run() {
    parallel_for(threads_, threads_, time_, [&](std::int64_t thread, int slot) {
      float* scratch = scratch_.get() + slot * scratch_size_;
      take_units(scratch);
      help(static_cast<std::size_t>(thread), scratch);
    });
  }

 private:
  std::int32_t rows_per_task() const { return panels_per_task * level_.panel_rows; }

  void plan(const Unit& unit, KeyRange seen, UnitWork& work) const {
    work.unit = &unit;
    if (seen.begin < seen.end) {
      work.first_block = seen.begin / pass_.key_block;
      work.block_end = (seen.end - 1) / pass_.key_block + 1;
    }
    for (std::int32_t row = 0; row < unit.packed_rows(); row += rows_per_task()) {
      work.rows.push_back({row, std::min(row + rows_per_task(), unit.packed_rows())});
    }
    // The heaviest first, so that helpers end together.
    const auto cost = [&](const RowRange& rows) {
      const KeyRange keys = visible_keys_of_packed_rows(unit, rows.begin, rows.end);
      return std::int64_t{keys.end - keys.begin} * (rows.end - rows.begin);
    };
    std::stable_sort(work.rows.begin(), work.rows.end(),
                     [&](const RowRange& a, const RowRange& b) { return cost(a) > cost(b); });
  }

  // One of the units that no thread has, if there are so many.
  UnitWork* take_one_of(std::size_t count) {
    std::size_t i = next_unit_.load(std::memory_order_relaxed);
    while (i + count <= work_.size()) {
      if (next_unit_.compare_exchange_weak(i, i + 1, std::memory_order_relaxed)) return &work_[i];
    }
    return nullptr;
  }

  void take_units(float* scratch) {
    UnitWork* work = take_one_of(1);
    if (!work) return;
    float* memory = memory_.get() + memory_taken_.fetch_add(1, std::memory_order_relaxed) * memory_size_;
    float* rows = memory + places_ * pass_.packed_block_size;
    PackedRows queries[2] = {{rows}, {rows + rows_size_}};
    std::int32_t first_place = 0;
    while (work) {
      give_memory(*work, memory, first_place);
      first_place = work->first_place_after(first_place);
      UnitWork* next = nullptr;
      for (std::size_t task; (task = work->start_task()) < work->rows.size();) {
        // By now the other threads have theirs, so that each goes from a head to its neighbour. The last units are for whoever
        // comes first.
        if (task + 1 == work->rows.size()) next = take_one_of(static_cast<std::size_t>(threads_));
        if (next && next->block_count() > 0) next->blocks[next->first_block].floats = place(memory, first_place);
        compute(*work, task, foreseen(*work, task, next, queries + 1), queries, scratch);
        std::swap(queries[0], queries[1]);
      }
      // The next unit takes its memory.
      wait_until([&] { return work->helpers.load(std::memory_order_acquire) == 0; });
      work = next ? next : take_one_of(1);
    }
  }

  // What a unit's owner packs beside a task: the first block of its next unit, q of its next task.
  static Foreseen foreseen(const UnitWork& work, std::size_t task, const UnitWork* next, PackedRows* queries) {
    Foreseen foreseen;
    const bool is_last = task + 1 == work.rows.size();
    const UnitWork* after = is_last ? next : &work;
    if (after) foreseen.rows = {after->unit, after->rows[is_last ? 0 : task + 1], queries};
    if (next && next->block_count() > 0) {
      foreseen.block = {next->unit, next->first_block, next->blocks + next->first_block};
    }
    return foreseen;
  }

  float* place(float* memory, std::int32_t i) const { return memory + i * pass_.packed_block_size; }

  void give_memory(UnitWork& work, float* memory, std::int32_t first_place) const {
    for (std::int32_t i = 0; i < work.block_count(); ++i) {
      work.blocks[work.first_block + i].floats = place(memory, work.place_of(i, first_place));
    }
    work.has_memory.store(true, std::memory_order_release);
  }

  // Until every task has started. Each helper begins elsewhere.
  void help(std::size_t first, float* scratch) {
    wait_until([&] {
      bool have_started = true;
      for (std::size_t i = 0; i < work_.size(); ++i) {
        UnitWork& work = work_[(first + i) % work_.size()];
        if (work.next_task.load(std::memory_order_relaxed) >= work.rows.size()) continue;
        have_started = false;
        if (!work.has_memory.load(std::memory_order_acquire)) continue;
        work.helpers.fetch_add(1, std::memory_order_relaxed);
        for (std::size_t task; (task = work.start_task()) < work.rows.size();) compute(work, task, {}, nullptr, scratch);
        work.helpers.fetch_sub(1, std::memory_order_release);
      }
      return have_started;
    });
  }

  void compute(const UnitWork& work, std::size_t task, const Foreseen& next, const PackedRows* queries, float* scratch) const {
    const RowRange rows = work.rows[task];
    const KeyRange all_keys = {0, work.unit->sequence.k.length};
    level_.forward_rows(
        pass_, {work.unit, work.blocks, queries, rows.begin, rows.end, all_keys, true, {nullptr, nullptr}, next}, scratch);
  }

  const Kernels& level_;
  const ForwardPass& pass_;
  int threads_ = 1;
  Nanoseconds time_ = 0;
  std::vector<UnitWork> work_;
  std::vector<PackedBlock> blocks_;
  std::atomic<std::size_t> next_unit_{0};

  std::int32_t places_ = 0;
  std::int64_t rows_size_ = 0;
  std::int64_t memory_size_ = 0;  // of a thread that has units: places for blocks, and rows
  std::atomic<std::int64_t> memory_taken_{0};
  Buffer memory_;
  std::int64_t scratch_size_ = 0;
  Buffer scratch_;
};

}  // namespace

void forward_packed_units(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units) {
  if (!units.empty()) PackedForward(level, pass, threads, units).run();
}

}  // namespace flash_attn::cpu
