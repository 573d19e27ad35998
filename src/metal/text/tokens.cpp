#include "metal/text/tokens.h"

#include <algorithm>
#include <initializer_list>

namespace flash_attn::metal {
namespace {

bool is_digit(char c) { return '0' <= c && c <= '9'; }
bool is_of_word(char c) { return ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z') || is_digit(c) || c == '_'; }

std::size_t length_of_number(std::string_view text) {
  const bool is_hexadecimal = text.substr(0, 2) == "0x";
  std::size_t i = 1;
  for (; i < text.size(); ++i) {
    const bool is_sign = (text[i] == '+' || text[i] == '-') && !is_hexadecimal && (text[i - 1] == 'e' || text[i - 1] == 'E');
    if (!is_of_word(text[i]) && text[i] != '.' && !is_sign) break;
  }
  return i;
}

/// Not >>, which may close two templates: two neighbours mean the same.
std::size_t length_of_operator(std::string_view text) {
  constexpr std::string_view second_characters = "=:>+-&|<";
  if (text.size() < 2 || second_characters.find(text[1]) == std::string_view::npos) return 1;
  for (const std::string_view op : {"<<=", "::", "->", "++", "--", "&&", "||", "==", "!=", "<=",
                                    ">=",  "<<", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^="}) {
    if (text.substr(0, op.size()) == op) return op.size();
  }
  return 1;
}

std::size_t length_of_token(std::string_view text) {
  if (text[0] == '"') return text.find('"', 1) + 1;
  if (is_digit(text[0]) || (text[0] == '.' && text.size() > 1 && is_digit(text[1]))) return length_of_number(text);
  if (!is_of_word(text[0])) return length_of_operator(text);
  return static_cast<std::size_t>(std::find_if_not(text.begin(), text.end(), is_of_word) - text.begin());
}

void add_line(std::string_view line, Tokens& tokens) {
  bool starts_line = true;
  for (std::size_t at = 0;;) {
    const std::size_t begin = line.find_first_not_of(" \t\r", at);
    if (begin == std::string_view::npos || line.substr(begin, 2) == "//") return;
    const std::size_t length = length_of_token(line.substr(begin));
    tokens.push_back({line.substr(at, begin - at), line.substr(begin, length), starts_line});
    starts_line = false;
    at = begin + length;
  }
}

/// What all lanes of a simdgroup or threadgroup do together.
bool is_collective(std::string_view name) { return name == "threadgroup_barrier" || name.starts_with("simd"); }

/// Whether two tokens side by side would read as something else.
bool need_space(const Token& left, const Token& right) {
  const char end = left.text.back();
  const char begin = right.text.front();
  if (is_of_word(end) && is_of_word(begin)) return true;
  const bool double_means_another = std::string_view("+-&|<=:/").find(end) != std::string_view::npos;
  return !right.space.empty() && ((end == begin && double_means_another) || (end == '/' && begin == '*'));
}

}  // namespace

bool Token::is_name() const { return is_of_word(text.front()) && !is_digit(text.front()); }

Tokens tokens_of(std::string_view text) {
  Tokens tokens;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    add_line(text.substr(0, end), tokens);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return tokens;
}

std::size_t end_of_line(const Tokens& tokens, std::size_t first) {
  std::size_t end = first + 1;
  while (end < tokens.size() && !tokens[end].starts_line) ++end;
  return end;
}

std::string as_read(const Tokens& tokens) {
  std::string text;
  for (const Token& token : tokens) {
    if (token.starts_line && !text.empty()) text += '\n';
    text += token.space;
    text += token.text;
  }
  return text + '\n';
}

std::string squeezed(const Tokens& tokens, const Names& names) {
  constexpr std::size_t enough_of_line = 80;
  std::string text;
  std::size_t line = 0;
  bool line_is_full = false;
  bool is_directive = false;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const Token& token = tokens[i];
    const bool begins_directive = token.starts_line && token.text == "#";
    if (i > 0) {
      const bool ends_statement = token.starts_line && (text.back() == ';' || text.back() == '}');
      const bool ends_line = ends_statement && (line_is_full || text.size() - line >= enough_of_line);
      if (begins_directive || (is_directive && token.starts_line) || ends_line) {
        text += '\n';
        line = text.size();
        line_is_full = false;
      } else if (need_space(tokens[i - 1], token) || (is_directive && !token.space.empty())) {
        text += ' ';
      }
    }
    if (token.starts_line) is_directive = begins_directive;
    line_is_full |= is_collective(token.text);
    const auto name = names.find(token.text);
    text += name == names.end() ? token.text : name->second;
  }
  return text + '\n';
}

}  // namespace flash_attn::metal
