// Rows of q that belong to no sequence: out is 0, lse -inf.
#pragma once

#include "metal/scores.metal"

namespace flash_attn {

/// Of q, whoever they belong to.
FA_FN int query_rows(Params params) {
#ifdef FA_VARLEN
  return params[param_total_q];
#else
  return params[param_batch] * params[param_max_seqlen_q];
#endif
}

/// Those of the sequence's slot, every so many from `first` on.
template <class Out, class Lse>
FA_FN void zero_unused_rows(
    Params params, Sequence sequence, int kv_head, int first, int step, Out out, Lse lse, uint thread_index, int threads) {
  const int head = kv_head * FA_GROUP;
  for (int i = first; i < unused_rows(sequence.q); i += step) {
    const int row = unused_row(sequence.q, i);
    const Out row_of_heads = out + out_offset(params, sequence.batch, row, head, FA_DV);
    for (int dim = int(thread_index); dim < FA_GROUP * FA_DV; dim += threads) row_of_heads[dim] = FA_T(0.0f);
    for (int member = int(thread_index); member < FA_GROUP; member += threads) {
      lse[lse_offset(params, sequence.batch, row, head + member)] = minus_infinity;
    }
  }
}

}  // namespace flash_attn
