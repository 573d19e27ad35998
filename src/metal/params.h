// The numbers of a launch: one int32 array, which C++ fills and the Metal text reads by these names. Floats travel as their
// bits.
#pragma once

namespace flash_attn {

enum Param : int {
  param_batch,
  param_heads_q,
  param_heads_k,
  param_max_seqlen_q,
  param_max_seqlen_k,
  param_total_q,  // packed sequences only
  param_total_k,
  param_softmax_scale,  // float bits
  param_softcap,        // float bits
  param_window_left,    // as in MaskRule: causal is already in window_right
  param_window_right,
  param_attention_chunk,
  param_alibi_batch_stride,  // 0 where all sequences share their slopes
  param_dropout_keep_24,
  param_dropout_scale,  // float bits
  // Keys in a cache.
  param_cache_rows,
  param_page_size,
  param_table_rows,
  param_table_blocks,
  param_key_capacity,
  param_seqlen_new,
  param_total_new,
  param_rotary_rows,
  // Decode: the runs into which a sequence's keys are divided.
  param_splits,
  param_keys_per_split,
  param_count
};

}  // namespace flash_attn
