#include "test_call.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <string_view>

#include "call_parts.h"
#include "cpu/isa.h"
#include "element.h"
#include "semantics/mask.h"

namespace flash_attn::test {
namespace {

constexpr std::uint64_t golden_ratio = 0x9E3779B97F4A7C15u;

}  // namespace

double noise(std::uint64_t seed, std::uint64_t tensor, std::int64_t index) {
  std::uint64_t x = (seed * 31 + tensor) * golden_ratio + static_cast<std::uint64_t>(index);
  x = (x + golden_ratio);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-52 - 1.0;
}

std::int64_t offset_of(const cpu::Strides& strides, std::int64_t batch, std::int64_t row, std::int64_t head) {
  return batch * strides.batch + row * strides.seq + head * strides.head;
}

std::int64_t offset_of(const cpu::LseStrides& strides, std::int64_t batch, std::int64_t row, std::int64_t head) {
  return batch * strides.batch + row * strides.seq + head * strides.head;
}

void fill_row(const cpu::Tensor& tensor, std::int64_t offset, std::int64_t dim, double magnitude, std::uint64_t seed,
              std::uint64_t id) {
  for (std::int64_t d = 0; d < dim; ++d) {
    const std::int64_t index = offset + d * tensor.strides.dim;
    write_element(tensor.data, tensor.dtype, index, magnitude * noise(seed, id, index));
  }
}

cpu::ConstTensor as_const(const cpu::Tensor& tensor) { return {tensor.data, tensor.dtype, tensor.strides}; }
cpu::Tensor as_writable(const cpu::ConstTensor& tensor) {
  return {const_cast<void*>(tensor.data), tensor.dtype, tensor.strides};
}

bool agree(double got, double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  return got == want || std::abs(got - want) <= tolerance;
}

std::string describe(const char* name, std::int64_t row, std::int64_t head, std::int64_t d, double got, double want) {
  std::ostringstream text;
  text.precision(9);
  text << name << "[row " << row << ", head " << head << ", " << d << "] is " << got << ", not " << want;
  return text.str();
}

namespace {

// Where the chip multiplies bfloat16 pairs, P and dS are rounded to bfloat16 before their products, as upstream rounds them.
constexpr double bfloat16_operand_error = 0x1p-8;

// Where it multiplies integers, q and P are rounded to 15 bits of their largest element before they meet a quantised cache.
constexpr double integer_operand_error = 0x1p-14;

// The levels with VNNI, and those of their tile shapes, take MLX's codes for integers.
bool codes_are_integers() {
  const std::string_view level = cpu::isa_level_name();
  return level.starts_with("avx512_bf16") || level.starts_with("avx512_amx");
}

// Where bfloat16 pairs are multiplied, keys and values that were quantised are rounded too.
double quantized_operand_error(const TestCall& call) {
  if (call.problem.dtype == DType::float32 || !has_codes(call.inputs.k.dtype)) return 0.0;
  if (call.problem.dtype == DType::bfloat16) return bfloat16_operand_error;
  return call.inputs.k.dtype == DType::int8 || codes_are_integers() ? integer_operand_error : 0.0;
}

// `want` is [rows, heads, dim]; when dense, rows are [batch, seq]. `errors`: what each element may differ by besides; empty: 0.
std::string compare_tensor(const char* name, const cpu::Tensor& got, const Sums& want, std::int64_t rows,
                           std::int64_t rows_per_batch, std::int64_t heads, std::int64_t dim, double relative,
                           const std::vector<double>& errors = {}) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t head = 0; head < heads; ++head) {
      const std::int64_t offset = offset_of(got.strides, row / rows_per_batch, row % rows_per_batch, head);
      for (std::int64_t d = 0; d < dim; ++d) {
        const auto index = static_cast<std::size_t>((row * heads + head) * dim + d);
        const double expected = want.values[index];
        const double actual = read_element(got.data, got.dtype, offset + d * got.strides.dim);
        double tolerance = relative * std::max(1.0, std::abs(expected));
        if (got.dtype != DType::float32) tolerance += rounding_error(got.dtype, expected);
        if (!errors.empty()) tolerance += errors[index];
        if (got.dtype == DType::bfloat16) tolerance += bfloat16_operand_error * want.magnitudes[index];
        if (!agree(actual, expected, tolerance)) return describe(name, row, head, d, actual, expected);
      }
    }
  }
  return {};
}

