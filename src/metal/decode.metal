// Attention of FA_BQ packed rows of a kv head over many keys (flash-decoding): a threadgroup takes one split of them.
//
//   for each tile of FA_BK keys that some row sees, simdgroups by turns:
//     S  = Q K^T                          [rows][keys], log2 units
//     S  = mask(ALiBi(softcap(S)))
//     m' = max(m, rowmax(S));  alpha = 2^(m - m')
//     P  = 2^(S - m');  l = alpha l + rowsum(P)
//     O  = alpha O + P V                  [rows][head dims]
//   O, l of the simdgroups are added up;  O = O / l;  lse = ln 2 (m + log2 l)
//
// K and V pass from device memory into registers once for all rows, nothing is staged: the head dims of a product may come in any
// order, so they are dealt to fragments in the order in which a lane reads them, a run of eight neighbours at a time.
//   K^T, 64 dims: fragment f has dims f, 8 + f, .., 56 + f. A lane reads two keys' runs, one element for each of 8 fragments.
//   V,   32 dims: fragment f has dims 2f, 2f + 1, 8 + 2f, 8 + 2f + 1, ... A lane reads one key's run, a pair for each of 4.
// With FA_SPLIT_D simdgroups have a part of the head dims each, and add up their S through threadgroup memory. Grid: row blocks x
// splits, kv heads, batch.
#pragma once

#include "metal/key_source.metal"
#include "metal/online_softmax.metal"
#include "metal/unused_rows.metal"

namespace flash_attn {

static_assert(FA_SIMDGROUPS % FA_SPLIT_D == 0, "as many simdgroups for every part of the head dims");

FA_CONSTANT int row_tiles = FA_BQ / fragment_size;
FA_CONSTANT int key_tiles = FA_BK / fragment_size;
FA_CONSTANT int turns = FA_SIMDGROUPS / FA_SPLIT_D;  // simdgroups that take tiles of keys by turns

// Blocks of head dims whose fragments are dealt together, of one simdgroup.
FA_CONSTANT int key_block = 8 * key_run;
FA_CONSTANT int value_block = 4 * key_run;
FA_CONSTANT int key_blocks = ((FA_D + key_block - 1) / key_block + FA_SPLIT_D - 1) / FA_SPLIT_D;
FA_CONSTANT int value_blocks = ((FA_DV + value_block - 1) / value_block + FA_SPLIT_D - 1) / FA_SPLIT_D;
FA_CONSTANT int dim_tiles = 8 * key_blocks;
FA_CONSTANT int value_tiles = 4 * value_blocks;

#ifdef FA_SPLITS
using Result = float;
#else
using Result = FA_T;
#endif

using Scores = Tile<key_tiles>;
using Queries = Tile<dim_tiles, FA_T>;
using Outputs = Tile<value_tiles>;

// What simdgroups tell each other: parts of S, at the end parts of O.
FA_CONSTANT int score_memory = FA_SPLIT_D > 1 ? FA_SIMDGROUPS * row_tiles * key_tiles * 64 : 1;
FA_CONSTANT int output_memory = turns > 1 ? FA_SPLIT_D * row_tiles * value_tiles * 64 : 1;
FA_CONSTANT int softmax_memory = turns > 1 ? turns * FA_BQ * 2 : 1;
FA_CONSTANT int shared_memory = score_memory > output_memory ? score_memory : output_memory;

// ---- Q

/// Head dims from dim_begin on, dealt as K's are.
template <class Pointer>
FA_FN void load_query(thread Queries& q, Pointer row, int dim_begin, LanePlace place) {
  FA_UNROLL
  for (short i = 0; i < dim_tiles; ++i) {
    const int dim = dim_begin + i / 8 * key_block + place.column * key_run + i % 8;
    q.fragment[i] = Fragment<FA_T>(dim < FA_D ? row[dim] : FA_T(0.0f), dim + 8 < FA_D ? row[dim + 8] : FA_T(0.0f));
  }
}

// ---- K and V

/// Where key + i of eight keys is, `first` as in slot_near; missing where it is not needed.
template <class Keys>
FA_FN KeySlot needed_slot(Keys keys, KeySlot first, int key, int i, KeyRange needed) {
  if (!contains(needed, key + i, key + i + 1)) return {-1, 0};
  return keys.slot_near(first, key, i);
}

template <int dims, class Tensor>
FA_FN Run<KeyElement, key_run> run_or_zero(Tensor tensor, KeySlot slot, int head, int dim) {
  Run<KeyElement, key_run> run;
  run.fill(0.0f);
  if (slot.exists() && dim < dims) run = tensor.run(slot, head, dim);
  return run;
}

/// S = Q K^T of the keys of `needed`. Returns which of this lane's scores belong to a key that exists, a bit each.
template <class Keys, class Tensor>
FA_FN uint multiply_by_keys(
    thread Scores (&s)[row_tiles], thread const Queries (&q)[row_tiles], Keys keys, Tensor tensor, int head, int dim_begin, int key,
    KeyRange needed, LanePlace place) {
  uint existing = 0u;
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = key + j * fragment_size;
    if (!sees(needed, first, first + fragment_size)) continue;
    const KeySlot slot = keys.slot(first);
    const KeySlot even = needed_slot(keys, slot, first, place.column, needed);
    const KeySlot odd = needed_slot(keys, slot, first, place.column + 1, needed);
    existing |= (uint(even.exists()) + uint(odd.exists()) * 2u) << uint(2 * j);
    FA_UNROLL
    for (short block = 0; block < key_blocks; ++block) {
      const int dim = dim_begin + block * key_block + place.row * key_run;
      const auto even_run = run_or_zero<FA_D>(tensor, even, head, dim);
      const auto odd_run = run_or_zero<FA_D>(tensor, odd, head, dim);
      FA_UNROLL
      for (short f = 0; f < 8; ++f) {
        const auto k_fragment = Fragment<KeyElement>(even_run.values[f], odd_run.values[f]);
        FA_UNROLL
        for (short r = 0; r < row_tiles; ++r) multiply_accumulate(s[r].fragment[j], q[r].fragment[block * 8 + f], k_fragment);
      }
    }
  }
  return existing;
}

