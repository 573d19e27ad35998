// A Metal text between reading and writing it: its words, numbers and operators.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace flash_attn::metal {

/// Views of a text that outlives it.
struct Token {
  std::string_view space;  // before it, in its line
  std::string_view text;
  bool starts_line = false;

  bool is_name() const;
};

using Tokens = std::vector<Token>;

/// By what they replace.
using Names = std::unordered_map<std::string_view, std::string>;

/// Comments are dropped.
Tokens tokens_of(std::string_view text);

/// Past the end of the line in which `first` is.
std::size_t end_of_line(const Tokens& tokens, std::size_t first);

/// Lines and spaces as they were read.
std::string as_read(const Tokens& tokens);

/// No space that C++ can do without, and other names where `names` has them. A line still ends with a statement, and has at
/// most one barrier or operation of a simdgroup: errors, and whatever watches a kernel run, name them by their line.
std::string squeezed(const Tokens& tokens, const Names& names);

}  // namespace flash_attn::metal