std::string compare_array(const char* name, const float* got, const std::vector<double>& want, double relative) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double tolerance = relative * std::max(1.0, std::abs(want[i]));
    if (!agree(got[i], want[i], tolerance)) return describe(name, 0, 0, static_cast<std::int64_t>(i), got[i], want[i]);
  }
  return {};
}

// A varlen tensor is one batch item of `total` rows.
std::int64_t rows_per_batch(const AttentionProblem& problem, std::int32_t total, std::int32_t max_seqlen) {
  return std::max(1, problem.varlen ? total : max_seqlen);
}

// float32 arithmetic; gradients sum over more terms.
constexpr double forward_tolerance = 2e-5;
constexpr double backward_tolerance = 1e-4;

}  // namespace

std::byte* TestCall::allocate(std::int64_t elements, DType dtype) {
  const auto size = static_cast<std::size_t>(elements * element_size(dtype));
  Buffer buffer = {std::make_unique_for_overwrite<std::byte[]>(size), size};
  std::memset(buffer.bytes.get(), 0xFF, size);  // NaN in every dtype
  buffers_.push_back(std::move(buffer));
  return buffers_.back().bytes.get();
}

cpu::Tensor TestCall::make_tensor(const Shape& shape, Layout layout, DType dtype) {
  const std::int64_t dim_stride = layout == Layout::strided_dim ? 2 : 1;
  const std::int64_t row = shape.dim * dim_stride + (layout == Layout::gaps ? 3 : 0);
  cpu::Strides strides = {shape.seq * shape.heads * row, shape.heads * row, row, dim_stride};
  std::int64_t first = 0;
  switch (layout) {
    case Layout::heads_first:
      strides.head = shape.seq * row;
      strides.seq = row;
      break;
    case Layout::packed:
      strides.seq *= 3;
      strides.batch *= 3;
      break;
    case Layout::reversed:
      first = std::max<std::int64_t>(shape.seq - 1, 0) * strides.seq;
      strides.seq = -strides.seq;
      break;
    case Layout::same_batch:
      strides.batch = 0;
      break;
    default:
      break;
  }
  if (shape.batch == 1) strides.batch = 0;
  std::int64_t elements = 0;
  if (shape.batch > 0 && shape.seq > 0 && shape.heads > 0 && shape.dim > 0) {
    elements = 1 + (shape.batch - 1) * strides.batch + (shape.seq - 1) * std::abs(strides.seq) +
               (shape.heads - 1) * strides.head + (shape.dim - 1) * strides.dim;
  }
  if (layout == Layout::streamed) {
    constexpr std::int64_t line = 64;
    std::byte* memory = allocate(elements + line / element_size(dtype), dtype);
    return {memory + -reinterpret_cast<std::uintptr_t>(memory) % line, dtype, strides, true};
  }
  return {allocate(elements, dtype) + (elements ? first * element_size(dtype) : 0), dtype, strides};
}