// V of eight keys: this lane's part of every fragment.
struct Values {
  Run<KeyElement, key_run> blocks[value_blocks];

  FA_FN Fragment<KeyElement> fragment(short i) const thread {
    return Fragment<KeyElement>(blocks[i / 4].values[i % 4 * 2], blocks[i / 4].values[i % 4 * 2 + 1]);
  }
};

template <class Keys, class Tensor>
FA_FN Values load_values(
    Keys keys, Tensor tensor, int head, int dim_begin, int key, KeyRange needed, LanePlace place) {
  Values values;
  const KeySlot slot = needed_slot(keys, keys.slot(key), key, place.row, needed);
  FA_UNROLL
  for (short block = 0; block < value_blocks; ++block) {
    const int dim = dim_begin + block * value_block + place.column / 2 * key_run;
    values.blocks[block] = run_or_zero<FA_DV>(tensor, slot, head, dim);
  }
  return values;
}

/// O += P V of eight keys.
FA_FN void multiply_by_values(
    thread Outputs (&o)[row_tiles], thread const Scores (&p)[row_tiles], short j, thread const Values& values) {
  FA_UNROLL
  for (short d = 0; d < value_tiles; ++d) {
    FA_UNROLL
    for (short r = 0; r < row_tiles; ++r) multiply_accumulate(o[r].fragment[d], p[r].fragment[j], values.fragment(d));
  }
}

#ifdef FA_QV
// ---- Qv V^T, from V as it was read for P V: (V Qv^T)^T

/// Qv^T, dealt as V's dims are.
template <class Pointer>
FA_FN void load_value_query(
    thread Tile<value_tiles, FA_T>& q, Pointer even_row, Pointer odd_row, int dim_begin, LanePlace place) {
  FA_UNROLL
  for (short i = 0; i < value_tiles; ++i) {
    const int dim = dim_begin + i / 4 * value_block + place.row / 2 * key_run + i % 4 * 2 + place.row % 2;
    const bool exists = dim < FA_DV;
    q.fragment[i] = Fragment<FA_T>(exists ? even_row[dim] : FA_T(0.0f), exists ? odd_row[dim] : FA_T(0.0f));
  }
}

FA_FN ushort lane_of_place(short row, short column) {
  return ushort((row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column & 2) / 2);
}

FA_FN Fragment<float> transposed(Fragment<float> x, LanePlace place) {
  const ushort even = lane_of_place(place.column, place.row);
  const ushort odd = lane_of_place(place.column + 1, place.row);
  const auto from_even = Fragment<float>(simd_shuffle(x.x, even), simd_shuffle(x.y, even));
  const auto from_odd = Fragment<float>(simd_shuffle(x.x, odd), simd_shuffle(x.y, odd));
  return place.row % 2 == 0 ? Fragment<float>(from_even.x, from_odd.x) : Fragment<float>(from_even.y, from_odd.y);
}

