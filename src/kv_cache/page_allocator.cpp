#include "flash_attn/page_allocator.h"

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_set>
#include <utility>

#include "kv_cache/page_pool.h"

namespace flash_attn {
namespace {

[[noreturn]] void fail(const std::string& argument, const std::string& got, const std::string& needs) {
  throw std::invalid_argument("[flash_attn] " + argument + ": got " + got + ", needs " + needs);
}

void require_range(const char* argument, std::int64_t got, std::int64_t least, std::int64_t most) {
  if (got < least || got > most) {
    fail(argument, std::to_string(got), "an integer of " + std::to_string(least) + " to " + std::to_string(most));
  }
}

void require_one_each(const char* argument, std::size_t got, std::size_t sequences) {
  if (got != sequences) fail(argument, std::to_string(got), "one for each of " + std::to_string(sequences) + " sequences");
}

constexpr int max_int = std::numeric_limits<int>::max();

}  // namespace

OutOfPages::OutOfPages(std::int64_t needed_pages, int available_pages, int all_pages)
    : std::runtime_error("[flash_attn] out of pages: " + std::to_string(needed_pages) + " needed, " +
                         std::to_string(available_pages) + " available of " + std::to_string(all_pages) +
                         "; nothing has changed: free or trim a sequence, or grow the cache"),
      needed(needed_pages),
      available(available_pages) {}

PageAllocator::PageAllocator(int num_pages, int page_size, PrefixHash hash) : page_size_(page_size) {
  require_range("num_pages", num_pages, 1, max_int);
  require_range("page_size", page_size, 1, max_int);
  pool_ = std::make_unique<PagePool>(num_pages, hash);
}
PageAllocator::~PageAllocator() = default;
PageAllocator::PageAllocator(PageAllocator&&) noexcept = default;
PageAllocator& PageAllocator::operator=(PageAllocator&&) noexcept = default;

// ---- sequences

const PageAllocator::Sequence& PageAllocator::at(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) fail("sequence", std::to_string(sequence), "one that was added and not freed");
  return found->second;
}

PageAllocator::Sequence& PageAllocator::at(SequenceId sequence) {
  return const_cast<Sequence&>(std::as_const(*this).at(sequence));
}

SequenceId PageAllocator::insert(Sequence sequence) {
  sequences_.emplace(next_sequence_, std::move(sequence));
  return next_sequence_++;
}

SequenceId PageAllocator::add(std::span<const Token> prompt) {
  Sequence sequence;
  PrefixId prefix = empty_prefix;
  for (std::size_t end = page_size_; end < prompt.size(); end += page_size_) {
    const auto page = pool_->prefixes().find(prefix, prompt.subspan(end - page_size_, page_size_));
    if (!page) break;
    pool_->hold(*page);
    sequence.pages.push_back(*page);
    prefix = *pool_->prefixes().prefix_of(*page);
  }
  hits_ += static_cast<std::int64_t>(sequence.pages.size());
  sequence.length = sequence.settled = static_cast<int>(sequence.pages.size()) * page_size_;
  sequence.tokens.assign(prompt.begin(), prompt.begin() + sequence.length);
  return insert(std::move(sequence));
}

SequenceId PageAllocator::fork(SequenceId sequence) {
  Sequence child = at(sequence);
  child.pages.resize(static_cast<std::size_t>(pages_for(child.length)));  // not those reserved
  for (const PageId page : child.pages) pool_->hold(page);
  return insert(std::move(child));
}

void PageAllocator::trim(SequenceId sequence, int length) {
  Sequence& trimmed = at(sequence);
  require_range("length", length, 0, trimmed.length);
  const int full = trimmed.length / page_size_;
  for (int i = std::max(length, trimmed.settled) / page_size_; i < full; ++i) {
    const PageId page = trimmed.pages[static_cast<std::size_t>(i)];
    if (pool_->holders(page) == 1) pool_->forget(page);
  }
  while (static_cast<int>(trimmed.pages.size()) > pages_for(length)) {
    pool_->release(trimmed.pages.back());
    trimmed.pages.pop_back();
  }
  trimmed.length = length;
  trimmed.settled = std::min(trimmed.settled, length);
  if (static_cast<int>(trimmed.tokens.size()) > length) trimmed.tokens.resize(static_cast<std::size_t>(length));
}

void PageAllocator::free(SequenceId sequence) {
  const Sequence& freed = at(sequence);
  // A page is idle for longer than all before it, so that prefixes lose their ends first.
  std::for_each(freed.pages.rbegin(), freed.pages.rend(), [this](PageId page) { pool_->release(page); });
  sequences_.erase(sequence);
}

// ---- transactions

std::vector<PageCopy> PageAllocator::append(const std::vector<SequenceId>& sequences, const std::vector<int>& counts) {
  require_one_each("counts", counts.size(), sequences.size());
  std::vector<Addition> additions;
  for (std::size_t i = 0; i < counts.size(); ++i) additions.push_back({sequences[i], counts[i], {}});
  std::vector<PageCopy> copies = make_room(additions);
  lengthen(additions);
  return copies;
}