void TestCall::make_mask(const Features& features) {
  const std::int64_t batch = features.mask_batch ? problem.batch : 1;
  const std::int64_t heads = features.mask_heads ? problem.heads_q : 1;
  const std::int64_t rows = features.mask_rows ? problem.max_seqlen_q : 1;
  const std::int64_t keys = features.mask_keys ? problem.max_seqlen_k : 1;
  attn_mask = {allocate(batch * heads * rows * keys, features.mask_dtype),
               features.mask_dtype,
               features.mask_batch ? heads * rows * keys : 0,
               features.mask_heads ? rows * keys : 0,
               features.mask_rows ? keys : 0,
               features.mask_keys ? 1 : 0};
  inputs.attn_mask = attn_mask;
  if (features.mask_dtype == DType::boolean) return;
  gradients.dmask = reinterpret_cast<float*>(allocate(batch * heads * rows * keys, DType::float32));
  gradients.dmask_batch = static_cast<std::int32_t>(batch);
  gradients.dmask_heads = static_cast<std::int32_t>(heads);
  gradients.dmask_rows = static_cast<std::int32_t>(rows);
  gradients.dmask_keys = static_cast<std::int32_t>(keys);
}

void TestCall::fill_used(const Features& features, std::uint64_t seed) {
  const std::vector<SequencePair> pairs = sequence_pairs(problem, inputs);
  auto* dout = const_cast<void*>(saved.dout.data);
  auto* dlse = const_cast<float*>(saved.dlse);
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const SequencePair& pair = pairs[static_cast<std::size_t>(batch)];
    const MaskRule rule = problem.mask_rule(pair.q.length, pair.k.length);
    std::vector<bool> filled;  // keys of the kv head
    for (std::int32_t head = 0; head < problem.heads_q; ++head) {
      const std::int32_t kv_head = head / problem.group();
      if (head % problem.group() == 0) filled.assign(static_cast<std::size_t>(pair.k.length), false);
      for (std::int32_t i = 0; i < pair.q.length; ++i) {
        const std::int64_t row = pair.q.begin + i;
        fill_row(q, offset_of(q.strides, batch, row, head), problem.head_dim, features.magnitude, seed, id_q);
        if (problem.has_qv) {
          fill_row(as_writable(inputs.qv), offset_of(inputs.qv.strides, batch, row, head), problem.head_dim_v,
                   features.magnitude, seed, id_qv);
        }
        fill_row({dout, saved.dout.dtype, saved.dout.strides}, offset_of(saved.dout.strides, batch, row, head),
                 problem.head_dim_v, 1.0, seed, id_dout);
        if (dlse) {
          const std::int64_t index = offset_of(saved.dlse_strides, batch, row, head);
          dlse[index] = static_cast<float>(noise(seed, id_dlse, index));
        }
        const KeyRange keys = visible_keys(rule, i);
        for (std::int32_t j = keys.begin; j < keys.end; ++j) {
          if (!filled[static_cast<std::size_t>(j)]) {
            const std::int32_t slot = pair.k.begin + j;
            const bool is_new = pair.appended.begin <= slot && slot < pair.appended.begin + pair.appended.length;
            const KeyPlace place = key_place(problem, inputs, pair, batch, j);
            if (place.exists && !is_new) fill_key(place, kv_head, features.magnitude, seed);
            filled[static_cast<std::size_t>(j)] = true;
          }
          if (!attn_mask.data) continue;
          const std::int64_t index = batch * attn_mask.batch + head * attn_mask.head + i * attn_mask.row + j * attn_mask.key;
          const double value = noise(seed, id_mask, index);
          const bool hidden = value < -0.7;
          const double additive = hidden ? -std::numeric_limits<double>::infinity() : 2.0 * value;
          write_element(const_cast<void*>(attn_mask.data), attn_mask.dtype, index,
                        attn_mask.dtype == DType::boolean ? (hidden ? 0.0 : 1.0) : additive);
        }
      }
    }
  }
}

