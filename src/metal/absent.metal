// The arrays that a call may lack, under their names all the same: what is not there is an Absent, which functions overload.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

struct Absent {};

template <class Array>
FA_FN int entry_or(Array array, int i, int) {
  return array[i];
}
FA_FN int entry_or(Absent, int, int otherwise) { return otherwise; }

}  // namespace flash_attn

#ifndef FA_VARLEN
#define cu_seqlens_q flash_attn::Absent()
#endif
#if !defined(FA_VARLEN) || defined(FA_CACHED)
#define cu_seqlens_k flash_attn::Absent()
#endif
#ifndef FA_SEQUSED_Q
#define seqused_q flash_attn::Absent()
#endif
#ifndef FA_SEQUSED_K
#define seqused_k flash_attn::Absent()
#endif
#ifndef FA_BATCH_IDX
#define cache_batch_idx flash_attn::Absent()
#endif
#ifndef FA_LEFTPAD
#define cache_leftpad flash_attn::Absent()
#endif
#ifndef FA_PAGED
#define block_table flash_attn::Absent()
#endif
#ifndef FA_SINK
#define learnable_sink flash_attn::Absent()
#endif
#ifndef FA_ALIBI
#define alibi_slopes flash_attn::Absent()
#endif
#ifndef FA_ATTN_MASK
#define attn_mask flash_attn::Absent()
#define attn_mask_shape flash_attn::Absent()
#define attn_mask_strides flash_attn::Absent()
#endif
#ifndef FA_DROPOUT
#define dropout_key flash_attn::Absent()
#endif
