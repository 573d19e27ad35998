// A block of keys in threadgroup memory: K in pairs, V in rows.
//
// A lane's two elements of K^T are two keys at one head dim. Pairs of keys are therefore interleaved when they are stored,
//   K [keys / 2][dims][2],   V [keys][dims],
// so that every fragment of either is read by lanes in pairs of neighbours; the padding spreads a fragment's rows over all banks.
#pragma once

#include "metal/key_source.metal"
#include "metal/tile.metal"

namespace flash_attn {

FA_CONSTANT int threads = FA_SIMDGROUPS * 32;
FA_CONSTANT int threadgroup_memory_limit = 32 * 1024;

// In fragments. Simdgroups that share rows have a part of the head dims each.
FA_CONSTANT int key_tiles = FA_BK / fragment_size;
FA_CONSTANT int dim_tiles = (fragments(FA_D) + FA_SPLIT_D - 1) / FA_SPLIT_D;
FA_CONSTANT int value_tiles = (fragments(FA_DV) + FA_SPLIT_D - 1) / FA_SPLIT_D;

FA_CONSTANT int stored_dims = dim_tiles * FA_SPLIT_D * fragment_size;
FA_CONSTANT int stored_value_dims = value_tiles * FA_SPLIT_D * fragment_size;
FA_CONSTANT int key_pitch = 2 * stored_dims + (stored_dims / fragment_size % 2 == 0 ? 16 : 0);
FA_CONSTANT int value_pitch = stored_value_dims + 16 / int(sizeof(KeyElement));
FA_CONSTANT int key_block_size = FA_BK / 2 * key_pitch;
FA_CONSTANT int value_block_size = FA_BK * value_pitch;

// One memory for both where two do not fit beside what simdgroups tell each other.
FA_CONSTANT int partial_scores_size = FA_SPLIT_D > 1 ? FA_SIMDGROUPS * fragment_size * FA_BK : 0;
FA_CONSTANT bool shares_memory =
    (key_block_size + value_block_size) * int(sizeof(KeyElement)) + partial_scores_size * 4 > threadgroup_memory_limit;
#ifdef FA_QV
FA_CONSTANT bool scores_values = true;
#else
FA_CONSTANT bool scores_values = false;
#endif
static_assert(!(shares_memory && scores_values), "with qv, K and V are needed at once");
FA_CONSTANT int key_memory_size = shares_memory && value_block_size > key_block_size ? value_block_size : key_block_size;
FA_CONSTANT int value_memory_size = shares_memory ? 1 : value_block_size;

// Where a kv head's K or V come from.
template <class Keys, class Tensor>
struct KeyRows {
  Keys keys;
  Tensor tensor;
  int kv_head;

  /// Head dims of `key` from `dim` on; zeros unless it is `needed`: NaN may stand in other keys.
  FA_FN Run<KeyElement, key_run> run(int key, int dim, KeyRange needed) const thread {
    Run<KeyElement, key_run> run = {};
    if (!contains(needed, key, key + 1)) return run;
    const KeySlot slot = keys.slot(key);
    if (slot.exists()) run = tensor.run(slot, kv_head, dim);
    return run;
  }
};

template <class Keys, class Tensor>
FA_FN KeyRows<Keys, Tensor> key_rows(Keys keys, Tensor tensor, int kv_head) {
  return {keys, tensor, kv_head};
}

// ---- loads: runs of head dims are dealt to all threads, as many whole rows a turn as there are threads for

FA_FN constexpr int rows_a_turn(int dims) { return threads / (dims / key_run); }
FA_FN constexpr int turns_of(int rows, int dims) { return (rows + rows_a_turn(dims) - 1) / rows_a_turn(dims); }

// The run of this thread in its first turn.
struct DealtRun {
  int row;
  int dim;
};

FA_FN DealtRun dealt_run(int dims, uint thread_index) {
  const int runs = dims / key_run;
  return {int(thread_index) / runs, int(thread_index) % runs * key_run};
}

FA_CONSTANT int no_key = -2;  // nor is the next one

/// Whether there is a row for the thread in this turn.
template <int rows, int dims>
FA_FN bool is_dealt(DealtRun first, int turn) {
  constexpr int rows_of_turn = rows_a_turn(dims);
  if (rows % rows_of_turn == 0 && threads % (dims / key_run) == 0) return true;
  return first.row < rows_of_turn && first.row + turn * rows_of_turn < rows;
}

// A load is asked for before other work and stored after it, unless Q and O leave no registers for that.
FA_CONSTANT bool loads_early = dim_tiles + value_tiles <= 16 && sizeof(KeyElement) == 2;

// A thread's runs of a block: of `neighbours` keys a turn.
template <int rows, int dims, int neighbours>
struct DealtRuns {
  Run<KeyElement, key_run> runs[turns_of(rows, dims)][neighbours];

