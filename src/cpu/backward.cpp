// The backward pass: memory, threads and order. Arithmetic is in backward_kernel.h.

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/attention.h"
#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/mask_gradient.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"

namespace flash_attn::cpu {
namespace {

std::int32_t blocks_of(std::int32_t size, std::int32_t block) { return (size + block - 1) / block; }

// A unit's prepared rows and its dQ.
struct UnitMemory {
  Buffer rows;
  Buffer dq;
};

class UnitBackward {
 public:
  UnitBackward(const Kernels& level, const BackwardPass& pass, const Unit& unit)
      : level_(level), pass_(pass), unit_(unit), row_blocks_(blocks_of(unit.packed_rows(), pass.blocks.rows)) {
    memory_.rows = allocate(row_blocks_ * pass.blocks.row_block_size);
    if (pass.gradients->dq.data) memory_.dq = allocate(row_blocks_ * pass.blocks.dq_block_size);
  }

  std::int32_t row_blocks() const { return row_blocks_; }
  std::int32_t key_blocks() const { return blocks_of(unit_.sequence.k.length, pass_.blocks.keys); }

  void prepare(std::int64_t row_block) const {
    level_.prepare_rows(pass_, unit_, first_row(row_block), rows(row_block));
    if (memory_.dq) std::memset(dq(row_block), 0, static_cast<std::size_t>(pass_.blocks.dq_block_size) * sizeof(float));
  }

  // After prepare of every block: dsink [heads_q] in row order.
  void add_sink_gradient(double* dsink) const {
    for (std::int32_t block = 0; block < row_blocks_; ++block) {
      level_.add_sink_gradient(pass_, unit_, first_row(block), rows(block), dsink);
    }
  }

  void run_keys(std::int32_t key_block, std::int32_t* dq_turns, float* scratch) const {
    level_.backward_keys(pass_, {&unit_, key_block, memory_.rows.get(), memory_.dq.get(), dq_turns}, scratch);
  }

  void finish(std::int64_t row_block) const {
    if (memory_.dq) level_.write_query_gradients(pass_, unit_, first_row(row_block), dq(row_block));
  }

  // The key block that adds to each row block's dQ first.
  std::vector<std::int32_t> first_turns() const {
    std::vector<std::int32_t> turns(static_cast<std::size_t>(row_blocks_));
    for (std::int32_t block = 0; block < row_blocks_; ++block) {
      const std::int32_t end = std::min(first_row(block) + pass_.blocks.rows, unit_.packed_rows());
      turns[static_cast<std::size_t>(block)] =
          visible_keys_of_packed_rows(unit_, first_row(block), end).begin / pass_.blocks.keys;
    }
    return turns;
  }

 private:
  std::int32_t first_row(std::int64_t block) const { return static_cast<std::int32_t>(block) * pass_.blocks.rows; }
  float* rows(std::int64_t block) const { return memory_.rows.get() + block * pass_.blocks.row_block_size; }
  float* dq(std::int64_t block) const { return memory_.dq.get() + block * pass_.blocks.dq_block_size; }

