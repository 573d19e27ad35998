#include "metal/text/macros.h"

#include <span>
#include <unordered_map>

#include "metal/text/short_names.h"

namespace flash_attn::metal {
namespace {

using Value = std::span<const Token>;

/// Once what it has of our names is short.
bool is_short(Value value) {
  constexpr std::size_t most_letters = 8;
  std::size_t letters = 0;
  for (const Token& token : value) {
    if (token.is_name() && !is_foreign(token.text)) return true;
    letters += token.text.size();
  }
  return letters <= most_letters;
}

class Values {
 public:
  /// Where a value of a #define names others, these come before it.
  void define(std::string_view name, Value value) {
    Tokens& tokens = values_[name];
    tokens.clear();
    for (const Token& token : value) add(token, tokens);
  }

  void add(const Token& token, Tokens& result) const {
    const auto found = values_.find(token.text);
    if (found == values_.end()) {
      result.push_back(token);
      return;
    }
    for (const Token& part : found->second) {  // set apart from what is before it
      const bool is_first = &part == &found->second.front();
      result.push_back({is_first ? " " : part.space, part.text, is_first && token.starts_line});
    }
  }

 private:
  std::unordered_map<std::string_view, Tokens> values_;
};

}  // namespace

Tokens with_values(const Tokens& tokens) {
  Values values;
  Tokens result;
  for (std::size_t begin = 0; begin < tokens.size();) {
    const std::size_t end = end_of_line(tokens, begin);
    const std::span<const Token> line = std::span(tokens).subspan(begin, end - begin);
    begin = end;
    const bool is_define = line[0].text == "#";
    if (is_define && is_short(line.subspan(3))) {
      values.define(line[2].text, line.subspan(3));
    } else if (is_define) {
      result.insert(result.end(), line.begin(), line.end());
    } else {
      for (const Token& token : line) values.add(token, result);
    }
  }
  return result;
}

}  // namespace flash_attn::metal
