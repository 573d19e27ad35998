// The cache of a TestCall, and the checks of what is written to one.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <tuple>

#include "append_reference.h"
#include "call_parts.h"
#include "element.h"
#include "test_call.h"

namespace flash_attn::test {
namespace {

cpu::ConstQuantization const_quantization(const cpu::Quantization& quantization) {
  return {quantization.scales, quantization.biases, quantization.dtype, quantization.scale_strides, quantization.bias_strides};
}

// Elements of a row of `dim` as it lies in memory.
std::int64_t stored_elements(DType dtype, std::int64_t dim) {
  return dtype == DType::affine8 ? dim / 4 : dtype == DType::affine4 ? dim / 8 : dim;
}

// Codes over their whole range that stand for numbers up to `magnitude`; scales of either sign where there is a bias.
void fill_codes(const cpu::Tensor& tensor, const cpu::Quantization& quantization, const KeyPlace& place, std::int64_t head,
                std::int64_t dim, double magnitude, std::uint64_t seed, std::uint64_t id, std::uint64_t scale_id) {
  const std::int64_t row = offset_of(tensor.strides, place.batch, place.row, head);
  const std::int32_t lowest = lowest_code(tensor.dtype);
  const std::int32_t highest = highest_code(tensor.dtype);
  for (std::int64_t d = 0; d < dim; ++d) {
    const double part = 0.5 + 0.5 * noise(seed, id, row * 8 + d);
    write_code(tensor.data, tensor.dtype, row, d, lowest + static_cast<std::int32_t>(part * (highest - lowest + 1)));
  }
  const std::int64_t scale = offset_of(quantization.scale_strides, place.batch, place.row, head);
  const std::int64_t bias = offset_of(quantization.bias_strides, place.batch, place.row, head);
  for (std::int64_t group = 0; group < dim / codes_of_group(tensor.dtype, dim); ++group) {
    const std::int64_t index = scale + group * quantization.scale_strides.dim;
    const double end = magnitude * noise(seed, scale_id, index);
    if (quantization.biases) {
      write_element(quantization.scales, quantization.dtype, index, -2 * end / highest);
      write_element(quantization.biases, quantization.dtype, bias + group * quantization.bias_strides.dim, end);
    } else {
      write_element(quantization.scales, quantization.dtype, index, std::abs(end) / highest);
    }
  }
}

// The buffers of a call at one time.
class Snapshot {
 public:
  explicit Snapshot(const TestCall& call) : call_(call) {
    for (const TestCall::Buffer& buffer : call.buffers())
      copies_.emplace_back(buffer.bytes.get(), buffer.bytes.get() + buffer.size);
  }

  // What lies there now may differ from what lay there then.
  void accept(const void* data, DType dtype, std::int64_t index, std::int64_t elements) {
    const auto* from = static_cast<const std::byte*>(data) + index * element_size(dtype);
    for (std::size_t i = 0; i < copies_.size(); ++i) {
      const TestCall::Buffer& buffer = call_.buffers()[i];
      if (from < buffer.bytes.get() || from >= buffer.bytes.get() + buffer.size) continue;
      std::memcpy(copies_[i].data() + (from - buffer.bytes.get()), from,
                  static_cast<std::size_t>(elements * element_size(dtype)));
    }
  }

  bool all_else_is_unchanged() const {
    for (std::size_t i = 0; i < copies_.size(); ++i) {
      const TestCall::Buffer& buffer = call_.buffers()[i];
      if (!std::equal(copies_[i].begin(), copies_[i].end(), buffer.bytes.get())) return false;
    }
    return true;
  }

 private:
  const TestCall& call_;
  std::vector<std::vector<std::byte>> copies_;
};

// k or v of a cache, as an append writes it.
struct WrittenTensor {
  const char* name;
  cpu::Tensor tensor;
  cpu::Quantization quantization;

  WrittenTensor(const TestCall& call, bool is_value)
      : name(is_value ? "v_cache" : "k_cache"),
        tensor(is_value ? call.cache.v : call.cache.k),
        quantization(is_value ? call.cache.v_quantization : call.cache.k_quantization) {}

