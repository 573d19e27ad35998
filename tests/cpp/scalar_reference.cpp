#include "scalar_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "element.h"
#include "semantics/dropout.h"
#include "semantics/mask.h"
#include "semantics/score.h"

namespace flash_attn::test {
namespace {

constexpr std::int64_t highest = std::numeric_limits<std::int32_t>::max();
constexpr double infinity = std::numeric_limits<double>::infinity();

struct DoubleWords {
  static double tanh(double x) { return std::tanh(x); }
  static double abs(double x) { return std::abs(x); }
};

std::int64_t slots_of_cache_row(const AttentionProblem& problem) {
  return problem.page_size > 0 ? problem.page_size : problem.max_seqlen_k;
}

// Sizes of the first two axes of q, out; of k, v.
struct Rows {
  std::int64_t batch;
  std::int64_t seq;
};

Rows query_axes(const AttentionProblem& problem) {
  if (problem.varlen) return {1, problem.total_q};
  return {problem.batch, problem.max_seqlen_q};
}

Rows key_axes(const AttentionProblem& problem) {
  if (problem.cached) return {problem.cache_rows, slots_of_cache_row(problem)};
  if (problem.varlen) return {1, problem.total_k};
  return {problem.batch, problem.max_seqlen_k};
}

// A tensor read once into double, contiguous.
class Dense {
 public:
  Dense(const cpu::ConstTensor& tensor, const cpu::ConstQuantization& quantization, Rows rows, std::int64_t heads,
        std::int64_t dim)
      : heads_(heads), dim_(dim) {
    values_.reserve(static_cast<std::size_t>(rows.batch * rows.seq * heads * dim));
    for (std::int64_t batch = 0; batch < rows.batch; ++batch) {
      for (std::int64_t row = 0; row < rows.seq; ++row) {
        for (std::int64_t head = 0; head < heads; ++head) {
          for (std::int64_t d = 0; d < dim; ++d) {
            values_.push_back(read_key(tensor, quantization, {batch, row, true}, head, d));
          }
        }
      }
    }
  }

  const double* row(std::int64_t row, std::int64_t head) const { return values_.data() + (row * heads_ + head) * dim_; }

 private:
  std::int64_t heads_, dim_;
  std::vector<double> values_;
};

Dense dense_queries(const AttentionProblem& problem, const cpu::ConstTensor& tensor, std::int64_t dim) {
  return Dense(tensor, {}, query_axes(problem), problem.heads_q, dim);
}

Dense dense_keys(const AttentionProblem& problem, const cpu::ConstTensor& tensor, const cpu::ConstQuantization& quantization,
                 std::int64_t dim) {
  return Dense(tensor, quantization, key_axes(problem), problem.heads_k, dim);
}

struct DenseInputs {
  Dense q, qv, k, v;

