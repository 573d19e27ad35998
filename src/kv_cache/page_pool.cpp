#include "kv_cache/page_pool.h"

namespace flash_attn {

void PagePool::grow(int num_pages) {
  const int old = size();
  pages_.resize(static_cast<std::size_t>(num_pages));
  prefixes_.resize(num_pages);
  for (PageId page = num_pages; page-- > old;) free_.push_back(page);
}

PageId PagePool::take() {
  PageId page;
  if (!free_.empty()) {
    page = free_.back();
    free_.pop_back();
  } else {
    page = idle_.front();
    idle_.pop_front();
    prefixes_.remove(page);
    ++evictions_;
  }
  pages_[static_cast<std::size_t>(page)].holders = 1;
  return page;
}

void PagePool::hold(PageId page) {
  Page& held = pages_[static_cast<std::size_t>(page)];
  if (held.holders == 0) idle_.erase(held.idle_position);
  if (held.holders == 1) ++shared_;
  ++held.holders;
}

void PagePool::release(PageId page) {
  Page& released = pages_[static_cast<std::size_t>(page)];
  --released.holders;
  if (released.holders == 1) --shared_;
  if (released.holders > 0) return;
  if (prefixes_.prefix_of(page)) {
    released.idle_position = idle_.insert(idle_.end(), page);
  } else {
    free_.push_back(page);
  }
}

PageStatistics PagePool::statistics() const {
  return {.pages = size(),
          .used = size() - available(),
          .shared = shared_,
          .idle = static_cast<int>(idle_.size()),
          .free = static_cast<int>(free_.size()),
          .evictions = evictions_};
}

}  // namespace flash_attn
