#include "metal/specialisation.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <span>
#include <type_traits>
#include <utility>

#include "metal/params.h"

namespace flash_attn::metal {
namespace {

// ---- tile shapes

struct TileShape {
  int rows;  // queries a threadgroup, or steps over
  int keys;  // ... and keys
  int simdgroups;
  int split_d;  // simdgroups that share the head dim of a row block
};

struct TileChoice {
  int head_dim;  // up to this
  TileShape shape;
};

TileShape choose(std::span<const TileChoice> table, int head_dim) {
  for (const TileChoice& choice : table) {
    if (head_dim <= choice.head_dim) return choice.shape;
  }
  return table.back().shape;
}

constexpr int simdgroup_threads = 32;
constexpr int first_generation_with_wide_key_blocks = 15;

// Registers hold Q, O and one S a simdgroup; K and V lie in threadgroup memory, at most 32 KB. Where a thread would need many
// more than the 128 registers of 32 bits that an M1 has, keys are fewer or simdgroups share a head dim.
constexpr int largest_forward_head_dim = 256;

constexpr TileChoice forward_16_bits[] = {{64, {32, 32, 4, 1}}, {128, {32, 16, 4, 1}}, {256, {32, 16, 8, 2}}};
constexpr TileChoice forward_32_bits[] = {{96, {32, 16, 4, 1}}, {128, {32, 16, 4, 1}}, {256, {32, 16, 8, 2}}};
// Of the backward, more operands stay in registers.
constexpr TileChoice backward_dq_16_bits[] = {{96, {32, 32, 4, 1}}, {128, {32, 16, 4, 1}}, {256, {32, 16, 8, 2}}};
constexpr TileChoice backward_dq_32_bits[] = {{80, {32, 16, 4, 1}}, {128, {32, 16, 8, 2}}, {256, {16, 8, 8, 4}}};
constexpr TileChoice backward_dkv_16_bits[] = {
    {64, {32, 32, 4, 1}}, {96, {16, 32, 4, 1}}, {192, {16, 32, 8, 2}}, {256, {16, 16, 8, 4}}};
constexpr TileChoice backward_dkv_32_bits[] = {{64, {16, 32, 4, 1}}, {128, {16, 32, 8, 2}}, {256, {8, 16, 8, 4}}};

int wish(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  const int number = value ? std::atoi(value) : 0;
  return number > 0 ? number : otherwise;
}

/// For tuning on a Mac.
TileShape with_wishes(TileShape shape) {
  shape.rows = wish("FLASH_ATTENTION_MLX_METAL_BQ", shape.rows);
  shape.keys = wish("FLASH_ATTENTION_MLX_METAL_BK", shape.keys);
  return shape;
}

TileShape tile_shape(const AttentionProblem& problem, std::span<const TileChoice> for_16_bits,
                     std::span<const TileChoice> for_32_bits) {
  const int head_dim = std::max(problem.head_dim, problem.head_dim_v);
  return with_wishes(problem.dtype == DType::float32 ? choose(for_32_bits, head_dim) : choose(for_16_bits, head_dim));
}

// ---- #defines

const char* type_of(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return "bfloat16_t";
    case DType::float16:
      return "half";
    default:
      return "float";
  }
}

class Defines {
 public:
  template <class Value>
  void set(const char* name, const Value& value) {
    if constexpr (std::is_arithmetic_v<Value>) {
      add(name, std::to_string(value));
    } else {
      add(name, value);
    }
  }

  void flag(const char* name, bool applies) {
    if (applies) add(name, "1");
  }

  const std::string& text() const { return text_; }

 private:
  void add(const char* name, const std::string& value) { text_ += std::string("#define ") + name + " " + value + "\n"; }