  std::int64_t groups(std::int64_t dim) const { return has_codes(tensor.dtype) ? dim / codes_of_group(tensor.dtype, dim) : 0; }
};

void accept_row(const WrittenTensor& written, const AppendedRow& row, Snapshot& snapshot) {
  const auto dim = static_cast<std::int64_t>(row.elements.size());
  const auto accept = [&](const void* data, DType dtype, const cpu::Strides& strides, std::int64_t elements) {
    const std::int64_t offset = offset_of(strides, row.place.batch, row.place.row, row.head);
    for (std::int64_t d = 0; d < elements; ++d) snapshot.accept(data, dtype, offset + d * strides.dim, 1);
  };
  const cpu::Quantization& quantization = written.quantization;
  accept(written.tensor.data, written.tensor.dtype, written.tensor.strides, stored_elements(written.tensor.dtype, dim));
  accept(quantization.scales, quantization.dtype, quantization.scale_strides, written.groups(dim));
  if (quantization.biases) accept(quantization.biases, quantization.dtype, quantization.bias_strides, written.groups(dim));
}

// Codes are right when their scale is the one of the format and each is the nearest to its number. `slack`: what the numbers
// themselves may differ by.
std::string compare_group(const WrittenTensor& written, const AppendedRow& row, std::int64_t group, double slack) {
  const auto dim = static_cast<std::int64_t>(row.elements.size());
  const std::int64_t size = codes_of_group(written.tensor.dtype, dim);
  const cpu::Quantization& quantization = written.quantization;
  const auto factor = [&](const void* data, const cpu::Strides& strides) {
    const std::int64_t offset = offset_of(strides, row.place.batch, row.place.row, row.head);
    return read_element(data, quantization.dtype, offset + group * strides.dim);
  };
  const double scale = factor(quantization.scales, quantization.scale_strides);
  const double bias = quantization.biases ? factor(quantization.biases, quantization.bias_strides) : 0.0;
  const double highest = highest_code(written.tensor.dtype);
  const double lowest = lowest_code(written.tensor.dtype);
  const auto first = row.elements.begin() + group * size;
  const auto [least, most] = std::minmax_element(first, first + size);
  const double error_of_scale = rounding_error(quantization.dtype, scale);

  if (!quantization.biases) {
    const double want = std::max(std::abs(*least), std::abs(*most)) / highest;
    if (!agree(scale, want, 1e-6 * want + slack / highest)) {
      return describe(written.name, row.place.row, row.head, group, scale, want) + " (scale)";
    }
  } else {
    // The end of larger magnitude is a whole number of steps, which stretches a step by up to half a step in highest / 2.
    const double step = std::max((*most - *least) / highest, 1e-7);
    const double tolerance = 2 * slack / highest + error_of_scale + 1e-6 * step;
    if (std::abs(scale) < step * highest / (highest + 1) - tolerance ||
        std::abs(scale) > step * highest / (highest - 1) + tolerance) {
      return describe(written.name, row.place.row, row.head, group, scale, step) + " (scale)";
    }
    const double edge = std::abs(*least) > std::abs(*most) ? *least : *most;
    if (bias != 0.0 && !agree(std::abs(bias), std::abs(edge), slack + 2 * rounding_error(quantization.dtype, edge))) {
      return describe(written.name, row.place.row, row.head, group, bias, edge) + " (bias)";
    }
  }

  const double tolerance =
      0.5001 * std::abs(scale) + slack + highest * error_of_scale + rounding_error(quantization.dtype, bias);
  for (std::int64_t d = group * size; d < (group + 1) * size; ++d) {
    const double want = row.elements[static_cast<std::size_t>(d)];
    const double code = scale == 0.0 ? 0.0 : std::clamp((want - bias) / scale, lowest, highest);
    const double got = read_key(as_const(written.tensor), const_quantization(quantization), row.place, row.head, d);
    if (!agree(got, code * scale + bias, tolerance)) return describe(written.name, row.place.row, row.head, d, got, want);
  }
  return {};
}

std::string compare_row(const TestCall& call, const WrittenTensor& written, const AppendedRow& row) {
  const bool rotated = !row.is_value && call.rotary.cos;
  // A sum near the middle of two numbers of q's dtype may go either way.
  const auto slack_of = [&](double want) { return rotated ? 1e-6 + 2 * rounding_error(call.problem.dtype, want) : 0.0; };
  const auto dim = static_cast<std::int64_t>(row.elements.size());
  for (std::int64_t group = 0; group < written.groups(dim); ++group) {
    const std::string difference = compare_group(written, row, group, slack_of(2.0));
    if (!difference.empty()) return difference;
  }
  if (has_codes(written.tensor.dtype)) return {};
  for (std::int64_t d = 0; d < dim; ++d) {
    const double want = row.elements[static_cast<std::size_t>(d)];
    const double got = read_key(as_const(written.tensor), {}, row.place, row.head, d);
    const double slack = d < call.problem.rotary_dim ? slack_of(want) : 0.0;
    if (!agree(got, want, slack)) return describe(written.name, row.place.row, row.head, d, got, want);
  }
  return {};
}

}  // namespace

cpu::Quantization TestCall::make_scales(const Shape& cache, DType codes, DType scale_dtype) {
  const Shape shape = {cache.batch, cache.seq, cache.heads, cache.dim / codes_of_group(codes, cache.dim)};
  const cpu::Tensor scales = make_tensor(shape, Layout::contiguous, codes == DType::int8 ? DType::float32 : scale_dtype);
  if (codes == DType::int8) return {scales.data, nullptr, scales.dtype, scales.strides, {}};
  const cpu::Tensor biases = make_tensor(shape, Layout::gaps, scale_dtype);
  return {scales.data, biases.data, scales.dtype, scales.strides, biases.strides};
}

void TestCall::make_cache(const Features& features) {
  const CacheFeatures& given = features.cache;
  const std::int64_t slots = problem.page_size > 0 ? problem.page_size : problem.max_seqlen_k;
  const auto make = [&](std::int64_t dim, Layout layout, std::optional<DType> codes, cpu::Tensor& tensor,
                        cpu::Quantization& quantization) {
    const DType dtype = codes.value_or(problem.dtype);
    const Shape shape = {problem.cache_rows, slots, problem.heads_k, dim};
    tensor = make_tensor({shape.batch, shape.seq, shape.heads, stored_elements(dtype, dim)}, layout, dtype);
    if (codes) quantization = make_scales(shape, dtype, given.scale_dtype);
  };
  make(problem.head_dim, features.k, given.k_codes, cache.k, cache.k_quantization);
  make(problem.head_dim_v, features.v, given.v_codes, cache.v, cache.v_quantization);
  k = cache.k;
  v = cache.v;
  inputs.cache.k = const_quantization(cache.k_quantization);
  inputs.cache.v = const_quantization(cache.v_quantization);

  const auto copy = [&](const std::vector<std::int32_t>& values) { return values.empty() ? nullptr : copy_small(values); };
  if (problem.page_size > 0) inputs.cache.block_table = copy_small(given.block_table);
  inputs.cache.batch_idx = copy(given.batch_idx);
  inputs.cache.leftpad = copy(given.leftpad);
  inputs.cache.cu_seqlens_new = copy(given.cu_seqlens_new);

  const bool packed = !given.cu_seqlens_new.empty();
  if (packed || problem.seqlen_new > 0) {
    const std::int64_t batch = packed ? 1 : problem.batch;
    const std::int64_t seq = packed ? problem.total_new : problem.seqlen_new;
    new_keys.k = as_const(make_tensor({batch, seq, problem.heads_k, problem.head_dim}, given.new_keys, problem.dtype));
    new_keys.v = as_const(make_tensor({batch, seq, problem.heads_k, problem.head_dim_v}, given.new_keys, problem.dtype));
  }
  if (problem.rotary_dim == 0) return;
  const Shape angles = {1, problem.rotary_rows, 1, problem.rotary_dim / 2};
  const cpu::Tensor cos = make_tensor(angles, Layout::contiguous, problem.dtype);
  const cpu::Tensor sin = make_tensor(angles, Layout::gaps, problem.dtype);
  rotary = {cos.data, sin.data, problem.dtype, cos.strides.seq, sin.strides.seq, copy(given.rotary_seqlens)};
  rotated = make_tensor({problem.varlen ? 1 : problem.batch, problem.varlen ? problem.total_q : problem.max_seqlen_q,
                         problem.heads_q, problem.head_dim},
                        features.out, problem.dtype);
}

void TestCall::fill_key(const KeyPlace& place, std::int64_t head, double magnitude, std::uint64_t seed) {
  const auto fill = [&](const cpu::Tensor& tensor, const cpu::Quantization& quantization, std::int64_t dim, double largest,
                        std::uint64_t id, std::uint64_t scale_id) {
    if (has_codes(tensor.dtype)) {
      fill_codes(tensor, quantization, place, head, dim, largest, seed, id, scale_id);
    } else {
      fill_row(tensor, offset_of(tensor.strides, place.batch, place.row, head), dim, largest, seed, id);
    }
  };
  fill(k, cache.k_quantization, problem.head_dim, magnitude, id_k, id_k_scale);
  fill(v, cache.v_quantization, problem.head_dim_v, 1.0, id_v, id_v_scale);
}

// Those that a slot waits for.
void TestCall::fill_new_keys(std::uint64_t seed) {
  const std::vector<SequencePair> pairs = sequence_pairs(problem, inputs);
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const SequencePair& pair = pairs[static_cast<std::size_t>(batch)];
    const std::int64_t source = inputs.cache.cu_seqlens_new ? 0 : batch;
    for (std::int32_t token = 0; token < pair.appended.length; ++token) {
      if (!cache_place(problem, inputs, pair, pair.appended.begin + token).exists) continue;
      for (std::int32_t head = 0; head < problem.heads_k; ++head) {
        const auto fill = [&](const cpu::ConstTensor& tensor, std::int64_t dim, std::uint64_t id) {
          fill_row(as_writable(tensor), offset_of(tensor.strides, source, pair.first_new + token, head), dim, 1.0, seed, id);
        };
        fill(new_keys.k, problem.head_dim, id_k_new);
        fill(new_keys.v, problem.head_dim_v, id_v_new);
      }
    }
  }
}

