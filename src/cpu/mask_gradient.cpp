// The gradient of attn_mask: which blocks are summed into which part of it, and in which order.

#include "cpu/mask_gradient.h"

#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/parallel.h"

namespace flash_attn::cpu {
namespace {

// A part of the gradient that one thread owns: one (batch, head) slot of the mask, one block of its rows and of its keys, each
// the whole where the mask broadcasts.
struct Part {
  std::int32_t slot_batch, slot_head;
  std::int32_t row_block;  // -1: all
  std::int32_t key_block;  // -1: all
};

struct Span {
  std::int32_t begin, end;
};

Span span_of(std::int32_t index, std::int32_t count) { return index < 0 ? Span{0, count} : Span{index, index + 1}; }

std::int32_t blocks_of(std::int32_t size, std::int32_t block) { return (size + block - 1) / block; }

}  // namespace

void mask_gradient(const Kernels& level, const BackwardPass& pass, int threads, const std::vector<Sequence>& sequences) {
  const AttentionProblem& problem = *pass.problem;
  const Gradients& gradients = *pass.gradients;
  const std::int64_t slot_size = std::int64_t{gradients.dmask_rows} * gradients.dmask_keys;
  const std::int64_t size = slot_size * gradients.dmask_batch * gradients.dmask_heads;
  if (size == 0) return;
  std::memset(gradients.dmask, 0, static_cast<std::size_t>(size) * sizeof(float));

  const std::int32_t row_blocks = blocks_of(problem.max_seqlen_q, pass.blocks.rows);
  const std::int32_t key_blocks = blocks_of(problem.max_seqlen_k, pass.blocks.keys);
  std::vector<Part> parts;
  for (std::int32_t batch = 0; batch < gradients.dmask_batch; ++batch) {
    for (std::int32_t head = 0; head < gradients.dmask_heads; ++head) {
      for (std::int32_t row = gradients.dmask_rows == 1 ? -1 : 0; row < (gradients.dmask_rows == 1 ? 0 : row_blocks); ++row) {
        for (std::int32_t key = gradients.dmask_keys == 1 ? -1 : 0; key < (gradients.dmask_keys == 1 ? 0 : key_blocks); ++key) {
          parts.push_back({batch, head, row, key});
        }
      }
    }
  }

  const std::int64_t scratch_size = (pass.blocks.row_block_size + pass.blocks.scratch_size + 15) / 16 * 16;
  const Buffer scratch = allocate(scratch_size * threads);
  parallel_for(static_cast<std::int64_t>(parts.size()), threads, [&](std::int64_t i, int slot) {
    const Part& part = parts[static_cast<std::size_t>(i)];
    float* dmask = gradients.dmask + (std::int64_t{part.slot_batch} * gradients.dmask_heads + part.slot_head) * slot_size;
    const Span batches = gradients.dmask_batch == 1 ? Span{0, problem.batch} : Span{part.slot_batch, part.slot_batch + 1};
    const Span heads = gradients.dmask_heads == 1 ? Span{0, problem.heads_q} : Span{part.slot_head, part.slot_head + 1};
    const Span rows = span_of(part.row_block, row_blocks);
    const Span keys = span_of(part.key_block, key_blocks);
    for (std::int32_t batch = batches.begin; batch < batches.end; ++batch) {
      const Sequence& sequence = sequences[static_cast<std::size_t>(batch)];
      const MaskRule rule = problem.mask_rule(sequence.q.length, sequence.k.length);
      for (std::int32_t head = heads.begin; head < heads.end; ++head) {
        // A unit of one head: the mask's heads are query heads.
        const Unit unit = {batch, head / problem.group(), 1, head, 1, sequence, rule};
        for (std::int32_t row = rows.begin; row < rows.end && row * pass.blocks.rows < sequence.q.length; ++row) {
          for (std::int32_t key = keys.begin; key < keys.end && key * pass.blocks.keys < sequence.k.length; ++key) {
            level.add_mask_gradient(pass,
                                    {&unit, row * pass.blocks.rows, key, dmask,
                                     gradients.dmask_rows == 1 ? 0 : gradients.dmask_keys, gradients.dmask_keys == 1 ? 0 : 1},
                                    scratch.get() + slot * scratch_size);
          }
        }
      }
    }
  });
}

}  // namespace flash_attn::cpu