  std::string text_;
};

/// As quantised_keys.metal counts them.
int code_kind(int bits, bool affine) {
  if (bits == 0) return 0;
  if (!affine) return 1;
  return bits == 8 ? 2 : 3;
}

/// What every kernel over queries and keys may ask.
Defines defines_of(const AttentionProblem& problem, const Operands& operands, TileShape shape) {
  Defines defines;
  defines.set("FA_T", type_of(problem.dtype));
  defines.set("FA_D", problem.head_dim);
  defines.set("FA_DV", problem.head_dim_v);
  defines.set("FA_GROUP", problem.group());
  defines.set("FA_BQ", shape.rows);
  defines.set("FA_BK", shape.keys);
  defines.set("FA_SIMDGROUPS", shape.simdgroups);
  defines.set("FA_SPLIT_D", shape.split_d);
  defines.flag("FA_VARLEN", problem.varlen);
  defines.flag("FA_SOFTCAP", problem.softcap > 0.0f);
  defines.flag("FA_DROPOUT", problem.has_dropout);
  defines.flag("FA_CHUNK", problem.attention_chunk > 0);
  defines.flag("FA_CACHED", problem.cached);
  defines.flag("FA_PAGED", problem.page_size > 0);
  constexpr std::pair<const char*, const char*> flags[] = {
      {"FA_ATTN_MASK", "attn_mask"},   {"FA_SINK", "learnable_sink"},      {"FA_ALIBI", "alibi_slopes"},
      {"FA_SEQUSED_Q", "seqused_q"},   {"FA_SEQUSED_K", "seqused_k"},      {"FA_QV", "qv"},
      {"FA_LEFTPAD", "cache_leftpad"}, {"FA_BATCH_IDX", "cache_batch_idx"}};
  for (const auto& [flag, array] : flags) defines.flag(flag, operands.find(array) != nullptr);
  if (const Operand* mask = operands.find("attn_mask")) defines.set("FA_MASK_T", mask->type);
  if (operands.k_code_bits > 0) {
    defines.set("FA_K_CODES", code_kind(operands.k_code_bits, operands.codes_are_affine));
    defines.set("FA_V_CODES", code_kind(operands.v_code_bits, operands.codes_are_affine));
    if (operands.codes_are_affine) defines.set("FA_CODE_SCALE_T", operands.find("k_scales")->type);
  }
  return defines;
}

// ---- params

std::int32_t bits_of(float value) { return std::bit_cast<std::int32_t>(value); }

std::vector<std::int32_t> params_of(const AttentionProblem& problem, const Operands& operands) {
  std::vector<std::int32_t> params(param_count, 0);
  const MaskRule rule = problem.mask_rule(problem.max_seqlen_q, problem.max_seqlen_k);
  params[param_batch] = problem.batch;
  params[param_heads_q] = problem.heads_q;
  params[param_heads_k] = problem.heads_k;
  params[param_max_seqlen_q] = problem.max_seqlen_q;
  params[param_max_seqlen_k] = problem.max_seqlen_k;
  params[param_total_q] = problem.total_q;
  params[param_total_k] = problem.total_k;
  params[param_softmax_scale] = bits_of(problem.softmax_scale);
  params[param_softcap] = bits_of(problem.softcap);
  params[param_window_left] = rule.window_left;
  params[param_window_right] = rule.window_right;
  params[param_attention_chunk] = rule.attention_chunk;
  params[param_alibi_batch_stride] = operands.alibi_per_sequence ? problem.heads_q : 0;
  params[param_dropout_keep_24] = static_cast<std::int32_t>(problem.dropout_keep_24);
  params[param_dropout_scale] = bits_of(problem.dropout_scale);
  params[param_cache_rows] = problem.cache_rows;
  params[param_page_size] = problem.page_size;
  params[param_table_rows] = problem.table_rows;
  params[param_table_blocks] = problem.table_blocks;
  params[param_key_capacity] = problem.cached ? problem.key_capacity() : 0;
  params[param_seqlen_new] = problem.seqlen_new;
  params[param_total_new] = problem.total_new;
  params[param_rotary_rows] = problem.rotary_rows;
  return params;
}

// ---- kernels

/// FNV-1a.
std::string fingerprint(const std::string& text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char character : text) hash = (hash ^ static_cast<unsigned char>(character)) * 0x100000001b3u;
  constexpr char digits[] = "0123456789abcdef";
  std::string result;
  for (int shift = 60; shift >= 0; shift -= 4) result += digits[(hash >> shift) & 15u];
  return result;
}

std::vector<std::string> names_of(const Operands& operands) {
  std::vector<std::string> names = {"params"};
  for (const Operand& operand : operands.arrays) names.push_back(operand.name);
  return names;
}

