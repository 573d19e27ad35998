// Which pages hold which content: a tree of prefixes, found by hash.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "flash_attn/page_allocator.h"

namespace flash_attn {

/// A prefix of whole pages. Pages with the same tokens after the same prefix have one id, and no other prefix ever gets it. So
/// equal ids mean equal tokens from the first on, though only a page's own are stored.
using PrefixId = std::uint64_t;
inline constexpr PrefixId empty_prefix = 0;

class PrefixIndex {
 public:
  explicit PrefixIndex(PrefixHash hash) : hash_(hash) {}

  void resize(int num_pages) { contents_.resize(static_cast<std::size_t>(num_pages)); }

  /// A page with `tokens` after `parent`.
  std::optional<PageId> find(PrefixId parent, std::span<const Token> tokens) const;

  /// The prefix that ends with a page's tokens, if the page is known.
  std::optional<PrefixId> prefix_of(PageId page) const;

  void add(PageId page, PrefixId parent, std::span<const Token> tokens);
  void remove(PageId page);

 private:
  struct Content {
    PrefixId parent;
    PrefixId prefix;
    std::uint64_t hash;
    std::vector<Token> tokens;
  };

  PrefixHash hash_;
  PrefixId last_prefix_ = empty_prefix;
  std::vector<std::optional<Content>> contents_;  // by page
  std::unordered_multimap<std::uint64_t, PageId> pages_;
};

}  // namespace flash_attn