std::vector<PageCopy> PageAllocator::append(const std::vector<SequenceId>& sequences,
                                            const std::vector<std::vector<Token>>& tokens) {
  require_one_each("tokens", tokens.size(), sequences.size());
  std::vector<Addition> additions;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    require_range("number of tokens", static_cast<std::int64_t>(tokens[i].size()), 0, max_int);
    additions.push_back({sequences[i], static_cast<int>(tokens[i].size()), tokens[i]});
  }
  std::vector<PageCopy> copies = make_room(additions);
  lengthen(additions);
  return copies;
}

std::vector<PageCopy> PageAllocator::reserve(const std::vector<SequenceId>& sequences, const std::vector<int>& counts) {
  require_one_each("counts", counts.size(), sequences.size());
  std::vector<Addition> additions;
  for (std::size_t i = 0; i < counts.size(); ++i) additions.push_back({sequences[i], counts[i], {}});
  return make_room(additions);
}

/// All checks and the count of pages come first: what follows cannot fail.
std::vector<PageCopy> PageAllocator::make_room(const std::vector<Addition>& additions) {
  check(additions);
  const std::int64_t needed = pages_needed(additions);
  if (needed > pool_->available()) throw OutOfPages(needed, pool_->available(), pool_->size());

  std::vector<PageCopy> copies;
  for (const Addition& addition : additions) {
    if (addition.count == 0) continue;
    Sequence& sequence = at(addition.sequence);
    make_tail_writable(sequence, copies);
    const int pages = pages_for(sequence.length + addition.count);
    while (static_cast<int>(sequence.pages.size()) < pages) sequence.pages.push_back(pool_->take());
  }
  copies_ += static_cast<std::int64_t>(copies.size());
  return copies;
}

void PageAllocator::check(const std::vector<Addition>& additions) const {
  std::unordered_set<SequenceId> seen;
  for (const Addition& addition : additions) {
    require_range("count", addition.count, 0, max_int - at(addition.sequence).length);
    if (!seen.insert(addition.sequence).second) {
      fail("sequences", std::to_string(addition.sequence) + " twice", "each sequence once");
    }
  }
}

std::int64_t PageAllocator::pages_needed(const std::vector<Addition>& additions) const {
  std::int64_t needed = 0;
  std::unordered_map<PageId, int> holders;  // of tails: of those that share one, the last to move may keep it
  for (const Addition& addition : additions) {
    if (addition.count == 0) continue;
    const Sequence& sequence = at(addition.sequence);
    needed += std::max(0, pages_for(sequence.length + addition.count) - static_cast<int>(sequence.pages.size()));
    if (const auto tail = tail_of(sequence)) {
      const PageId page = sequence.pages[*tail];
      int& left = holders.try_emplace(page, pool_->holders(page)).first->second;
      if (left > 1) {
        --left;
        ++needed;
      }
    }
  }
  return needed;
}

int PageAllocator::pages_for(std::int64_t length) const { return static_cast<int>((length + page_size_ - 1) / page_size_); }

/// Where in a sequence's pages the one is that is partly filled.
std::optional<std::size_t> PageAllocator::tail_of(const Sequence& sequence) const {
  if (sequence.length % page_size_ == 0) return std::nullopt;
  return static_cast<std::size_t>(sequence.length / page_size_);
}

void PageAllocator::make_tail_writable(Sequence& sequence, std::vector<PageCopy>& copies) {
  const auto tail = tail_of(sequence);
  if (!tail) return;
  const PageId page = sequence.pages[*tail];
  if (pool_->holders(page) == 1) {
    pool_->forget(page);  // a trim may have left a full page partly filled
    return;
  }
  sequence.pages[*tail] = pool_->take();
  pool_->release(page);
  copies.push_back({page, sequence.pages[*tail]});
}

void PageAllocator::lengthen(const std::vector<Addition>& additions) {
  for (const Addition& addition : additions) {
    Sequence& sequence = at(addition.sequence);
    const int old_length = sequence.length;
    sequence.settled = old_length;
    sequence.length += addition.count;
    if (static_cast<int>(sequence.tokens.size()) == old_length) {
      sequence.tokens.insert(sequence.tokens.end(), addition.tokens.begin(), addition.tokens.end());
      publish_full_pages(sequence, old_length);
    }
  }
}

void PageAllocator::publish_full_pages(Sequence& sequence, int old_length) {
  const std::span<const Token> tokens = sequence.tokens;
  const int full = static_cast<int>(tokens.size()) / page_size_;
  for (int i = old_length / page_size_; i < full; ++i) {
    const PrefixId parent =
        i == 0 ? empty_prefix : *pool_->prefixes().prefix_of(sequence.pages[static_cast<std::size_t>(i) - 1]);
    pool_->publish(sequence.pages[static_cast<std::size_t>(i)], parent,
                   tokens.subspan(static_cast<std::size_t>(i) * page_size_, page_size_));
  }
}

// ---- the whole

void PageAllocator::grow(int num_pages) {
  require_range("num_pages", num_pages, pool_->size(), max_int);
  pool_->grow(num_pages);
}

int PageAllocator::length(SequenceId sequence) const { return at(sequence).length; }
const std::vector<PageId>& PageAllocator::pages(SequenceId sequence) const { return at(sequence).pages; }
int PageAllocator::num_pages() const { return pool_->size(); }

PageStatistics PageAllocator::statistics() const {
  PageStatistics statistics = pool_->statistics();
  statistics.hits = hits_;
  statistics.copies = copies_;
  return statistics;
}

}  // namespace flash_attn