  DenseInputs(const AttentionProblem& problem, const cpu::AttentionInputs& inputs)
      : q(dense_queries(problem, inputs.q, problem.head_dim)),
        qv(dense_queries(problem, inputs.qv, problem.has_qv ? problem.head_dim_v : 0)),
        k(dense_keys(problem, inputs.k, inputs.cache.k, problem.head_dim)),
        v(dense_keys(problem, inputs.v, inputs.cache.v, problem.head_dim_v)) {}
};

double dot(const double* a, const double* b, std::int32_t dim) {
  double sum = 0.0;
  for (std::int32_t d = 0; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

double sum_of_magnitudes(const double* a, const double* b, std::int32_t dim) {
  double sum = 0.0;
  for (std::int32_t d = 0; d < dim; ++d) sum += std::abs(a[d] * b[d]);
  return sum;
}

Extent extent_of(const std::int32_t* cu_seqlens, const std::int32_t* seqused, std::int32_t total, std::int32_t max_seqlen,
                 std::int32_t batch, std::int32_t previous_end) {
  const std::int32_t used = seqused ? seqused[batch] : max_seqlen;
  if (!cu_seqlens) return sequence_extent(0, max_seqlen, 0, max_seqlen, max_seqlen, used);
  return sequence_extent(cu_seqlens[batch], cu_seqlens[batch + 1], previous_end, total, max_seqlen, used);
}

// A key that a query sees.
struct VisibleKey {
  std::int32_t key;
  std::int64_t row;   // among key_rows
  double score;       // natural units, after softcap, ALiBi and mask
  double derivative;  // d(score) / d(scale * q.k)
  double weight;      // what dropout multiplies the probability by: 0, 1 or 1 / (1 - p)
  double probability;
};

struct Row {
  std::vector<VisibleKey> keys;
  double products = 0.0;  // see ReferenceForward
  double lse = -infinity;
  double sink_probability = 0.0;
};

// The scores and probabilities of query `i` of head `head`.
Row attend(const AttentionProblem& problem, const cpu::AttentionInputs& inputs, const DenseInputs& dense,
           const SequencePair& pair, std::int32_t batch, std::int32_t head, std::int32_t i) {
  const std::int32_t kv_head = head / problem.group();
  const double* q = dense.q.row(query_row(problem, pair, batch, i), head);
  const double* qv = dense.qv.row(query_row(problem, pair, batch, i), head);
  const KeyRange range = visible_keys(problem.mask_rule(pair.q.length, pair.k.length), i);
  Row row;
  for (std::int32_t j = range.begin; j < range.end; ++j) {
    const KeyPlace place = key_place(problem, inputs, pair, batch, j);
    if (!place.exists) continue;
    const std::int64_t key_row = place.batch * key_axes(problem).seq + place.row;
    const double* k = dense.k.row(key_row, kv_head);
    double product = dot(q, k, problem.head_dim);
    double magnitude = sum_of_magnitudes(q, k, problem.head_dim);
    if (problem.has_qv) {
      const double* v = dense.v.row(key_row, kv_head);
      product += dot(qv, v, problem.head_dim_v);
      magnitude += sum_of_magnitudes(qv, v, problem.head_dim_v);
    }
    row.products = std::max(row.products, std::abs(problem.softmax_scale) * magnitude);
    VisibleKey visible = {j, key_row, problem.softmax_scale * product, 1.0, 1.0, 0.0};
    if (problem.softcap > 0) {
      const double softcap = problem.softcap;
      const double tanh_value = softcap_tanh<double, DoubleWords>(visible.score, 1.0 / softcap);
      visible.score = softcap * tanh_value;
      visible.derivative = softcap_derivative(tanh_value);
    }
    if (inputs.alibi_slopes) {
      const double slope = inputs.alibi_slopes[batch * inputs.alibi_batch_stride + head];
      const double distance = std::int64_t{i} + pair.k.length - pair.q.length - j;
      visible.score += alibi_bias<double, DoubleWords>(slope, distance);
    }
    if (const cpu::MaskTensor& mask = inputs.attn_mask; mask.data) {
      const double value =
          read_element(mask.data, mask.dtype, batch * mask.batch + head * mask.head + i * mask.row + j * mask.key);
      const bool hidden = mask.dtype == DType::boolean ? value == 0.0 : value == -infinity;
      if (hidden) continue;
      if (mask.dtype != DType::boolean) visible.score += value;
    }
    if (problem.has_dropout) {
      const auto head_offset = static_cast<std::uint32_t>(batch * problem.heads_q + head) * 32u;
      const bool keep = dropout_keeps(problem.dropout_keep_24, inputs.dropout_key[0], inputs.dropout_key[1], head_offset, i, j);
      visible.weight = keep ? problem.dropout_scale : 0.0;
    }
    row.keys.push_back(visible);
  }

  const double sink = inputs.learnable_sink ? inputs.learnable_sink[head] : -infinity;
  double maximum = sink;
  for (const VisibleKey& visible : row.keys) maximum = std::max(maximum, visible.score);
  if (maximum == -infinity) return {};
  double sum = std::exp(sink - maximum);
  for (const VisibleKey& visible : row.keys) sum += std::exp(visible.score - maximum);
  row.lse = maximum + std::log(sum);
  for (VisibleKey& visible : row.keys) visible.probability = std::exp(visible.score - maximum) / sum;
  row.sink_probability = std::exp(sink - maximum) / sum;
  return row;
}

std::vector<double> zeros(std::int64_t size) { return std::vector<double>(static_cast<std::size_t>(size), 0.0); }

Sums zero_sums(std::int64_t size) { return {zeros(size), zeros(size)}; }

// sums[row][head] += factor * terms
void add_scaled(Sums& sums, std::int64_t row, std::int64_t heads, std::int64_t head, double factor, const double* terms,
                std::int32_t dim) {
  for (std::int32_t d = 0; d < dim; ++d) {
    const auto index = static_cast<std::size_t>((row * heads + head) * dim + d);
    sums.values[index] += factor * terms[d];
    sums.magnitudes[index] += std::abs(factor * terms[d]);
  }
}

template <class Visit>
void for_each_query(const AttentionProblem& problem, const cpu::AttentionInputs& inputs, Visit visit) {
  const std::vector<SequencePair> pairs = sequence_pairs(problem, inputs);
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const SequencePair& pair = pairs[static_cast<std::size_t>(batch)];
    for (std::int32_t head = 0; head < problem.heads_q; ++head) {
      for (std::int32_t i = 0; i < pair.q.length; ++i) visit(pair, batch, head, i);
    }
  }
}

// What the cache holds, new keys behind it, and no leftpad; all of it inside the row.
SequencePair cached_pair(const AttentionProblem& problem, const cpu::AttentionInputs& inputs, std::int32_t batch, Extent q) {
  const cpu::KeyCache& cache = inputs.cache;
  const std::int64_t row = cache.batch_idx ? cache.batch_idx[batch] : batch;
  if (row < 0 || row >= (problem.page_size > 0 ? problem.table_rows : problem.cache_rows)) return {q, {0, 0}, 0, {0, 0}, 0};

  const std::int64_t slots = problem.page_size > 0 ? std::int64_t{problem.table_blocks} * problem.page_size : highest;
  const std::int64_t capacity = std::min<std::int64_t>(problem.max_seqlen_k, slots);
  const std::int64_t held = inputs.seqused_k ? std::clamp<std::int64_t>(inputs.seqused_k[batch], 0, capacity) : capacity;
  std::int64_t first_new = 0;
  std::int64_t given = problem.seqlen_new;
  if (cache.cu_seqlens_new) {
    first_new = std::clamp(cache.cu_seqlens_new[batch], 0, problem.total_new);
    given = std::clamp<std::int64_t>(cache.cu_seqlens_new[batch + 1], first_new, problem.total_new) - first_new;
  }
  const std::int64_t appended = std::min(given, capacity - held);
  const std::int64_t leftpad = cache.leftpad ? std::clamp<std::int64_t>(cache.leftpad[batch], 0, held + appended) : 0;
  const auto extent = [](std::int64_t begin, std::int64_t length) {
    return Extent{static_cast<std::int32_t>(begin), static_cast<std::int32_t>(length)};
  };
  return {q, extent(leftpad, held + appended - leftpad), static_cast<std::int32_t>(row), extent(held, appended),
          static_cast<std::int32_t>(first_new)};
}

}  // namespace

std::vector<SequencePair> sequence_pairs(const AttentionProblem& problem, const cpu::AttentionInputs& inputs) {
  std::vector<SequencePair> pairs;
  SequencePair previous = {};
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const Extent q = extent_of(inputs.cu_seqlens_q, inputs.seqused_q, problem.total_q, problem.max_seqlen_q, batch,
                               previous.q.begin + previous.q.length);
    if (problem.cached) {
      previous = cached_pair(problem, inputs, batch, q);
    } else {
      previous = {q,
                  extent_of(inputs.cu_seqlens_k, inputs.seqused_k, problem.total_k, problem.max_seqlen_k, batch,
                            previous.k.begin + previous.k.length),
                  batch,
                  {0, 0},
                  0};
    }
    pairs.push_back(previous);
  }
  return pairs;
}

std::int64_t query_rows(const AttentionProblem& problem) { return query_axes(problem).batch * query_axes(problem).seq; }

std::int64_t key_rows(const AttentionProblem& problem) { return key_axes(problem).batch * key_axes(problem).seq; }

std::int64_t query_row(const AttentionProblem& problem, const SequencePair& pair, std::int64_t batch, std::int64_t i) {
  return (problem.varlen ? pair.q.begin : batch * problem.max_seqlen_q) + i;
}

KeyPlace key_place(const AttentionProblem& problem, const cpu::AttentionInputs& inputs, const SequencePair& pair,
                   std::int64_t batch, std::int64_t j) {
  if (problem.cached) return cache_place(problem, inputs, pair, pair.k.begin + j);
  if (problem.varlen) return {0, pair.k.begin + j, true};
  return {batch, j, true};
}

KeyPlace cache_place(const AttentionProblem& problem, const cpu::AttentionInputs& inputs, const SequencePair& pair,
                     std::int64_t slot) {
  if (problem.page_size == 0) return {pair.cache_row, slot, true};
  const std::int64_t entry = std::int64_t{pair.cache_row} * problem.table_blocks + slot / problem.page_size;
  const std::int64_t page = inputs.cache.block_table[entry];
  return {page, slot % problem.page_size, 0 <= page && page < problem.cache_rows};
}

double read_key(const cpu::ConstTensor& tensor, const cpu::ConstQuantization& quantization, const KeyPlace& place,
                std::int64_t head, std::int64_t d) {
  const auto offset = [&](const cpu::Strides& strides) {
    return place.batch * strides.batch + place.row * strides.seq + head * strides.head;
  };
  if (!has_codes(tensor.dtype)) return read_element(tensor.data, tensor.dtype, offset(tensor.strides) + d * tensor.strides.dim);
  const std::int64_t group = tensor.dtype == DType::int8 ? 0 : d / quantization_group;
  const auto factor = [&](const void* data, const cpu::Strides& strides) {
    return read_element(data, quantization.dtype, offset(strides) + group * strides.dim);
  };
  const double scaled =
      read_code(tensor.data, tensor.dtype, offset(tensor.strides), d) * factor(quantization.scales, quantization.scale_strides);
  return quantization.biases ? scaled + factor(quantization.biases, quantization.bias_strides) : scaled;
}

ReferenceForward reference_forward(const AttentionProblem& problem, const cpu::AttentionInputs& inputs) {
  const DenseInputs dense(problem, inputs);
  const std::int64_t rows = query_rows(problem);
  ReferenceForward result = {zero_sums(rows * problem.heads_q * problem.head_dim_v),
                             std::vector<double>(static_cast<std::size_t>(rows * problem.heads_q), -infinity),
                             zeros(rows * problem.heads_q)};
  for_each_query(problem, inputs, [&](const SequencePair& pair, std::int32_t batch, std::int32_t head, std::int32_t i) {
    const Row row = attend(problem, inputs, dense, pair, batch, head, i);
    const std::int64_t position = query_row(problem, pair, batch, i);
    for (const VisibleKey& visible : row.keys) {
      const double* v = dense.v.row(visible.row, head / problem.group());
      add_scaled(result.out, position, problem.heads_q, head, visible.weight * visible.probability, v, problem.head_dim_v);
    }
    result.lse[static_cast<std::size_t>(position * problem.heads_q + head)] = row.lse;
    result.products[static_cast<std::size_t>(position * problem.heads_q + head)] = row.products;
  });
  return result;
}

ReferenceGradients reference_backward(const AttentionProblem& problem, const cpu::AttentionInputs& inputs,
                                      const cpu::BackwardInputs& saved, const cpu::Gradients& shapes) {
  const std::int32_t dim = problem.head_dim;
  const std::int32_t dim_v = problem.head_dim_v;
  const DenseInputs dense(problem, inputs);
  const Dense saved_out = dense_queries(problem, saved.out, dim_v);
  const Dense saved_dout = dense_queries(problem, saved.dout, dim_v);
  ReferenceGradients result = {
      zero_sums(query_rows(problem) * problem.heads_q * dim), zero_sums(key_rows(problem) * problem.heads_k * dim),
      zero_sums(key_rows(problem) * problem.heads_k * dim_v), zeros(problem.heads_q),
      zeros(std::int64_t{shapes.dmask_batch} * shapes.dmask_heads * shapes.dmask_rows * shapes.dmask_keys)};
  const auto dmask_index = [&](std::int64_t batch, std::int64_t head, std::int64_t i, std::int64_t j) {
    std::int64_t index = shapes.dmask_batch == 1 ? 0 : batch;
    index = index * shapes.dmask_heads + (shapes.dmask_heads == 1 ? 0 : head);
    index = index * shapes.dmask_rows + (shapes.dmask_rows == 1 ? 0 : i);
    return static_cast<std::size_t>(index * shapes.dmask_keys + (shapes.dmask_keys == 1 ? 0 : j));
  };

  for_each_query(problem, inputs, [&](const SequencePair& pair, std::int32_t batch, std::int32_t head, std::int32_t i) {
    const Row row = attend(problem, inputs, dense, pair, batch, head, i);
    const std::int32_t kv_head = head / problem.group();
    const std::int64_t query = query_row(problem, pair, batch, i);
    const double* q = dense.q.row(query, head);
    const double* dout = saved_dout.row(query, head);
    double delta = dot(dout, saved_out.row(query, head), dim_v);  // D - dLSE
    if (saved.dlse) {
      const cpu::LseStrides& strides = saved.dlse_strides;
      delta -= saved.dlse[batch * strides.batch + head * strides.head + (pair.q.begin + i) * strides.seq];
    }

    for (const VisibleKey& visible : row.keys) {
      const std::int64_t key = visible.row;
      add_scaled(result.dv, key, problem.heads_k, kv_head, visible.weight * visible.probability, dout, dim_v);
      const double dp = dot(dout, dense.v.row(key, kv_head), dim_v);
      const double dscore = visible.probability * (visible.weight * dp - delta);
      if (!result.dmask.empty()) result.dmask[dmask_index(batch, head, i, visible.key)] += dscore;
      const double dproduct = problem.softmax_scale * visible.derivative * dscore;
      add_scaled(result.dq, query, problem.heads_q, head, dproduct, dense.k.row(key, kv_head), dim);
      add_scaled(result.dk, key, problem.heads_k, kv_head, dproduct, q, dim);
    }
    // Guarded: with neither keys nor a sink, D and dLSE reach nothing.
    if (row.sink_probability > 0.0) result.dsink[static_cast<std::size_t>(head)] -= row.sink_probability * delta;
  });
  return result;
}

}  // namespace flash_attn::test