void TestCall::fill_angles(std::uint64_t seed) {
  for (std::int64_t row = 0; row < problem.rotary_rows; ++row) {
    for (std::int64_t t = 0; t < problem.rotary_dim / 2; ++t) {
      const double angle = 3.0 * noise(seed, id_angle, row * max_head_dim + t);
      write_element(const_cast<void*>(rotary.cos), rotary.dtype, row * rotary.cos_stride + t, std::cos(angle));
      write_element(const_cast<void*>(rotary.sin), rotary.dtype, row * rotary.sin_stride + t, std::sin(angle));
    }
  }
}

std::string check_append(TestCall& call) {
  Snapshot snapshot(call);
  cpu::append(call.problem, call.inputs, call.new_keys, call.rotary, call.cache);
  const std::vector<AppendedRow> rows = reference_append(call.problem, call.inputs, call.new_keys, call.rotary);
  std::map<std::tuple<std::int64_t, std::int64_t, std::int32_t, bool>, const AppendedRow*> last;
  for (const AppendedRow& row : rows) last[{row.place.batch, row.place.row, row.head, row.is_value}] = &row;
  for (const auto& [place, row] : last) {
    const WrittenTensor written(call, row->is_value);
    const std::string difference = compare_row(call, written, *row);
    if (!difference.empty()) return difference;
    accept_row(written, *row, snapshot);
  }
  return snapshot.all_else_is_unchanged() ? std::string() : "append changed bytes beside the new slots";
}

