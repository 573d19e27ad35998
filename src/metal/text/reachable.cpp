#include "metal/text/reachable.h"

#include <algorithm>
#include <unordered_set>

namespace flash_attn::metal {
namespace {

constexpr int no_owner = -1;

// A declaration; of a struct, its head and its end and each member between them.
struct Piece {
  std::size_t begin;
  std::size_t end;
  std::string_view name;  // empty: kept with its owner
  int owner = no_owner;   // the head of the struct
  bool kept = false;
};

class Pieces {
 public:
  explicit Pieces(const Tokens& tokens) : tokens_(tokens) { split(0, tokens.size(), no_owner); }

  Tokens reached_from(const Tokens& body) {
    mention(body.begin(), body.end());
    while (keep_mentioned()) continue;
    Tokens result;
    for (const Piece& piece : pieces_) {
      if (piece.kept) result.insert(result.end(), at(piece.begin), at(piece.end));
    }
    return result;
  }

 private:
  Tokens::const_iterator at(std::size_t i) const { return tokens_.begin() + static_cast<std::ptrdiff_t>(i); }
  std::string_view text(std::size_t i) const { return i < tokens_.size() ? tokens_[i].text : std::string_view(); }

  void split(std::size_t begin, std::size_t end, int owner) {
    while (begin < end) {
      if (text(begin) == "namespace") {
        while (text(begin++) != "{") continue;
      } else if (text(begin) == "}") {
        ++begin;  // of a namespace
      } else if (text(begin) == "#") {
        const std::size_t line = end_of_line(tokens_, begin);
        pieces_.push_back({begin, line, text(begin + 2), owner});
        begin = line;
      } else {
        begin = split_declaration(begin, owner);
      }
    }
  }

  /// Returns where it ends.
  std::size_t split_declaration(std::size_t begin, int owner) {
    const std::size_t end = end_of_declaration(begin);
    const std::size_t start = past_template(begin);
    if (text(start) != "struct") {
      pieces_.push_back({begin, end, declared_name(start, owner != no_owner), owner});
      return end;
    }
    std::size_t open = start;
    while (text(open) != "{") ++open;
    const int head = static_cast<int>(pieces_.size());
    pieces_.push_back({begin, open + 1, text(start + 1), owner});
    split(open + 1, end - 2, head);
    pieces_.push_back({end - 2, end, {}, head});  // };
    return end;
  }

  std::size_t end_of_declaration(std::size_t begin) const {
    int depth = 0;
    for (std::size_t i = begin;; ++i) {
      const std::string_view token = text(i);
      if (token == "(" || token == "[" || token == "{") ++depth;
      if (token == ")" || token == "]" || token == "}") --depth;
      if (depth > 0) continue;
      if (token == ";" || token.empty()) return i + 1;
      if (token == "}" && text(i + 1) != ";") return i + 1;
    }
  }

  std::size_t past_template(std::size_t begin) const {
    if (text(begin) != "template") return begin;
    int depth = 0;
    std::size_t i = begin + 1;
    do {
      if (text(i) == "<") ++depth;
      if (text(i) == ">") --depth;
      ++i;
    } while (depth > 0);
    return i;
  }

  /// Empty for what is kept anyway: enums, assertions, and data of a struct.
  std::string_view declared_name(std::size_t begin, bool is_member) const {
    if (text(begin) == "enum" || text(begin) == "static_assert") return {};
    std::size_t i = begin;
    while (text(i) != "(" && text(i) != "=" && text(i) != "[" && text(i) != "{" && text(i) != ";") ++i;
    return is_member && text(i) != "(" ? std::string_view() : text(i - 1);
  }

  void mention(Tokens::const_iterator begin, Tokens::const_iterator end) {
    for (auto token = begin; token != end; ++token) mentioned_.insert(token->text);
  }

  bool keep_mentioned() {
    bool found = false;
    for (Piece& piece : pieces_) {
      if (piece.kept || (piece.owner != no_owner && !pieces_[piece.owner].kept)) continue;
      if (!piece.name.empty() && !mentioned_.contains(piece.name)) continue;
      piece.kept = found = true;
      mention(at(piece.begin), at(piece.end));
    }
    return found;
  }

  const Tokens& tokens_;
  std::vector<Piece> pieces_;
  std::unordered_set<std::string_view> mentioned_;
};

}  // namespace

Tokens reachable(const Tokens& declarations, const Tokens& body) { return Pieces(declarations).reached_from(body); }

}  // namespace flash_attn::metal
