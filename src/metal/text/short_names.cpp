#include "metal/text/short_names.h"

#include <algorithm>
#include <unordered_map>
#include <utility>
#include <vector>

namespace flash_attn::metal {
namespace {

/// Names in our texts that are not ours. One that is missing here is renamed, and its text does not compile, on Linux either.
const std::unordered_set<std::string_view> foreign = {
    // C++
    "auto", "bool", "break", "char", "class", "const", "constexpr", "continue", "do", "else", "enum", "false", "float", "for",
    "if", "inline", "int", "long", "namespace", "operator", "or", "reinterpret_cast", "return", "short", "sizeof", "static",
    "static_assert", "static_cast", "struct", "template", "this", "true", "typename", "using", "void", "while",
    // the preprocessor
    "_Pragma", "define",
    // Metal and MLX
    "METAL_FUNC", "as_type", "bfloat16_t", "constant", "device", "half", "int64_t", "metal", "thread", "threadgroup", "uchar",
    "uint", "ulong", "ushort", "vec", "w", "x", "y", "z",
    // in namespace metal
    "abs", "clamp", "conditional_t", "exp2", "fast", "infinity", "log2", "max", "mem_flags", "mem_threadgroup", "mulhi",
    "numeric_limits", "precise", "rint", "simd_max", "simd_shuffle", "simd_shuffle_xor", "simd_sum", "simdgroup_matrix",
    "simdgroup_multiply_accumulate", "tanh", "thread_elements", "threadgroup_barrier",
    // a thread's place, which MLX declares where a body names it
    "simdgroup_index_in_threadgroup", "thread_index_in_simdgroup", "thread_position_in_grid", "thread_position_in_threadgroup",
    "threadgroup_position_in_grid"};

constexpr std::string_view letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// a, b, ... Z, aa, ba, ...
std::string name_of_number(std::size_t number) {
  std::string name(1, letters[number % letters.size()]);
  return number < letters.size() ? name : name_of_number(number / letters.size() - 1) + name;
}

/// A macro of one letter could mean something to what comes after the text.
constexpr std::string_view macro_prefix = "FA_";

}  // namespace

bool is_foreign(std::string_view name) { return foreign.contains(name); }

Names short_names(const Tokens& text, const std::unordered_set<std::string_view>& kept) {
  std::unordered_map<std::string_view, int> uses;
  for (const Token& token : text) {
    if (token.is_name() && !is_foreign(token.text) && !kept.contains(token.text)) ++uses[token.text];
  }
  std::vector<std::pair<std::string_view, int>> by_uses(uses.begin(), uses.end());
  std::sort(by_uses.begin(), by_uses.end(),
            [](const auto& a, const auto& b) { return std::pair(-a.second, a.first) < std::pair(-b.second, b.first); });

  Names names;
  std::size_t number = 0;
  for (const auto& [name, count] : by_uses) {
    std::string short_name;
    do {
      short_name = name_of_number(number++);
    } while (is_foreign(short_name) || kept.contains(short_name));
    names.emplace(name, name.starts_with(macro_prefix) ? std::string(macro_prefix) + short_name : short_name);
  }
  return names;
}

}  // namespace flash_attn::metal
