// Scores of eight rows and a block of keys, from the products with Q to what is multiplied by V.
#pragma once

#include "metal/key_block.metal"
#include "metal/scores.metal"

namespace flash_attn {

/// Scores of the row's keys from `key` on. `seen`: by the tile's rows.
template <class Mask>
FA_FN void finish_scores(
    thread Tile<key_tiles>& s, ScoreScale scale, ScoreRow row, int key, SeenKeys seen, LanePlace place, Mask mask) {
  const bool edge = !contains(seen.every, key, key + FA_BK);
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = key + j * fragment_size;
    if (!sees(seen.some, first, first + fragment_size)) {
      s.fragment[j] = Fragment<float>(minus_infinity);
      continue;
    }
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const int column = first + place.column + i;
      s.fragment[j][i] = score(s.fragment[j][i], scale, row, column, mask);
      if (edge) s.fragment[j][i] = hidden(s.fragment[j][i], row, column);
    }
  }
}

#ifdef FA_PAGED
// ---- keys in pages that do not exist are invisible

/// Which those are, of the block from `key` on.
template <class Keys>
FA_FN void find_missing(threadgroup short* missing, Keys keys, int key, KeyRange needed, uint thread_index) {
  const int i = int(thread_index);
  if (i < FA_BK) missing[i] = contains(needed, key + i, key + i + 1) && !keys.slot(key + i).exists() ? 1 : 0;
}

FA_FN void hide_missing(thread Tile<key_tiles>& s, const threadgroup short* missing, LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      if (missing[j * fragment_size + place.column + i] != 0) s.fragment[j][i] = minus_infinity;
    }
  }
}
#endif

#ifdef FA_DROPOUT
template <class Key>
FA_FN void drop(
    thread Tile<key_tiles>& p, ScoreRow row, int key, LanePlace place, Params params, Key philox_key) {
  const DropoutCall call = dropout_call(params, philox_key, row.dropout_head, row.query, uint(key + place.column));
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      if (!call.keeps(row.query, uint(key + j * fragment_size + place.column + i))) p.fragment[j][i] = 0.0f;
    }
  }
}
#else
FA_FN void drop(thread Tile<key_tiles>&, ScoreRow, int, LanePlace, Params, Absent) {}
#endif

// ---- two simdgroups share rows: each adds the other's part of S, lane by lane

FA_FN threadgroup float* part_of_lane(threadgroup float* parts, uint simdgroup, short j, uint lane) {
  return parts + ((simdgroup * key_tiles + j) * 32 + lane) * 2;
}

FA_FN void store_part(thread const Tile<key_tiles>& s, threadgroup float* parts, uint simdgroup, uint lane) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    threadgroup float* part = part_of_lane(parts, simdgroup, j, lane);
    part[0] = s.fragment[j].x;
    part[1] = s.fragment[j].y;
  }
}

FA_FN void add_part(thread Tile<key_tiles>& s, threadgroup float* parts, uint simdgroup, uint lane) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const threadgroup float* part = part_of_lane(parts, simdgroup, j, lane);
    s.fragment[j] += Fragment<float>(part[0], part[1]);
  }
}

}  // namespace flash_attn
