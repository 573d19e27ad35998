#include "kv_cache/prefix_index.h"

#include <algorithm>

namespace flash_attn {

std::uint64_t hash_prefix(std::uint64_t parent, std::span<const Token> tokens) {
  // The finaliser of SplitMix64 after every word.
  std::uint64_t hash = parent;
  for (const Token token : tokens) {
    hash += 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(token);
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  return hash;
}

std::optional<PageId> PrefixIndex::find(PrefixId parent, std::span<const Token> tokens) const {
  const auto [begin, end] = pages_.equal_range(hash_(parent, tokens));
  for (auto candidate = begin; candidate != end; ++candidate) {
    const Content& content = *contents_[static_cast<std::size_t>(candidate->second)];
    const bool same = std::equal(content.tokens.begin(), content.tokens.end(), tokens.begin(), tokens.end());
    if (content.parent == parent && same) return candidate->second;
  }
  return std::nullopt;
}

std::optional<PrefixId> PrefixIndex::prefix_of(PageId page) const {
  const std::optional<Content>& content = contents_[static_cast<std::size_t>(page)];
  return content ? std::optional(content->prefix) : std::nullopt;
}

void PrefixIndex::add(PageId page, PrefixId parent, std::span<const Token> tokens) {
  const std::optional<PageId> twin = find(parent, tokens);
  const PrefixId prefix = twin ? *prefix_of(*twin) : ++last_prefix_;
  const std::uint64_t hash = hash_(parent, tokens);
  contents_[static_cast<std::size_t>(page)] = Content{parent, prefix, hash, {tokens.begin(), tokens.end()}};
  pages_.emplace(hash, page);
}

void PrefixIndex::remove(PageId page) {
  std::optional<Content>& content = contents_[static_cast<std::size_t>(page)];
  if (!content) return;
  const auto [begin, end] = pages_.equal_range(content->hash);
  pages_.erase(std::find_if(begin, end, [page](const auto& entry) { return entry.second == page; }));
  content.reset();
}

}  // namespace flash_attn