  const Kernels& level_;
  const BackwardPass& pass_;
  const Unit& unit_;
  std::int32_t row_blocks_;
  UnitMemory memory_;
};

// (query, key) pairs that a unit's blocks cover, for balance only.
std::int64_t cost_of(const Unit& unit, std::int32_t row_block) {
  std::int64_t cost = 1;
  for (std::int32_t row = 0; row < unit.packed_rows(); row += row_block) {
    const KeyRange keys = visible_keys_of_packed_rows(unit, row, std::min(row + row_block, unit.packed_rows()));
    cost += std::int64_t{std::max(0, keys.end - keys.begin)} * row_block;
  }
  return cost;
}

// True when whole units, longest first, spread over the threads to within a tenth of the ideal.
bool units_fill_threads(const std::vector<std::int64_t>& descending_costs, int threads) {
  std::vector<std::int64_t> load(static_cast<std::size_t>(threads), 0);
  for (const std::int64_t cost : descending_costs) *std::min_element(load.begin(), load.end()) += cost;
  const double ideal = std::accumulate(load.begin(), load.end(), 0.0) / threads;
  return static_cast<double>(*std::max_element(load.begin(), load.end())) <= 1.1 * ideal;
}

// One thread a unit: no waiting.
void backward_by_units(const Kernels& level, const BackwardPass& pass, int threads, const std::vector<const Unit*>& units,
                       std::vector<std::vector<double>>& dsink) {
  const std::int64_t scratch_size = (pass.blocks.scratch_size + 15) / 16 * 16;
  const Buffer scratch = allocate(scratch_size * threads);
  parallel_for(static_cast<std::int64_t>(units.size()), threads, [&](std::int64_t i, int slot) {
    const Unit& unit = *units[static_cast<std::size_t>(i)];
    const UnitBackward work(level, pass, unit);
    for (std::int32_t block = 0; block < work.row_blocks(); ++block) work.prepare(block);
    if (pass.gradients->dsink) work.add_sink_gradient(dsink[static_cast<std::size_t>(unit.batch)].data());
    for (std::int32_t block = 0; block < work.key_blocks(); ++block)
      work.run_keys(block, nullptr, scratch.get() + slot * scratch_size);
    for (std::int32_t block = 0; block < work.row_blocks(); ++block) work.finish(block);
  });
}

// All threads on one unit after the other. Key blocks start in ascending order and add to dQ in that order, so none waits for a
// block that has not started.
void backward_by_key_blocks(const Kernels& level, const BackwardPass& pass, int threads, const std::vector<const Unit*>& units,
                            std::vector<std::vector<double>>& dsink) {
  const std::int64_t scratch_size = (pass.blocks.scratch_size + 15) / 16 * 16;
  const Buffer scratch = allocate(scratch_size * threads);
  for (const Unit* unit : units) {
    const UnitBackward work(level, pass, *unit);
    parallel_for(work.row_blocks(), threads, [&](std::int64_t block, int) { work.prepare(block); });
    if (pass.gradients->dsink) work.add_sink_gradient(dsink[static_cast<std::size_t>(unit->batch)].data());
    std::vector<std::int32_t> turns = work.first_turns();
    parallel_for(work.key_blocks(), threads, [&](std::int64_t block, int slot) {
      work.run_keys(static_cast<std::int32_t>(block), turns.data(), scratch.get() + slot * scratch_size);
    });
    parallel_for(work.row_blocks(), threads, [&](std::int64_t block, int) { work.finish(block); });
  }
}

void clear_unused_rows(const AttentionProblem& problem, const std::vector<Sequence>& sequences, const Gradients& gradients) {
  for_each_unused_row(problem, sequences, Side::q, [&](std::int64_t batch, std::int64_t row) {
    if (gradients.dq.data) zero_row(gradients.dq, batch, row, problem.heads_q, problem.head_dim);
  });
  for_each_unused_row(problem, sequences, Side::k, [&](std::int64_t batch, std::int64_t row) {
    if (gradients.dk.data) zero_row(gradients.dk, batch, row, problem.heads_k, problem.head_dim);
    if (gradients.dv.data) zero_row(gradients.dv, batch, row, problem.heads_k, problem.head_dim_v);
  });
}

}  // namespace

void backward(const AttentionProblem& problem, const AttentionInputs& inputs, const BackwardInputs& saved,
              const Gradients& gradients) {
  const Kernels& level = kernels();
  const int threads = thread_count();
  const std::vector<Sequence> sequences = sequences_of(problem, inputs);
  const std::vector<Unit> units = units_of(problem, sequences);
  BackwardPass pass = {&problem, &inputs, &saved, &gradients, {}};
  pass.blocks = level.backward_blocks(pass);
  clear_unused_rows(problem, sequences, gradients);
  if (gradients.dmask) mask_gradient(level, pass, threads, sequences);
  if (!gradients.dq.data && !gradients.dk.data && !gradients.dv.data && !gradients.dsink) return;

  std::vector<std::pair<std::int64_t, const Unit*>> by_cost;
  for (const Unit& unit : units) by_cost.emplace_back(cost_of(unit, pass.blocks.rows), &unit);
  std::stable_sort(by_cost.begin(), by_cost.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<std::int64_t> costs;
  std::vector<const Unit*> ordered;
  for (const auto& [cost, unit] : by_cost) {
    costs.push_back(cost);
    ordered.push_back(unit);
  }

  // A head of a batch item belongs to one unit, so each sum below is filled by one thread; the batch is added in order.
  std::vector<std::vector<double>> dsink;
  if (gradients.dsink)
    dsink.assign(static_cast<std::size_t>(problem.batch), std::vector<double>(static_cast<std::size_t>(problem.heads_q)));
  if (units_fill_threads(costs, threads)) {
    backward_by_units(level, pass, threads, ordered, dsink);
  } else {
    backward_by_key_blocks(level, pass, threads, ordered, dsink);
  }
  if (gradients.dsink) {
    for (std::int32_t head = 0; head < problem.heads_q; ++head) {
      double sum = 0.0;
      for (const std::vector<double>& of_batch : dsink) sum += of_batch[static_cast<std::size_t>(head)];
      gradients.dsink[head] = static_cast<float>(sum);
    }
  }
}

}  // namespace flash_attn::cpu