TestCall::TestCall(const AttentionProblem& given, const Features& features, std::uint64_t seed) : problem(given) {
  const std::int64_t batch = problem.varlen ? 1 : problem.batch;
  const std::int64_t seq_q = problem.varlen ? problem.total_q : problem.max_seqlen_q;
  const std::int64_t seq_k = problem.varlen ? problem.total_k : problem.max_seqlen_k;
  const Shape q_shape = {batch, seq_q, problem.heads_q, problem.head_dim};
  const Shape k_shape = {batch, seq_k, problem.heads_k, problem.head_dim};
  const Shape v_shape = {batch, seq_k, problem.heads_k, problem.head_dim_v};
  const Shape out_shape = {batch, seq_q, problem.heads_q, problem.head_dim_v};
  const cpu::LseStrides lse_strides = {problem.varlen ? 0 : problem.heads_q * seq_q, seq_q, 1};
  const auto make_lse = [&] { return reinterpret_cast<float*>(allocate(batch * problem.heads_q * seq_q, DType::float32)); };

  q = make_tensor(q_shape, features.q, problem.dtype);
  inputs.q = as_const(q);
  if (problem.has_qv) inputs.qv = as_const(make_tensor(out_shape, features.q, problem.dtype));
  if (problem.cached) {
    make_cache(features);
  } else {
    k = make_tensor(k_shape, features.k, problem.dtype);
    v = make_tensor(v_shape, features.v, problem.dtype);
    gradients.dk = make_tensor(k_shape, features.out, problem.dtype);
    gradients.dv = make_tensor(v_shape, features.out, problem.dtype);
  }
  inputs.k = as_const(k);
  inputs.v = as_const(v);
  outputs = {make_tensor(out_shape, features.out, problem.dtype), make_lse(), lse_strides};
  saved.out = as_const(make_tensor(out_shape, features.out, problem.dtype));
  saved.dout = as_const(make_tensor(out_shape, features.out, problem.dtype));
  saved.lse = make_lse();
  saved.lse_strides = lse_strides;
  saved.dlse = features.dlse ? make_lse() : nullptr;
  saved.dlse_strides = lse_strides;
  gradients.dq = make_tensor(q_shape, features.out, problem.dtype);

  if (features.alibi) {
    std::vector<float> slopes;
    for (std::int64_t i = 0; i < (features.alibi_per_batch ? problem.batch : 1) * problem.heads_q; ++i) {
      slopes.push_back(static_cast<float>(0.15 + 0.15 * noise(seed, id_alibi, i)));
    }
    inputs.alibi_slopes = copy_small(slopes);
    inputs.alibi_batch_stride = features.alibi_per_batch ? problem.heads_q : 0;
  }
  if (features.sink) {
    std::vector<float> sinks;
    for (std::int64_t i = 0; i < problem.heads_q; ++i) sinks.push_back(static_cast<float>(noise(seed, id_sink, i)));
    inputs.learnable_sink = sink = const_cast<float*>(copy_small(sinks));
    gradients.dsink = reinterpret_cast<float*>(allocate(problem.heads_q, DType::float32));
  }
  if (problem.varlen) {
    inputs.cu_seqlens_q = copy_small(features.cu_seqlens_q);
    if (!problem.cached) inputs.cu_seqlens_k = copy_small(features.cu_seqlens_k);
  }
  if (!features.seqused_q.empty()) inputs.seqused_q = copy_small(features.seqused_q);
  if (!features.seqused_k.empty()) inputs.seqused_k = copy_small(features.seqused_k);
  if (problem.has_dropout) {
    const auto key = static_cast<std::uint32_t>(seed * golden_ratio >> 32);
    inputs.dropout_key = copy_small(std::vector<std::uint32_t>{key, ~key});
  }
  if (features.attn_mask) make_mask(features);
  fill_used(features, seed);
  if (new_keys.k.data) fill_new_keys(seed);
  if (problem.rotary_dim > 0) fill_angles(seed);
}

void TestCall::save_reference(const ReferenceForward& reference) {
  const std::int64_t per_batch = rows_per_batch(problem, problem.total_q, problem.max_seqlen_q);
  auto* out = const_cast<void*>(saved.out.data);
  auto* lse = const_cast<float*>(saved.lse);
  for (std::int64_t row = 0; row < query_rows(problem); ++row) {
    for (std::int64_t head = 0; head < problem.heads_q; ++head) {
      const std::int64_t index = row * problem.heads_q + head;
      const std::int64_t offset = offset_of(saved.out.strides, row / per_batch, row % per_batch, head);
      for (std::int64_t d = 0; d < problem.head_dim_v; ++d) {
        write_element(out, saved.out.dtype, offset + d * saved.out.strides.dim,
                      reference.out.values[static_cast<std::size_t>(index * problem.head_dim_v + d)]);
      }
      lse[offset_of(saved.lse_strides, row / per_batch, row % per_batch, head)] =
          static_cast<float>(reference.lse[static_cast<std::size_t>(index)]);
    }
  }
}

