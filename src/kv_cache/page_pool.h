// Pages: how many sequences hold each, and which to reuse first when nobody holds it.
#pragma once

#include <list>
#include <vector>

#include "flash_attn/page_allocator.h"
#include "kv_cache/prefix_index.h"

namespace flash_attn {

class PagePool {
 public:
  PagePool(int num_pages, PrefixHash hash) : prefixes_(hash) { grow(num_pages); }

  void grow(int num_pages);

  /// A page without content that nobody held: a free one, else the one idle for longest. available() must be positive.
  PageId take();
  /// One holder more, also of an idle page.
  void hold(PageId page);
  /// One holder less. The last leaves the page idle if its content is known, else free.
  void release(PageId page);
  int holders(PageId page) const { return pages_[static_cast<std::size_t>(page)].holders; }

  /// A page's content is about to change.
  void forget(PageId page) { prefixes_.remove(page); }
  void publish(PageId page, PrefixId parent, std::span<const Token> tokens) { prefixes_.add(page, parent, tokens); }
  const PrefixIndex& prefixes() const { return prefixes_; }

  int size() const { return static_cast<int>(pages_.size()); }
  int available() const { return static_cast<int>(free_.size() + idle_.size()); }
  /// All that the pool knows of.
  PageStatistics statistics() const;

 private:
  struct Page {
    int holders = 0;
    std::list<PageId>::iterator idle_position;  // where it is idle
  };

  std::vector<Page> pages_;
  std::vector<PageId> free_;  // the last is taken first
  std::list<PageId> idle_;    // the first was idle for longest
  PrefixIndex prefixes_;
  int shared_ = 0;
  std::int64_t evictions_ = 0;
};

}  // namespace flash_attn