std::vector<std::string> joined(std::vector<std::string> names, std::initializer_list<const char*> more) {
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

Kernel make_kernel(const char* kernel, const AttentionProblem& problem, const Operands& operands, const Defines& defines,
                   std::vector<std::string> inputs, std::vector<std::string> outputs, int threads,
                   std::array<int, 3> threadgroups) {
  const bool is_readable = wish("FLASH_ATTENTION_MLX_METAL_READABLE", 0) > 0;
  return {.name = std::string("flash_attn_") + kernel + "_" + fingerprint(defines.text()) + (is_readable ? "_readable" : ""),
          .file = kernel,
          .inputs = std::move(inputs),
          .outputs = std::move(outputs),
          .defines = defines.text(),
          .is_readable = is_readable,
          .params = params_of(problem, operands),
          .threadgroup = {threads, 1, 1},
          .threadgroups = threadgroups};
}

int blocks(std::int64_t items, int block) { return static_cast<int>((items + block - 1) / block); }

std::array<int, 3> query_blocks(const AttentionProblem& problem, TileShape shape) {
  return {blocks(std::int64_t{problem.max_seqlen_q} * problem.group(), shape.rows), problem.heads_k, problem.batch};
}

std::int64_t query_rows(const AttentionProblem& problem) {
  return problem.varlen ? problem.total_q : std::int64_t{problem.batch} * problem.max_seqlen_q;
}

/// Decode keeps Q and O of all its rows in registers: as few simdgroups as these allow share the head dims.
TileShape decode_shape(const AttentionProblem& problem) {
  constexpr int fragment = 8;
  constexpr int most_registers = 112;
  const int packed_rows = problem.max_seqlen_q * problem.group();
  const int head_dim = std::max(problem.head_dim, problem.head_dim_v);
  const int most_rows = head_dim > 256 ? 16 : 32;
  const int registers_of_q = problem.dtype == DType::float32 ? 2 : 1;  // of a fragment
  const auto part = [](int dims, int split) { return (dims / fragment + split - 1) / split; };

  TileShape shape = {fragment, 32, 4, 1};
  while (shape.rows < packed_rows && shape.rows < most_rows) shape.rows *= 2;
  if (shape.rows > 16 || problem.has_qv) shape.keys = 16;
  const auto registers = [&](int split) {
    const int o = part(problem.head_dim_v, split);
    const int q = part(problem.head_dim, split) + (problem.has_qv ? o : 0);
    const int v = problem.has_qv ? shape.keys / fragment * o : 0;  // read for the scores, kept for the output
    return shape.rows / fragment * (2 * o + registers_of_q * q) + registers_of_q * v;
  };
  while (shape.split_d < 8 && registers(shape.split_d) > most_registers) shape.split_d *= 2;
  shape.simdgroups = std::max(shape.simdgroups, shape.split_d);
  return with_wishes(shape);
}

std::array<int, 3> key_blocks(const AttentionProblem& problem, TileShape shape) {
  return {blocks(problem.max_seqlen_k, shape.keys), problem.heads_k, problem.batch};
}

}  // namespace

const Operand* Operands::find(const std::string& name) const {
  const auto found = std::find_if(arrays.begin(), arrays.end(), [&](const Operand& operand) { return operand.name == name; });
  return found == arrays.end() ? nullptr : &*found;
}

Kernel forward_kernel(const AttentionProblem& problem, const Operands& operands, Gpu gpu) {
  // In threadgroup memory, where what codes stand for is float32.
  const bool has_32_bits = problem.dtype == DType::float32 || operands.k_code_bits > 0 || operands.v_code_bits > 0;
  TileShape shape = has_32_bits ? tile_shape(problem, forward_32_bits, forward_32_bits)
                                : tile_shape(problem, forward_16_bits, forward_32_bits);
  const bool wide = gpu.generation >= first_generation_with_wide_key_blocks && !has_32_bits;
  if (wide && shape.split_d == 1) shape = with_wishes({32, 32, 4, 1});
  // qv needs K and V in threadgroup memory at once.
  constexpr int dims_beside_each_other = 432;
  if (has_32_bits && problem.has_qv && problem.head_dim + problem.head_dim_v > dims_beside_each_other) shape.keys = 8;
  return make_kernel("forward", problem, operands, defines_of(problem, operands, shape), names_of(operands), {"out", "lse"},
                     shape.simdgroups * simdgroup_threads, query_blocks(problem, shape));
}

Kernel delta_kernel(const AttentionProblem& problem, const Operands& operands) {
  constexpr TileShape shape = {1, 1, 4, 1};  // a row a simdgroup
  const std::int64_t rows = query_rows(problem) * problem.heads_q;
  return make_kernel("delta", problem, operands, defines_of(problem, operands, shape), {"params", "out", "dout", "dlse"},
                     {"delta"}, shape.simdgroups * simdgroup_threads, {blocks(rows, shape.simdgroups), 1, 1});
}

Kernel backward_dq_kernel(const AttentionProblem& problem, const Operands& operands, Gpu) {
  const TileShape shape = tile_shape(problem, backward_dq_16_bits, backward_dq_32_bits);
  return make_kernel("backward_dq", problem, operands, defines_of(problem, operands, shape),
                     joined(names_of(operands), {"dout", "lse", "delta"}), {"dq"}, shape.simdgroups * simdgroup_threads,
                     query_blocks(problem, shape));
}

Kernel backward_dkv_kernel(const AttentionProblem& problem, const Operands& operands, Gpu) {
  const TileShape shape = tile_shape(problem, backward_dkv_16_bits, backward_dkv_32_bits);
  return make_kernel("backward_dkv", problem, operands, defines_of(problem, operands, shape),
                     joined(names_of(operands), {"dout", "lse", "delta"}), {"dk", "dv"}, shape.simdgroups * simdgroup_threads,
                     key_blocks(problem, shape));
}