std::string check_rotated_queries(TestCall& call) {
  const AttentionProblem& problem = call.problem;
  cpu::rotate_queries(problem, call.inputs, call.rotary, call.rotated);
  const std::vector<double> want = reference_rotated_queries(problem, call.inputs, call.rotary);
  const std::int64_t per_batch = problem.varlen ? problem.total_q : problem.max_seqlen_q;
  std::size_t index = 0;
  for (std::int64_t row = 0; row < query_rows(problem); ++row) {
    for (std::int64_t head = 0; head < problem.heads_q; ++head) {
      const std::int64_t offset = offset_of(call.rotated.strides, row / per_batch, row % per_batch, head);
      for (std::int64_t d = 0; d < problem.head_dim; ++d, ++index) {
        const double got = read_element(call.rotated.data, call.rotated.dtype, offset + d * call.rotated.strides.dim);
        const double slack = d < problem.rotary_dim ? 1e-6 + 2 * rounding_error(problem.dtype, want[index]) : 0.0;
        if (!agree(got, want[index], slack)) return describe("rotated q", row, head, d, got, want[index]);
      }
    }
  }
  return {};
}

std::string check_cached(TestCall& call) {
  if (call.new_keys.k.data) {
    const std::string difference = check_append(call);
    if (!difference.empty()) return difference;
  }
  if (call.rotary.cos) {
    const std::string difference = check_rotated_queries(call);
    if (!difference.empty()) return difference;
    call.inputs.q = as_const(call.rotated);
  }
  return check_forward(call);
}

}  // namespace flash_attn::test