  /// Of keys from `key` on, of which the block's rows see those that are `needed`.
  template <class Rows>
  FA_FN void load(Rows from, int key, KeyRange needed, uint thread_index) thread {
    const DealtRun run = dealt_run(dims, thread_index);
    FA_UNROLL
    for (short turn = 0; turn < turns_of(rows, dims); ++turn) {
      const int dealt_key = key + neighbours * run.row + neighbours * turn * rows_a_turn(dims);
      const int first = is_dealt<rows, dims>(run, turn) ? dealt_key : no_key;
      FA_UNROLL
      for (short i = 0; i < neighbours; ++i) runs[turn][i] = from.run(first + i, run.dim, needed);
    }
  }
};

using KeyLoad = DealtRuns<FA_BK / 2, stored_dims, 2>;
using ValueLoad = DealtRuns<FA_BK, stored_value_dims, 1>;

FA_FN void store_keys(thread const KeyLoad& load, threadgroup KeyElement* k, uint thread_index) {
  const DealtRun run = dealt_run(stored_dims, thread_index);
  threadgroup KeyElement* to = k + run.row * key_pitch + 2 * run.dim;
  FA_UNROLL
  for (short turn = 0; turn < turns_of(FA_BK / 2, stored_dims); ++turn) {
    if (!is_dealt<FA_BK / 2, stored_dims>(run, turn)) break;
    FA_UNROLL
    for (short j = 0; j < key_run; ++j) {
      to[turn * rows_a_turn(stored_dims) * key_pitch + 2 * j] = load.runs[turn][0].values[j];
      to[turn * rows_a_turn(stored_dims) * key_pitch + 2 * j + 1] = load.runs[turn][1].values[j];
    }
  }
}

FA_FN void store_values(thread const ValueLoad& load, threadgroup KeyElement* v, uint thread_index) {
  const DealtRun run = dealt_run(stored_value_dims, thread_index);
  threadgroup KeyElement* to = v + run.row * value_pitch + run.dim;
  FA_UNROLL
  for (short turn = 0; turn < turns_of(FA_BK, stored_value_dims); ++turn) {
    if (!is_dealt<FA_BK, stored_value_dims>(run, turn)) break;
    load.runs[turn][0].store(to + turn * rows_a_turn(stored_value_dims) * value_pitch);
  }
}

// ---- fragments

/// K^T of eight head dims and eight keys.
FA_FN Fragment<KeyElement> key_fragment(const threadgroup KeyElement* k, int dim, int key, LanePlace place) {
  return load_fragment<KeyElement>(k + (key + place.column) / 2 * key_pitch + 2 * (dim + place.row), {0, 0}, 0, 1);
}

/// V of eight keys and eight head dims.
FA_FN Fragment<KeyElement> value_fragment(const threadgroup KeyElement* v, int key, int dim, LanePlace place) {
  return load_fragment<KeyElement>(v + key * value_pitch + dim, place, value_pitch, 1);
}

/// ... transposed, where V is scored too.
FA_FN Fragment<KeyElement> transposed_value_fragment(const threadgroup KeyElement* v, int dim, int key, LanePlace place) {
  return load_fragment<KeyElement>(v + key * value_pitch + dim, place, 1, value_pitch);
}

// ---- products

/// S = Q K^T of the fragments that hold keys of `seen`.
FA_FN void multiply_by_keys(
    thread Tile<key_tiles>& s, thread const Tile<dim_tiles, FA_T>& q, const threadgroup KeyElement* k, int key, KeyRange seen,
    LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = j * fragment_size;
    if (!sees(seen, key + first, key + first + fragment_size)) continue;
    FA_UNROLL
    for (short d = 0; d < dim_tiles; ++d) {
      multiply_accumulate(s.fragment[j], q.fragment[d], key_fragment(k, d * fragment_size, first, place));
    }
  }
}

#ifdef FA_QV
/// S += Qv V^T, likewise.
FA_FN void multiply_by_scored_values(
    thread Tile<key_tiles>& s, thread const Tile<value_tiles, FA_T>& qv, const threadgroup KeyElement* v, int key, KeyRange seen,
    LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = j * fragment_size;
    if (!sees(seen, key + first, key + first + fragment_size)) continue;
    FA_UNROLL
    for (short d = 0; d < value_tiles; ++d) {
      multiply_accumulate(s.fragment[j], qv.fragment[d], transposed_value_fragment(v, d * fragment_size, first, place));
    }
  }
}
#endif

/// O += P V of the fragments that hold keys of `seen`.
FA_FN void multiply_by_values(
    thread Tile<value_tiles>& o, thread const Tile<key_tiles>& p, const threadgroup KeyElement* v, int key, KeyRange seen,
    LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = j * fragment_size;
    if (!sees(seen, key + first, key + first + fragment_size)) continue;
    FA_UNROLL
    for (short d = 0; d < value_tiles; ++d) {
      multiply_accumulate(o.fragment[d], p.fragment[j], value_fragment(v, first, d * fragment_size, place));
    }
  }
}

}  // namespace flash_attn
