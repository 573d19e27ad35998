// Which page of a paged KV cache holds which tokens of which sequence. Bookkeeping only: it knows no array and no framework.
//
// A sequence is a length and a list of pages; page i of the list holds its tokens [i * page_size, (i + 1) * page_size). Pages
// are counted by reference: forks share all of theirs, and sequences that begin with the same tokens share the full pages of
// that prefix. A page that two sequences hold is never written: the one that appends gets a copy of its own.
//
// A full page whose tokens are known outlives its sequences: nobody holds it, it is idle, and a sequence with the same prefix
// revives it. When no page is free the one that was idle for longest is reused, of a freed sequence the last page first.
//
// Callers write the tokens of an append before they add or fork another sequence, which might read them; if they cannot, a trim
// to the length before the append takes it back. One thread at a time may call a PageAllocator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace flash_attn {

using PageId = std::int32_t;
using SequenceId = std::int64_t;  // never given twice
using Token = std::int64_t;       // any number that says what was appended: two tokens are the same if their numbers are

/// No change was made; every sequence is as it was.
struct OutOfPages : std::runtime_error {
  OutOfPages(std::int64_t needed_pages, int available_pages, int all_pages);
  std::int64_t needed;
  int available;  // free or idle
};

/// The content of page `from` is to be copied into page `to`, before either is written.
struct PageCopy {
  PageId from;
  PageId to;
  bool operator==(const PageCopy&) const = default;
};

/// used + idle + free = pages.
struct PageStatistics {
  int pages = 0;
  int used = 0;                // held by a sequence
  int shared = 0;              // of those, held by more than one
  int idle = 0;                // held by none, content kept
  int free = 0;                // no content
  std::int64_t hits = 0;       // pages that new sequences found in place, since the start
  std::int64_t evictions = 0;  // idle pages reused for other content
  std::int64_t copies = 0;     // pages copied because a fork wrote
};

/// Where the tokens of a full page are looked up; `parent` stands for all tokens before them. Every hit is compared token by
/// token, so that a bad hash costs time and nothing else.
using PrefixHash = std::uint64_t (*)(std::uint64_t parent, std::span<const Token> tokens);
std::uint64_t hash_prefix(std::uint64_t parent, std::span<const Token> tokens);

class PagePool;

class PageAllocator {
 public:
  PageAllocator(int num_pages, int page_size, PrefixHash hash = hash_prefix);
  ~PageAllocator();
  PageAllocator(PageAllocator&&) noexcept;
  PageAllocator& operator=(PageAllocator&&) noexcept;

  /// A new sequence. It starts with the longest prefix of `prompt` that lies in full pages already, short of the last token,
  /// whose query has to be computed in any case; length() says how many tokens that is. Takes no free page.
  SequenceId add(std::span<const Token> prompt = {});

  /// Lengthens `sequences`, all or none, and returns the copies to make first.
  /// Throws OutOfPages, or std::invalid_argument for a sequence that is not there or comes twice; then nothing has changed.
  std::vector<PageCopy> append(const std::vector<SequenceId>& sequences, const std::vector<int>& counts);
  /// With token ids, which make the pages findable for add(). What follows an append without ids is not.
  std::vector<PageCopy> append(const std::vector<SequenceId>& sequences, const std::vector<std::vector<Token>>& tokens);
  /// As append, but only gets the pages ready: the next `counts` tokens need none, and pages() stays as it is while they come.
  std::vector<PageCopy> reserve(const std::vector<SequenceId>& sequences, const std::vector<int>& counts);

  /// A sequence with the same tokens in the same pages.
  SequenceId fork(SequenceId sequence);
  /// Drops the tokens from `length` on, and pages reserved beyond. Full pages that the last append completed are forgotten,
  /// they may never have been written; older ones stay findable.
  void trim(SequenceId sequence, int length);
  void free(SequenceId sequence);
  /// `num_pages` in all, no fewer than there are.
  void grow(int num_pages);

  int length(SequenceId sequence) const;
  const std::vector<PageId>& pages(SequenceId sequence) const;
  int page_size() const { return page_size_; }
  int num_pages() const;
  PageStatistics statistics() const;

 private:
  struct Sequence {
    int length = 0;
    int settled = 0;  // length before the last append
    std::vector<PageId> pages;
    std::vector<Token> tokens;  // of the start, as far as they are known
  };
  /// One sequence's part of a transaction; `tokens` is empty where they are not known.
  struct Addition {
    SequenceId sequence;
    int count;
    std::span<const Token> tokens;
  };

  const Sequence& at(SequenceId sequence) const;
  Sequence& at(SequenceId sequence);
  SequenceId insert(Sequence sequence);
  int pages_for(std::int64_t length) const;
  std::optional<std::size_t> tail_of(const Sequence& sequence) const;

  std::vector<PageCopy> make_room(const std::vector<Addition>& additions);
  void check(const std::vector<Addition>& additions) const;
  std::int64_t pages_needed(const std::vector<Addition>& additions) const;
  void make_tail_writable(Sequence& sequence, std::vector<PageCopy>& copies);
  void lengthen(const std::vector<Addition>& additions);
  void publish_full_pages(Sequence& sequence, int old_length);

  int page_size_;
  std::unique_ptr<PagePool> pool_;
  SequenceId next_sequence_ = 0;
  std::unordered_map<SequenceId, Sequence> sequences_;
  std::int64_t hits_ = 0;
  std::int64_t copies_ = 0;
};

}  // namespace flash_attn