Kernel mask_gradient_kernel(const AttentionProblem& problem, const Operands& operands, const std::array<int, 4>& mask, Gpu) {
  const TileShape shape = tile_shape(problem, backward_dq_16_bits, backward_dq_32_bits);
  return make_kernel("mask_gradient", problem, operands, defines_of(problem, operands, shape),
                     joined(names_of(operands), {"dout", "lse", "delta"}), {"dmask"}, shape.simdgroups * simdgroup_threads,
                     {blocks(mask[3], shape.keys) * blocks(mask[2], shape.rows), mask[1], mask[0]});
}

bool is_decoded(const AttentionProblem& problem) {
  // Beyond them forward's blocks of rows are worth staging keys for.
  constexpr std::int64_t most_rows = 32;
  const bool is_large = std::max(problem.head_dim, problem.head_dim_v) > largest_forward_head_dim;
  return problem.cached && (is_large || std::int64_t{problem.max_seqlen_q} * problem.group() <= most_rows);
}

int decode_splits(const AttentionProblem& problem, Gpu gpu) {
  constexpr std::int64_t least_keys = 256;  // of a split: fewer do not pay for combining them
  const std::int64_t keys = problem.cached ? problem.key_capacity() : problem.max_seqlen_k;
  const TileShape shape = decode_shape(problem);
  const auto [row_blocks, heads, batch] = query_blocks(problem, shape);
  const std::int64_t threadgroups = std::max<std::int64_t>(std::int64_t{row_blocks} * heads * batch, 1);
  const std::int64_t wanted =
      problem.num_splits > 0 ? problem.num_splits : (gpu.threadgroups + threadgroups - 1) / threadgroups;
  const std::int64_t most = problem.num_splits > 0 ? blocks(keys, shape.keys) : keys / least_keys;
  return static_cast<int>(std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(most, 1)));
}

Kernel decode_kernel(const AttentionProblem& problem, const Operands& operands, int splits) {
  const TileShape shape = decode_shape(problem);
  Defines defines = defines_of(problem, operands, shape);
  defines.flag("FA_SPLITS", splits > 1);
  auto threadgroups = query_blocks(problem, shape);
  threadgroups[0] *= splits;
  const std::vector<std::string> outputs =
      splits > 1 ? std::vector<std::string>{"out_partial", "lse_partial"} : std::vector<std::string>{"out", "lse"};
  Kernel kernel = make_kernel("decode", problem, operands, defines, names_of(operands), outputs,
                              shape.simdgroups * simdgroup_threads, threadgroups);
  kernel.params[param_splits] = splits;
  return kernel;
}

Kernel combine_kernel(const AttentionProblem& problem, const Operands& operands, int splits) {
  constexpr TileShape shape = {1, 1, 4, 1};  // a row of a head a simdgroup
  Kernel kernel = make_kernel("combine", problem, operands, defines_of(problem, operands, shape),
                              {"params", "out_partial", "lse_partial"}, {"out", "lse"}, shape.simdgroups * simdgroup_threads,
                              {blocks(query_rows(problem) * problem.heads_q, shape.simdgroups), 1, 1});
  kernel.params[param_splits] = splits;
  return kernel;
}

Kernel rotary_kernel(const AttentionProblem& problem, Rotated rotated, bool packed) {
  const bool queries = rotated == Rotated::queries;
  Defines defines;
  defines.set("FA_T", type_of(problem.dtype));
  defines.set("FA_D", problem.head_dim);
  defines.set("FA_ROTARY_DIM", problem.rotary_dim);
  defines.flag("FA_INTERLEAVED", problem.rotary_interleaved);
  defines.flag("FA_QUERIES", queries);
  defines.flag("FA_VARLEN", packed);
  defines.set("FA_GROUP", problem.group());
  const std::int64_t new_rows = packed ? problem.total_new : std::int64_t{problem.batch} * problem.seqlen_new;
  const std::int64_t rows = queries ? query_rows(problem) : new_rows;
  const std::int64_t pairs = rows * (queries ? problem.heads_q : problem.heads_k) * ((problem.head_dim + 1) / 2);
  constexpr int threads = 256;
  std::vector<std::string> inputs = {"params", "x", "rotary_base", "rotary_cos", "rotary_sin"};
  if (packed) inputs.emplace_back("token_starts");
  return make_kernel("rotary", problem, {}, defines, inputs, {"rotated"}, threads, {blocks(pairs, threads), 1, 1});
}

}  // namespace flash_attn::metal
