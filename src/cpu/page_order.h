// The pages of a sequence in the order in which they lie in memory: read at random they take up to a tenth longer.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/unit.h"

namespace flash_attn::cpu {

/// A call's block table in which the pages of each sequence are in ascending order, as far as that changes nothing but how
/// results are rounded: pages whose keys every row sees, when no score depends on where its key stands. Only of what is read
/// from memory.
class PageOrder {
 public:
  /// Gives `sequences` their rows of the new table. `inputs` outlives this.
  PageOrder(const AttentionProblem& problem, const AttentionInputs& inputs, int threads, std::vector<Sequence>& sequences);

  /// The call's, with the new table.
  const AttentionInputs& inputs() const { return inputs_; }

 private:
  std::unique_ptr<std::int32_t[]> block_table_;  // [sequences, table_blocks], of what is in use
  AttentionInputs inputs_;
};

/// To ascending order, negative ones last. `scratch` has room for as many.
void sort_pages(std::int32_t* pages, std::int32_t* scratch, std::int32_t count);

}  // namespace flash_attn::cpu