FA_FN void score_values(
    thread Scores (&s)[row_tiles], short j, thread const Tile<value_tiles, FA_T> (&q)[row_tiles],
    thread const Values& values, LanePlace place) {
  FA_UNROLL
  for (short r = 0; r < row_tiles; ++r) {
    Fragment<float> keys_by_rows = Fragment<float>(0.0f);
    FA_UNROLL
    for (short d = 0; d < value_tiles; ++d) multiply_accumulate(keys_by_rows, values.fragment(d), q[r].fragment[d]);
    s[r].fragment[j] += transposed(keys_by_rows, place);
  }
}
#endif

// ---- S

/// `edge`: the row may not see all of the keys from `key` on.
template <class Mask>
FA_FN void finish_scores(
    thread Scores& s, ScoreScale scale, ScoreRow row, int key, uint existing, bool edge, LanePlace place, Mask mask) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const int column = key + j * fragment_size + place.column + i;
      s.fragment[j][i] = score(s.fragment[j][i], scale, row, column, mask);
      if (edge) s.fragment[j][i] = hidden(s.fragment[j][i], row, column);
#ifdef FA_PAGED
      if ((existing >> uint(2 * j + i) & 1u) == 0u) s.fragment[j][i] = minus_infinity;
#endif
    }
  }
}

#ifdef FA_DROPOUT
/// Element by element: tiles begin at any key.
template <class Key>
FA_FN void drop(thread Scores& p, ScoreRow row, int key, LanePlace place, Params params, Key philox_key) {
  const uint keep_24 = uint(params[param_dropout_keep_24]);
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const uint column = uint(key + j * fragment_size + place.column + i);
      const bool kept = dropout_keeps(keep_24, philox_key[0], philox_key[1], row.dropout_head, row.query, column);
      if (!kept) p.fragment[j][i] = 0.0f;
    }
  }
}
#else
FA_FN void drop(thread Scores&, ScoreRow, int, LanePlace, Params, Absent) {}
#endif

// ---- simdgroups among each other. What a lane has, the same lane of another simdgroup takes.

FA_FN int place_in_memory(int tile, uint lane) { return tile * 64 + int(lane) * 2; }

/// S of all parts of the head dims, in the same order everywhere. All simdgroups of the threadgroup call it.
FA_FN void add_parts(thread Scores (&s)[row_tiles], threadgroup float* memory, int turn, int part, uint lane) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile's were read
  FA_UNROLL
  for (short i = 0; i < row_tiles * key_tiles; ++i) {
    const int at = place_in_memory((turn * FA_SPLIT_D + part) * row_tiles * key_tiles + i, lane);
    memory[at] = s[i / key_tiles].fragment[i % key_tiles].x;
    memory[at + 1] = s[i / key_tiles].fragment[i % key_tiles].y;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  FA_UNROLL
  for (short i = 0; i < row_tiles * key_tiles; ++i) {
    Fragment<float> sum = Fragment<float>(0.0f);
    for (int other = 0; other < FA_SPLIT_D; ++other) {
      const int at = place_in_memory((turn * FA_SPLIT_D + other) * row_tiles * key_tiles + i, lane);
      sum += Fragment<float>(memory[at], memory[at + 1]);
    }
    s[i / key_tiles].fragment[i % key_tiles] = sum;
  }
}

