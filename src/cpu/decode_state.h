// What a task of decode works on: the rows of its unit, and the scores of a block of keys.
#pragma once

#include "cpu/code_operand.h"
#include "cpu/few_rows.h"
#include "cpu/online_softmax.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int max_decode_panels = (max_decode_rows + panel_rows - 1) / panel_rows;

// float32 asks for more than the precision of integers; and what is masked later is read from any page, so there must be one.
inline bool may_multiply_integers(const AttentionProblem& problem) {
  return problem.dtype != DType::float32 && problem.cache_rows > 0;
}

// Whether the products of a call are of integers: of int16, or of codes and bytes.
inline bool multiplies_integers(const DecodePass& pass) {
  return FA_INTEGER_DOT && pass.inputs->k.dtype == DType::int8 && may_multiply_integers(*pass.problem);
}
inline bool multiplies_codes(const DecodePass& pass) {
  return FA_CODE_DOT && is_affine(pass.inputs->k.dtype) && may_multiply_integers(*pass.problem);
}

constexpr int max_words_of_weights = (max_decode_block + max_rows_of_step) / 4;  // of four keys each

struct DecodeSizes {
  int rows;
  std::int64_t score_stride;  // floats, as all of these
  std::int64_t q_stride;
  std::int64_t qv_stride;  // 0: no qv
  std::int64_t o_stride;
  std::int64_t numbers;          // of a block's keys
  std::int64_t ordered_numbers;  // of codes that are multiplied; 0: none
  std::int64_t sums_stride;      // of integers; 0: none
  std::int64_t words;            // of what is multiplied and not float32
  int groups;                    // of codes that are multiplied, at most; 1: none

  DecodeSizes(const DecodePass& pass, int unit_rows)
      : rows(unit_rows),
        score_stride(round_up(unit_rows, lanes)),
        q_stride(round_up(pass.problem->head_dim, lanes)),
        qv_stride(pass.problem->has_qv ? round_up(pass.problem->head_dim_v, lanes) : 0),
        o_stride(round_up(pass.problem->head_dim_v, lanes)),
        numbers(0),
        ordered_numbers(0),
        sums_stride(0),
        words(multiplies_integers(pass) || (FA_BFLOAT16_DOT && pass.inputs->v.dtype == DType::bfloat16) ? scores() : 0),
        groups(1) {
    const std::int64_t heads = unit_rows / pass.problem->group();  // at most
    const int groups_of_codes = max_of(pass.problem->head_dim, pass.problem->head_dim_v) / quantization_group;
    if (multiplies_integers(pass)) {
      q_stride = integer_words(pass.problem->head_dim);
      if (pass.problem->has_qv) qv_stride = integer_words(pass.problem->head_dim_v);
      o_stride = sums_stride = round_up(pass.problem->head_dim_v, int8_chunk);
      numbers = max_decode_block * heads + lanes;
    } else if (is_affine(pass.inputs->k.dtype)) {
      numbers = 2 * max_decode_block * heads * groups_of_codes + lanes;
    }
    if (multiplies_codes(pass)) {
      groups = groups_of_codes;
      q_stride = code_words(pass.problem->head_dim);
      if (pass.problem->has_qv) qv_stride = code_words(pass.problem->head_dim_v);
      sums_stride = o_stride;
      ordered_numbers = 2 * ((max_decode_block + max_rows_of_step) * heads + lanes) * groups;
      words = 2 * max_words_of_weights * groups * score_stride;
    }
  }

  std::int64_t scores() const { return (max_decode_block + max_rows_of_step) * score_stride; }
  std::int64_t mask_rows() const { return std::int64_t{lanes} * round_up(max_decode_block, lanes); }
  std::int64_t total() const {
    return scores() + words + mask_rows() + rows * (q_stride + qv_stride + o_stride + sums_stride + 2 * groups) +
           (3 + 2 * groups) * score_stride + numbers + ordered_numbers;
  }
};

inline std::int64_t decode_scratch_size(const DecodePass& pass, std::int32_t rows) { return DecodeSizes(pass, rows).total(); }

struct DecodeState {
  DecodeSizes sizes;
  int panel_count;
  RowPanel panels[max_decode_panels];
  SoftmaxState softmax[max_decode_panels];
  float* scores;
  float* mask_rows;
  float* q;
  float* qv;
  float* o;
  float* alpha;
  float* numbers;
  float* ordered_numbers;
  float* words;  // of scores or of P; beside codes [group][high, low][key / 4][score_stride]

  // Of integers.
  std::int32_t* sums;  // of a block, as o
  float* q_factors;    // [score_stride], as alpha
  float* qv_factors;
  float* q_sums;  // [rows][groups of k], of each group's dims
  float* qv_sums;
  float* row_units;  // [groups][score_stride]
  float* row_biases;

  DecodeState(const DecodePass& pass, const DecodeTask& task, float* scratch)
      : sizes(pass, task.unit->packed_rows()), panel_count((sizes.rows + panel_rows - 1) / panel_rows) {
    const auto take = [&scratch](std::int64_t size) { return (scratch += size) - size; };
    scores = take(sizes.scores());
    mask_rows = take(sizes.mask_rows());
    q = take(sizes.rows * sizes.q_stride);
    qv = take(sizes.rows * sizes.qv_stride);
    o = take(sizes.rows * sizes.o_stride);
    alpha = take(sizes.score_stride);
    numbers = take(sizes.numbers);
    ordered_numbers = take(sizes.ordered_numbers);
    words = take(sizes.words);
    sums = reinterpret_cast<std::int32_t*>(take(sizes.rows * sizes.sums_stride));
    q_factors = take(sizes.score_stride);
    qv_factors = take(sizes.score_stride);
    q_sums = take(sizes.rows * std::int64_t{sizes.groups});
    qv_sums = take(sizes.rows * std::int64_t{sizes.groups});
    row_units = take(sizes.groups * sizes.score_stride);
    row_biases = take(sizes.groups * sizes.score_stride);
    // The columns after the last row are computed with the others.
    if (sizes.rows < sizes.score_stride) std::memset(scores, 0, static_cast<std::size_t>(sizes.scores()) * sizeof(float));
    std::memset(o, 0, static_cast<std::size_t>(sizes.rows * sizes.o_stride) * sizeof(float));
  }
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
