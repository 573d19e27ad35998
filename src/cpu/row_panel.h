// The query rows in the lanes of a score panel, and all that a kernel must know of each of them.
#pragma once

#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "semantics/score.h"
#include "semantics/softmax.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr std::int32_t lowest_int = -2147483647 - 1;
constexpr std::int32_t highest_int = 2147483647;

// How a problem's scores are scaled. Scores live in log2 units; with softcap, they are tanh's argument first.
struct ScoreScale {
  float query;    // what q.k is multiplied by
  float softcap;  // what tanh is multiplied by; 0: no softcap

  explicit ScoreScale(const AttentionProblem& problem)
      : query(problem.softcap > 0 ? problem.softmax_scale / problem.softcap : problem.softmax_scale * log2_e),
        softcap(problem.softcap > 0 ? problem.softcap * log2_e : 0.0f) {}
};

constexpr int row_granule = 4;  // rows whose visible keys are known together

struct RowPanel {
  int rows;     // in use; the lanes after them repeat the last one
  int vectors;  // 1 to panel_vectors: lanes computed / lanes
  std::int32_t query[panel_rows];
  std::int32_t head[panel_rows];

  // Keys that each row sees; (0, 0) when none.
  std::int32_t key_begin[panel_rows];
  std::int32_t key_end[panel_rows];
  KeyRange some;                                       // keys that a row sees lie in here
  KeyRange all;                                        // keys in here are seen by every row
  KeyRange some_of_granule[panel_rows / row_granule];  // as `some`, of a few rows

  // For a call that uses them.
  float diagonal[panel_rows];    // key position on the row's diagonal, for ALiBi
  float slope_log2[panel_rows];  // ALiBi slope in log2 units
  std::int64_t mask_offset[panel_rows];
  std::uint32_t dropout_head[panel_rows];  // (batch * heads_q + head) * 32

  int width() const { return vectors * lanes; }

  RowPanel() = default;

  RowPanel(const AttentionProblem& problem, const AttentionInputs& inputs, const Unit& unit, int row_begin, int row_end) {
    rows = row_end - row_begin < panel_rows ? row_end - row_begin : panel_rows;
    vectors = (rows + lanes - 1) / lanes;
    some = {highest_int, lowest_int};
    all = {lowest_int, highest_int};
    int next_query = row_begin % unit.rows_of_head() / unit.group;
    int next_member = row_begin % unit.group;
    int next_head = unit.first_head + row_begin / unit.rows_of_head() * unit.group;
    for (int lane = 0; lane < width(); ++lane) {
      query[lane] = lane < rows ? next_query : query[rows - 1];
      head[lane] = lane < rows ? next_head + next_member : head[rows - 1];
      if (++next_member == unit.group) {
        next_member = 0;
        if (++next_query == unit.sequence.q.length) {
          next_query = 0;
          next_head += unit.group;
        }
      }
      KeyRange keys = visible_keys(unit.rule, query[lane]);
      KeyRange& some_here = some_of_granule[lane / row_granule];
      if (lane % row_granule == 0) some_here = {highest_int, lowest_int};
      if (keys.begin >= keys.end) {
        keys = {0, 0};
      } else {
        some = {min_of(some.begin, keys.begin), max_of(some.end, keys.end)};
        some_here = {min_of(some_here.begin, keys.begin), max_of(some_here.end, keys.end)};
      }
      all = {max_of(all.begin, keys.begin), min_of(all.end, keys.end)};
      key_begin[lane] = keys.begin;
      key_end[lane] = keys.end;
      if (inputs.alibi_slopes) {
        diagonal[lane] = static_cast<float>(query[lane] + unit.rule.seqlen_k - unit.rule.seqlen_q);
        slope_log2[lane] = inputs.alibi_slopes[unit.batch * inputs.alibi_batch_stride + head[lane]] * log2_e;
      }
      if (inputs.attn_mask.data) {
        mask_offset[lane] =
            unit.batch * inputs.attn_mask.batch + head[lane] * inputs.attn_mask.head + query[lane] * inputs.attn_mask.row;
      }
      if (problem.has_dropout) {
        dropout_head[lane] = static_cast<std::uint32_t>(unit.batch * problem.heads_q + head[lane]) * 32u;
      }
    }
  }

  // Offset of a lane's row in a tensor of query rows.
  std::int64_t offset(const Unit& unit, const Strides& strides, int lane) const {
    return unit.batch * strides.batch + (unit.sequence.q.begin + std::int64_t{query[lane]}) * strides.seq +
           head[lane] * strides.head;
  }
  std::int64_t offset(const Unit& unit, const LseStrides& strides, int lane) const {
    return unit.batch * strides.batch + head[lane] * strides.head +
           (unit.sequence.q.begin + std::int64_t{query[lane]}) * strides.seq;
  }
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