/// m and l of all turns; O is brought to the common m. All simdgroups of the threadgroup call it.
FA_FN void merge_softmax(
    thread SoftmaxRow (&softmax)[row_tiles], thread Outputs (&o)[row_tiles], threadgroup float* memory, int turn, int part,
    LanePlace place, uint lane) {
  FA_UNROLL
  for (short r = 0; r < row_tiles; ++r) {
    const int at = (turn * FA_BQ + r * fragment_size + place.row) * 2;
    const float l = row_sum(softmax[r].l);
    if (part == 0 && is_first_of_row(lane)) {
      memory[at] = softmax[r].m;
      memory[at + 1] = l;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  FA_UNROLL
  for (short r = 0; r < row_tiles; ++r) {
    float m = lowest_score;
    for (int other = 0; other < turns; ++other) {
      m = max(m, memory[(other * FA_BQ + r * fragment_size + place.row) * 2]);
    }
    float l = 0.0f;
    for (int other = 0; other < turns; ++other) {
      const int at = (other * FA_BQ + r * fragment_size + place.row) * 2;
      l += memory[at + 1] * fast::exp2(memory[at] - m);
    }
    o[r].scale_rows(fast::exp2(softmax[r].m - m));
    softmax[r] = {m, is_first_of_row(lane) ? l : 0.0f};
  }
}

/// O of all turns, in order, ends up in the last. All simdgroups of the threadgroup call it.
FA_FN void add_outputs(thread Outputs (&o)[row_tiles], threadgroup float* memory, int turn, int part, uint lane) {
  for (int from = 0; from < turns; ++from) {
    if (turn == from) {
      FA_UNROLL
      for (short i = 0; i < row_tiles * value_tiles; ++i) {
        const int at = place_in_memory(part * row_tiles * value_tiles + i, lane);
        if (from > 0) o[i / value_tiles].fragment[i % value_tiles] += Fragment<float>(memory[at], memory[at + 1]);
        memory[at] = o[i / value_tiles].fragment[i % value_tiles].x;
        memory[at + 1] = o[i / value_tiles].fragment[i % value_tiles].y;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

/// Head dims from dim_begin on.
template <class Pointer>
FA_FN void store_output(Pointer row, thread const Outputs& o, int dim_begin, LanePlace place) {
  FA_UNROLL
  for (short i = 0; i < value_tiles; ++i) {
    const int dim = dim_begin + i / 4 * value_block + place.column / 2 * key_run + i % 4 * 2;
    if (dim < FA_DV) row[dim] = Result(o.fragment[i].x);
    if (dim + 1 < FA_DV) row[dim + 1] = Result(o.fragment[i].y);
  }
}

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
threadgroup float shared[shared_memory];
threadgroup float shared_softmax[softmax_memory];

const int kv_head = int(threadgroup_position_in_grid.y);
const int splits = params[param_splits];
const int block = int(threadgroup_position_in_grid.x) / splits;
const int split = int(threadgroup_position_in_grid.x) % splits;
const uint lane = thread_index_in_simdgroup;
const LanePlace place = place_of_lane(lane);
const int turn = int(simdgroup_index_in_threadgroup) / FA_SPLIT_D;
const int part = int(simdgroup_index_in_threadgroup) % FA_SPLIT_D;
const Sequence sequence = sequence_of(params, int(threadgroup_position_in_grid.z), lane, FA_SEQUENCE_ARRAYS);

#ifdef FA_SPLITS
const long heads_of_rows = long(query_rows(params)) * params[param_heads_q];
device float* const result = out_partial + split * heads_of_rows * FA_DV;
device float* const result_lse = lse_partial + split * heads_of_rows;
#else
device FA_T* const result = out;
device float* const result_lse = lse;
#endif
#if defined(FA_VARLEN) || defined(FA_SEQUSED_Q)
zero_unused_rows(
    params, sequence, kv_head, block, blocks_of(params[param_max_seqlen_q] * FA_GROUP, FA_BQ), result, result_lse,
    thread_position_in_threadgroup.x, FA_SIMDGROUPS * 32);
#endif

const int block_begin = block * FA_BQ;
const int block_end = min_of(block_begin + FA_BQ, packed_rows(sequence));
if (block_begin >= block_end) return;

// Keys of the split. The first of a tile is a multiple of 8 in its slots, if not in its positions, so that eight keys lie in a page.
const SeenKeys seen = seen_keys(sequence.rule, block_begin, block_end);
const auto keys = keys_of(params, sequence, block_table);
const int aligned_begin = seen.some.begin - (keys.begin + seen.some.begin) % 8;
const int tiles = blocks_of(max_of(seen.some.end - aligned_begin, 0), FA_BK * turns);
const int split_begin = aligned_begin + split * blocks_of(tiles, splits) * FA_BK * turns;
const int split_end = split_begin + blocks_of(tiles, splits) * FA_BK * turns;
const KeyRange needed = {max_of(seen.some.begin, split_begin), min_of(seen.some.end, split_end)};

// A row past the last repeats it, and is not stored.
QueryRow rows[row_tiles];
ScoreRow score_rows[row_tiles];
SoftmaxRow softmax[row_tiles];
Queries Q[row_tiles];
Outputs O[row_tiles];
const int dim_begin = part * key_blocks * key_block;
const int value_dim_begin = part * value_blocks * value_block;
const RowStrides strides = query_strides(q_strides);
for (short r = 0; r < row_tiles; ++r) {
  rows[r] = query_of_row(min_of(block_begin + r * fragment_size + place.row, block_end - 1), kv_head);
  score_rows[r] = score_row_of(params, sequence, rows[r], alibi_slopes, attn_mask_shape, attn_mask_strides);
  softmax[r] = start_softmax(learnable_sink, rows[r].head, lane);
  if (split > 0 || turn > 0) softmax[r] = {lowest_score, 0.0f};  // a sink joins once
  load_query(Q[r], q + strides.offset(sequence.batch, sequence.q.begin + rows[r].query, rows[r].head), dim_begin, place);
  O[r].fill(0.0f);
}
#ifdef FA_QV
Tile<value_tiles, FA_T> QV[row_tiles];
const RowStrides qv_row_strides = query_strides(qv_strides);
for (short r = 0; r < row_tiles; ++r) {
  const int tile_begin = block_begin + r * fragment_size;
  const QueryRow even = query_of_row(min_of(tile_begin + place.column, block_end - 1), kv_head);
  const QueryRow odd = query_of_row(min_of(tile_begin + place.column + 1, block_end - 1), kv_head);
  load_value_query(
      QV[r], qv + qv_row_strides.offset(sequence.batch, sequence.q.begin + even.query, even.head),
      qv + qv_row_strides.offset(sequence.batch, sequence.q.begin + odd.query, odd.head), value_dim_begin, place);
}
#endif
const ScoreScale scale = score_scale(params);
#ifndef FA_K_CODES
const auto K = key_tensor<FA_D>(k, k_strides);
const auto V = key_tensor<FA_DV>(v, v_strides);
#elif FA_K_CODES == 1
const auto K = int8_tensor<FA_D>(k, k_strides, k_scales, k_scales_strides);
const auto V = int8_tensor<FA_DV>(v, v_strides, v_scales, v_scales_strides);
#else
const auto K = affine_tensor<FA_K_CODES, FA_D>(k, k_strides, k_scales, k_scales_strides, k_biases, k_biases_strides);
const auto V = affine_tensor<FA_V_CODES, FA_DV>(v, v_strides, v_scales, v_scales_strides, v_biases, v_biases_strides);
#endif

// Simdgroups that share S stay together to the end.
const int ahead = FA_SPLIT_D > 1 ? 0 : turn * FA_BK;
for (int tile = split_begin; tile + ahead < needed.end; tile += turns * FA_BK) {
  const int key = tile + turn * FA_BK;
  Scores S[row_tiles];
  for (short r = 0; r < row_tiles; ++r) S[r].fill(0.0f);
  const uint existing = multiply_by_keys(S, Q, keys, K, kv_head, dim_begin, key, needed, place);
#ifdef FA_QV
  Values values[key_tiles];
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = key + j * fragment_size;
    if (!sees(needed, first, first + fragment_size)) continue;
    values[j] = load_values(keys, V, kv_head, value_dim_begin, first, needed, place);
    score_values(S, j, QV, values[j], place);
  }
#endif
  if (FA_SPLIT_D > 1) add_parts(S, shared, turn, part, lane);

  const bool edge = !contains(seen.every, key, key + FA_BK);
  FA_UNROLL
  for (short r = 0; r < row_tiles; ++r) {
    finish_scores(S[r], scale, score_rows[r], key, existing, edge, place, attn_mask);
    O[r].scale_rows(online_softmax(S[r], softmax[r]));
    drop(S[r], score_rows[r], key, place, params, dropout_key);
  }

  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = key + j * fragment_size;
    if (!sees(needed, first, first + fragment_size)) continue;
#ifdef FA_QV
    multiply_by_values(O, S, j, values[j]);
#else
    multiply_by_values(O, S, j, load_values(keys, V, kv_head, value_dim_begin, first, needed, place));
#endif
  }
}

if (turns > 1) {
  merge_softmax(softmax, O, shared_softmax, turn, part, place, lane);
  add_outputs(O, shared, turn, part, lane);
}
for (short r = 0; r < row_tiles; ++r) {
  const RowEnd end = end_of_row(softmax[r], dropout_scale(params));
  O[r].scale_rows(end.scale);
  if (turn < turns - 1 || block_begin + r * fragment_size + place.row >= block_end) continue;
  const int query = sequence.q.begin + rows[r].query;
  store_output(result + out_offset(params, sequence.batch, query, rows[r].head, FA_DV), O[r], value_dim_begin, place);
  if (part == 0 && is_first_of_row(lane)) result_lse[lse_offset(params, sequence.batch, query, rows[r].head)] = end.lse;
}
