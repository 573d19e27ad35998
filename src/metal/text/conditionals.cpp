#include "metal/text/conditionals.h"

#include <charconv>
#include <map>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

namespace flash_attn::metal {
namespace {

/// What a name stands for: the first token after it, if any.
using Macros = std::map<std::string_view, std::string_view>;

[[noreturn]] void fail(const char* what) { throw std::logic_error(std::string("[flash_attn] in a Metal source: ") + what); }

/// Of an #if: numbers, names, defined, parentheses, !, comparisons, && and ||.
class Expression {
 public:
  Expression(std::span<const Token> tokens, const Macros& macros) : tokens_(tokens), macros_(macros) {}

  bool holds() {
    const bool value = either() != 0;
    if (!tokens_.empty()) fail("an #if that is not understood");
    return value;
  }

 private:
  int either() {
    int value = both();
    while (accept("||")) value = static_cast<int>((both() != 0) | (value != 0));
    return value;
  }

  int both() {
    int value = comparison();
    while (accept("&&")) value = static_cast<int>((comparison() != 0) & (value != 0));
    return value;
  }

  int comparison() {
    const int left = operand();
    if (accept("==")) return static_cast<int>(left == operand());
    if (accept("!=")) return static_cast<int>(left != operand());
    if (accept("<")) return static_cast<int>(left < operand());
    if (accept("<=")) return static_cast<int>(left <= operand());
    if (accept(">")) return static_cast<int>(left > operand());
    if (accept(">=")) return static_cast<int>(left >= operand());
    return left;
  }

  int operand() {
    if (accept("!")) return static_cast<int>(operand() == 0);
    if (accept("(")) {
      const int value = either();
      if (!accept(")")) fail("an #if that is not understood");
      return value;
    }
    if (accept("defined")) {
      const bool has_parentheses = accept("(");
      const bool is_defined = macros_.contains(next());
      if (has_parentheses && !accept(")")) fail("an #if that is not understood");
      return static_cast<int>(is_defined);
    }
    return value_of(next());
  }

  /// A name without a value is 0.
  int value_of(std::string_view text) const {
    if (const auto macro = macros_.find(text); macro != macros_.end()) text = macro->second;
    int value = 0;
    std::from_chars(text.data(), text.data() + text.size(), value);
    return value;
  }

  bool accept(std::string_view text) {
    if (tokens_.empty() || tokens_.front().text != text) return false;
    tokens_ = tokens_.subspan(1);
    return true;
  }

  std::string_view next() {
    if (tokens_.empty()) fail("an #if that is not understood");
    const std::string_view text = tokens_.front().text;
    tokens_ = tokens_.subspan(1);
    return text;
  }

  std::span<const Token> tokens_;
  const Macros& macros_;
};

class Resolver {
 public:
  explicit Resolver(const SourceFiles& files) : files_(files) { macros_["__METAL_VERSION__"] = "1"; }

  void read(std::string_view text) {
    const Tokens tokens = tokens_of(text);
    for (std::size_t begin = 0; begin < tokens.size();) {
      const std::size_t end = end_of_line(tokens, begin);
      const std::span<const Token> line(tokens.begin() + begin, tokens.begin() + end);
      begin = end;
      if (line[0].text == "#" && follow(line)) continue;
      if (is_seen()) result_.insert(result_.end(), line.begin(), line.end());
    }
  }

  /// Starts anew; what was defined stays.
  Tokens take() { return std::exchange(result_, {}); }

 private:
  struct Branches {
    bool seen;      // this branch of an #if
    bool one_seen;  // this one or one before it
  };

  bool is_seen() const { return branches_.empty() || branches_.back().seen; }

  /// Whether that is all there is to the line.
  bool follow(std::span<const Token> line) {
    const std::string_view directive = line[1].text;
    const std::span<const Token> rest = line.subspan(2);
    const bool needs_if = directive == "elif" || directive == "else" || directive == "endif";
    if (needs_if && branches_.empty()) fail("a branch without its #if");
    if (directive == "if" || directive == "ifdef" || directive == "ifndef") {
      const bool seen = is_seen() && holds(directive, rest);
      branches_.push_back({seen, seen || !is_seen()});
    } else if (directive == "elif" || directive == "else") {
      Branches& branches = branches_.back();
      branches.seen = !branches.one_seen && (directive == "else" || holds("if", rest));
      branches.one_seen |= branches.seen;
    } else if (directive == "endif") {
      branches_.pop_back();
    } else if (is_seen() && directive == "include") {
      include(rest);
    } else if (is_seen() && directive == "define") {
      if (rest.size() > 1 && rest[1].text == "(" && rest[1].space.empty()) fail("a #define with parameters");
      macros_[rest[0].text] = rest.size() > 1 ? rest[1].text : std::string_view();
      return false;
    }
    return true;
  }

  bool holds(std::string_view directive, std::span<const Token> condition) const {
    if (directive == "if") return Expression(condition, macros_).holds();
    return macros_.contains(condition[0].text) == (directive == "ifdef");
  }

  /// Metal's own headers are there already.
  void include(std::span<const Token> file) {
    const std::string_view path = file[0].text;
    if (path.front() != '"' || !included_.insert(path).second) return;
    read(files_(path.substr(1, path.size() - 2)));
  }

  const SourceFiles& files_;
  Macros macros_;
  std::set<std::string_view> included_;
  std::vector<Branches> branches_;
  Tokens result_;
};

}  // namespace

Tokens resolved(std::string_view path, std::string_view defines, const SourceFiles& files) {
  Resolver resolver(files);
  resolver.read(defines);
  resolver.take();
  resolver.read(files(path));
  return resolver.take();
}

}  // namespace flash_attn::metal