void set_dropout(AttentionProblem& problem, double p) {
  problem.has_dropout = true;
  problem.dropout_keep_24 = static_cast<std::uint32_t>(std::floor(0x1p24 * (1.0 - p)));
  problem.dropout_scale = static_cast<float>(1.0 / (1.0 - p));
}

std::string compare_forward(const TestCall& call, const ReferenceForward& reference) {
  const AttentionProblem& problem = call.problem;
  const std::int64_t per_batch = rows_per_batch(problem, problem.total_q, problem.max_seqlen_q);
  const cpu::LseStrides& strides = call.outputs.lse_strides;
  const cpu::Tensor lse = {call.outputs.lse, DType::float32, {strides.batch, strides.seq, strides.head, 1}};
  const double operand_error = quantized_operand_error(call);
  std::vector<double> lse_errors;
  for (const double products : reference.products) lse_errors.push_back(operand_error * products);
  std::vector<double> out_errors;
  for (std::size_t i = 0; i < reference.out.values.size(); ++i) {
    const double score_error = lse_errors[i / static_cast<std::size_t>(problem.head_dim_v)];
    out_errors.push_back((operand_error + 2 * score_error) * reference.out.magnitudes[i]);
  }
  std::string difference = compare_tensor("out", call.outputs.out, reference.out, query_rows(problem), per_batch,
                                          problem.heads_q, problem.head_dim_v, forward_tolerance, out_errors);
  if (difference.empty()) {
    difference = compare_tensor("lse", lse, {reference.lse, {}}, query_rows(problem), per_batch, problem.heads_q, 1,
                                forward_tolerance, lse_errors);
  }
  return difference;
}

std::string compare_gradients(const TestCall& call, const ReferenceGradients& reference) {
  const AttentionProblem& problem = call.problem;
  const cpu::Gradients& got = call.gradients;
  const std::int64_t per_batch_q = rows_per_batch(problem, problem.total_q, problem.max_seqlen_q);
  const std::int64_t per_batch_k = rows_per_batch(problem, problem.total_k, problem.max_seqlen_k);
  std::string differences[] = {
      compare_tensor("dq", got.dq, reference.dq, query_rows(problem), per_batch_q, problem.heads_q, problem.head_dim,
                     backward_tolerance),
      compare_tensor("dk", got.dk, reference.dk, key_rows(problem), per_batch_k, problem.heads_k, problem.head_dim,
                     backward_tolerance),
      compare_tensor("dv", got.dv, reference.dv, key_rows(problem), per_batch_k, problem.heads_k, problem.head_dim_v,
                     backward_tolerance),
      got.dsink ? compare_array("dsink", got.dsink, reference.dsink, backward_tolerance) : std::string(),
      got.dmask ? compare_array("dmask", got.dmask, reference.dmask, backward_tolerance) : std::string(),
  };
  for (std::string& difference : differences) {
    if (!difference.empty()) return difference;
  }
  return {};
}

std::string check_forward(TestCall& call) {
  cpu::forward(call.problem, call.inputs, call.outputs);
  return compare_forward(call, reference_forward(call.problem, call.inputs));
}

std::string check_backward(TestCall& call) {
  call.save_reference(reference_forward(call.problem, call.inputs));
  cpu::backward(call.problem, call.inputs, call.saved, call.gradients);
  return compare_gradients(call, reference_backward(call.problem, call.inputs, call.saved, call.gradients));
}

}  // namespace flash_attn::test
