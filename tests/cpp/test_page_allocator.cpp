// The page allocator: each rule on its own, then random operations against a model that holds every sequence's tokens.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "flash_attn/page_allocator.h"

namespace flash_attn {
namespace {

using Tokens = std::vector<Token>;
using Pages = std::vector<PageId>;

// `count` tokens from `first` on.
Tokens tokens_from(Token first, int count) {
  Tokens tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::vector<PageCopy> append(PageAllocator& pages, SequenceId sequence, const Tokens& tokens) {
  return pages.append({sequence}, std::vector<Tokens>{tokens});
}

std::vector<PageCopy> append(PageAllocator& pages, SequenceId sequence, int count) {
  return pages.append({sequence}, std::vector<int>{count});
}

SequenceId sequence_of(PageAllocator& pages, const Tokens& tokens) {
  const SequenceId sequence = pages.add(tokens);
  append(pages, sequence, Tokens(tokens.begin() + pages.length(sequence), tokens.end()));
  return sequence;
}

void expect_counts(const PageAllocator& pages, int used, int shared, int idle, int free) {
  const PageStatistics counts = pages.statistics();
  EXPECT_EQ(counts.used, used);
  EXPECT_EQ(counts.shared, shared);
  EXPECT_EQ(counts.idle, idle);
  EXPECT_EQ(counts.free, free);
  EXPECT_EQ(counts.pages, used + idle + free);
}

// All of them collide.
std::uint64_t worst_hash(std::uint64_t, std::span<const Token>) { return 0; }

TEST(PageAllocator, TakesAPageWhenTheLastIsFull) {
  PageAllocator pages(8, 4);
  const SequenceId sequence = pages.add();
  for (int length = 1; length <= 9; ++length) {
    append(pages, sequence, 1);
    EXPECT_EQ(pages.length(sequence), length);
    EXPECT_EQ(pages.pages(sequence).size(), static_cast<std::size_t>((length + 3) / 4));
  }
  expect_counts(pages, 3, 0, 0, 5);
}

TEST(PageAllocator, AForkSharesPagesUntilItWrites) {
  PageAllocator pages(8, 4);
  const SequenceId parent = sequence_of(pages, tokens_from(0, 6));
  const SequenceId child = pages.fork(parent);
  const Pages before = pages.pages(parent);
  EXPECT_EQ(pages.pages(child), before);
  expect_counts(pages, 2, 2, 0, 6);

  const std::vector<PageCopy> copies = append(pages, child, 1);
  EXPECT_EQ(pages.pages(parent), before);
  EXPECT_EQ(copies, (std::vector<PageCopy>{{before[1], pages.pages(child)[1]}}));
  EXPECT_NE(pages.pages(child)[1], before[1]);
  EXPECT_EQ(pages.pages(child)[0], before[0]);
  expect_counts(pages, 3, 1, 0, 5);
  EXPECT_EQ(pages.statistics().copies, 1);
}

TEST(PageAllocator, TheLastHolderWritesInPlace) {
  PageAllocator pages(8, 4);
  const SequenceId parent = sequence_of(pages, tokens_from(0, 6));
  const SequenceId child = pages.fork(parent);
  EXPECT_EQ(append(pages, child, 1).size(), 1u);
  EXPECT_TRUE(append(pages, parent, 1).empty());
}

TEST(PageAllocator, AFullPageIsNotCopied) {
  PageAllocator pages(8, 4);
  const SequenceId parent = sequence_of(pages, tokens_from(0, 8));
  const SequenceId child = pages.fork(parent);
  EXPECT_TRUE(append(pages, child, 1).empty());
  EXPECT_TRUE(append(pages, parent, 1).empty());
  EXPECT_EQ(pages.pages(parent)[1], pages.pages(child)[1]);
  EXPECT_NE(pages.pages(parent)[2], pages.pages(child)[2]);
}

TEST(PageAllocator, OfThreeThatShareAPageInOneTransactionTwoCopy) {
  PageAllocator pages(3, 4);
  const SequenceId a = sequence_of(pages, tokens_from(0, 2));
  const SequenceId b = pages.fork(a);
  const SequenceId c = pages.fork(a);
  EXPECT_EQ(pages.append({a, b, c}, std::vector<int>{1, 1, 1}).size(), 2u);
  expect_counts(pages, 3, 0, 0, 0);
}

TEST(PageAllocator, OutOfPagesChangesNothing) {
  PageAllocator pages(4, 4);
  const SequenceId a = sequence_of(pages, tokens_from(0, 6));
  const SequenceId b = pages.fork(a);
  const SequenceId c = pages.add();
  const auto before = std::vector{pages.pages(a), pages.pages(b), pages.pages(c)};
  try {
    pages.append({c, a, b}, std::vector<int>{4, 1, 4});  // one, a copy, one
    FAIL() << "three pages are needed, two are there";
  } catch (const OutOfPages& error) {
    EXPECT_EQ(error.needed, 3);
    EXPECT_EQ(error.available, 2);
  }
  EXPECT_EQ((std::vector{pages.pages(a), pages.pages(b), pages.pages(c)}), before);
  EXPECT_EQ((std::vector{pages.length(a), pages.length(b), pages.length(c)}), (std::vector{6, 6, 0}));
  expect_counts(pages, 2, 2, 0, 2);
  EXPECT_EQ(pages.append({c, a, b}, std::vector<int>{4, 1, 2}).size(), 1u);
  expect_counts(pages, 4, 1, 0, 0);
}

TEST(PageAllocator, APromptFindsTheFullPagesOfItsPrefix) {
  PageAllocator pages(8, 4);
  const SequenceId first = sequence_of(pages, tokens_from(0, 10));
  const SequenceId second = pages.add(tokens_from(0, 11));
  EXPECT_EQ(pages.length(second), 8);
  EXPECT_EQ(pages.pages(second), (Pages{pages.pages(first)[0], pages.pages(first)[1]}));
  EXPECT_EQ(pages.statistics().hits, 2);

  Tokens other = tokens_from(0, 10);
  other[5] = 99;
  EXPECT_EQ(pages.length(pages.add(other)), 4);
}

TEST(PageAllocator, TheLastTokenOfAPromptIsNeverCached) {
  PageAllocator pages(8, 4);
  sequence_of(pages, tokens_from(0, 8));
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 8))), 4);
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 4))), 0);
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 9))), 8);
}

TEST(PageAllocator, APageIsFoundOnlyAfterItsOwnPrefix) {
  PageAllocator pages(8, 4);
  sequence_of(pages, {1, 1, 1, 1, 7, 7, 7, 7});
  sequence_of(pages, {2, 2, 2, 2, 8, 8, 8, 8});
  EXPECT_EQ(pages.length(pages.add(Tokens{1, 1, 1, 1, 8, 8, 8, 8, 0})), 4);
  EXPECT_EQ(pages.length(pages.add(Tokens{7, 7, 7, 7, 0})), 0);
}

TEST(PageAllocator, ACollidingHashSharesNothingWrongly) {
  PageAllocator pages(8, 4, worst_hash);
  const SequenceId first = sequence_of(pages, {1, 1, 1, 1, 7, 7, 7, 7});
  sequence_of(pages, {2, 2, 2, 2, 8, 8, 8, 8});
  EXPECT_EQ(pages.length(pages.add(Tokens{1, 1, 1, 1, 8, 8, 8, 8, 0})), 4);
  EXPECT_EQ(pages.length(pages.add(Tokens{3, 3, 3, 3, 0})), 0);
  const SequenceId again = pages.add(Tokens{1, 1, 1, 1, 7, 7, 7, 7, 0});
  EXPECT_EQ(pages.pages(again), pages.pages(first));
}

TEST(PageAllocator, TokensWithoutIdsAreNeverFound) {
  PageAllocator pages(8, 4);
  const SequenceId sequence = pages.add();
  append(pages, sequence, tokens_from(0, 4));
  append(pages, sequence, 2);
  append(pages, sequence, tokens_from(6, 2));
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 12))), 4);
  pages.trim(sequence, 4);
  append(pages, sequence, tokens_from(4, 4));  // known from the start again
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 12))), 8);
}

TEST(PageAllocator, AFreedSequenceIsFoundAgain) {
  PageAllocator pages(8, 4);
  const SequenceId first = sequence_of(pages, tokens_from(0, 10));
  const Pages held = pages.pages(first);
  pages.free(first);
  expect_counts(pages, 0, 0, 2, 6);
  const SequenceId second = pages.add(tokens_from(0, 10));
  EXPECT_EQ(pages.pages(second), (Pages{held[0], held[1]}));
  expect_counts(pages, 2, 0, 0, 6);
}

TEST(PageAllocator, IdlePagesAreReusedOldestFirstAndTailsBeforeHeads) {
  PageAllocator pages(5, 4);
  const SequenceId a = sequence_of(pages, tokens_from(0, 8));
  const SequenceId b = sequence_of(pages, tokens_from(100, 8));
  const Pages of_a = pages.pages(a);
  const Pages of_b = pages.pages(b);
  pages.free(b);
  pages.free(a);
  const SequenceId c = pages.add();
  Pages taken;
  for (int i = 0; i < 5; ++i) {
    append(pages, c, 4);
    taken.push_back(pages.pages(c).back());
  }
  // The one page that was never used comes first.
  EXPECT_EQ(Pages(taken.begin() + 1, taken.end()), (Pages{of_b[1], of_b[0], of_a[1], of_a[0]}));
  EXPECT_EQ(pages.statistics().evictions, 4);
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 8))), 0);
}

TEST(PageAllocator, ALostHeadLeavesItsTailUnfound) {
  PageAllocator pages(4, 4);
  const SequenceId a = sequence_of(pages, tokens_from(0, 9));
  pages.free(a);
  const SequenceId b = pages.add(tokens_from(0, 5));  // revives the head only
  pages.trim(b, 2);
  append(pages, b, tokens_from(50, 6));  // and writes over it
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 9))), 0);
}

// Two sequences with the same tokens in pages of their own, since neither could find the other's when it began.
struct Twins {
  PageAllocator pages{8, 4};
  SequenceId a = pages.add();
  SequenceId b = pages.add();
  Twins() { pages.append({a, b}, std::vector<Tokens>{tokens_from(0, 4), tokens_from(0, 4)}); }
};

TEST(PageAllocator, WhatFollowsEitherOfTwinsIsFound) {
  Twins twins;
  append(twins.pages, twins.a, tokens_from(4, 4));
  append(twins.pages, twins.b, tokens_from(10, 4));
  for (const Token next : {4, 10}) {
    Tokens prompt = tokens_from(0, 4);
    for (const Token token : tokens_from(next, 5)) prompt.push_back(token);
    EXPECT_EQ(twins.pages.length(twins.pages.add(prompt)), 8) << next;
  }
}

TEST(PageAllocator, APrefixIsFoundWhileOneOfTwinsIsLeft) {
  Twins twins;
  twins.pages.free(twins.a);
  append(twins.pages, twins.pages.add(), 7 * 4);  // takes a's page as well
  EXPECT_EQ(twins.pages.statistics().evictions, 1);
  EXPECT_EQ(twins.pages.pages(twins.pages.add(tokens_from(0, 5))), twins.pages.pages(twins.b));
}

TEST(PageAllocator, TrimGivesBackWholePages) {
  PageAllocator pages(8, 4);
  const SequenceId sequence = pages.add();
  append(pages, sequence, 10);
  pages.trim(sequence, 5);
  expect_counts(pages, 2, 0, 0, 6);
  pages.trim(sequence, 4);
  expect_counts(pages, 1, 0, 0, 7);
  pages.trim(sequence, 0);
  expect_counts(pages, 0, 0, 0, 8);
}

TEST(PageAllocator, ContentWrittenOverAfterATrimIsNotFound) {
  PageAllocator pages(8, 4);
  const SequenceId sequence = sequence_of(pages, tokens_from(0, 8));
  append(pages, sequence, tokens_from(8, 1));
  pages.trim(sequence, 6);
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 9))), 8) << "the content is still whole";
  PageAllocator alone(8, 4);
  const SequenceId writer = sequence_of(alone, tokens_from(0, 8));
  append(alone, writer, tokens_from(8, 1));
  alone.trim(writer, 6);
  EXPECT_TRUE(append(alone, writer, tokens_from(60, 1)).empty());
  EXPECT_EQ(alone.length(alone.add(tokens_from(0, 9))), 4);
}

TEST(PageAllocator, ATrimmedPageThatAnotherHoldsIsCopied) {
  PageAllocator pages(8, 4);
  const SequenceId writer = sequence_of(pages, tokens_from(0, 8));
  append(pages, writer, tokens_from(8, 1));
  const SequenceId reader = pages.add(tokens_from(0, 9));
  pages.trim(writer, 6);
  EXPECT_EQ(append(pages, writer, tokens_from(60, 1)).size(), 1u);
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 9))), 8);
  EXPECT_EQ(pages.length(reader), 8);
}

TEST(PageAllocator, TrimTakesBackAnAppendThatWasNeverWritten) {
  PageAllocator pages(8, 4);
  const SequenceId sequence = sequence_of(pages, tokens_from(0, 6));
  append(pages, sequence, tokens_from(6, 6));
  pages.trim(sequence, 6);
  pages.free(sequence);
  EXPECT_EQ(pages.length(pages.add(tokens_from(0, 12))), 4);
}

TEST(PageAllocator, ReservedPagesStayWhereTheyAreWhileTokensCome) {
  PageAllocator pages(8, 4);
  const SequenceId parent = sequence_of(pages, tokens_from(0, 6));
  const SequenceId child = pages.fork(parent);
  EXPECT_EQ(pages.reserve({child}, {7}).size(), 1u);
  EXPECT_EQ(pages.length(child), 6);
  const Pages reserved = pages.pages(child);
  EXPECT_EQ(reserved.size(), 4u);
  append(pages, pages.add(), 3 * 4);  // all the others
  for (int i = 0; i < 7; ++i) EXPECT_TRUE(append(pages, child, 1).empty());
  EXPECT_EQ(pages.pages(child), reserved);
}

TEST(PageAllocator, AForkHoldsNoReservedPages) {
  PageAllocator pages(8, 4);
  const SequenceId parent = sequence_of(pages, tokens_from(0, 6));
  pages.reserve({parent}, {20});
  EXPECT_EQ(pages.pages(pages.fork(parent)).size(), 2u);
  pages.trim(parent, 6);
  EXPECT_EQ(pages.pages(parent).size(), 2u);
}

TEST(PageAllocator, GrowAddsPages) {
  PageAllocator pages(1, 4);
  const SequenceId sequence = pages.add();
  EXPECT_THROW(append(pages, sequence, 5), OutOfPages);
  pages.grow(3);
  append(pages, sequence, 12);
  EXPECT_EQ(Pages(pages.pages(sequence)).size(), 3u);
  EXPECT_EQ(pages.num_pages(), 3);
  EXPECT_THROW(pages.grow(2), std::invalid_argument);
}

TEST(PageAllocator, RefusesWhatMakesNoSense) {
  EXPECT_THROW(PageAllocator(0, 4), std::invalid_argument);
  EXPECT_THROW(PageAllocator(4, 0), std::invalid_argument);
  PageAllocator pages(4, 4);
  const SequenceId sequence = pages.add();
  append(pages, sequence, 3);
  const SequenceId gone = pages.add();
  pages.free(gone);
  EXPECT_THROW(pages.length(gone), std::invalid_argument);
  EXPECT_THROW(pages.free(gone), std::invalid_argument);
  EXPECT_THROW(pages.fork(-1), std::invalid_argument);
  EXPECT_THROW(pages.trim(sequence, 4), std::invalid_argument);
  EXPECT_THROW(pages.trim(sequence, -1), std::invalid_argument);
  EXPECT_THROW(append(pages, sequence, -1), std::invalid_argument);
  EXPECT_THROW(pages.append({sequence}, std::vector<int>{1, 1}), std::invalid_argument);
  EXPECT_THROW(pages.append({sequence, sequence}, std::vector<int>{1, 1}), std::invalid_argument);
  EXPECT_THROW(pages.append({sequence, gone}, std::vector<int>{1, 1}), std::invalid_argument);
  EXPECT_THROW(append(pages, sequence, std::numeric_limits<int>::max()), std::invalid_argument);
  EXPECT_EQ(pages.length(sequence), 3);
}

// ---- random operations

// A slot's content is the whole history that led to its token, as keys and values are. So content that is found for a prefix it
// was not written for shows.
using Slot = Tokens;

class Model {
 public:
  Model(unsigned seed, PrefixHash hash) : random_(seed), pages_(num_pages, page_size, hash), memory_(num_pages) {}

  void step() {
    const int choice = below(100);
    if (choice < 15) return add();
    if (choice < 57) return append();
    if (choice < 66) return fork();
    if (choice < 74) return trim();
    if (choice < 97) return free();
    if (choice < 99) return reserve();
    grow();
  }

  void check() const {
    std::map<PageId, int> holders;
    for (const auto& [sequence, slots] : sequences_) {
      ASSERT_EQ(pages_.length(sequence), static_cast<int>(slots.size()));
      const Pages& pages = pages_.pages(sequence);
      for (std::size_t i = 0; i < slots.size(); ++i) {
        ASSERT_EQ(memory_[pages[i / page_size]][i % page_size], slots[i]) << "sequence " << sequence << " slot " << i;
      }
      ASSERT_EQ(std::set(pages.begin(), pages.end()).size(), pages.size()) << "a page twice in one sequence";
      for (const PageId page : pages) ++holders[page];
    }
    const PageStatistics counts = pages_.statistics();
    ASSERT_EQ(counts.used, static_cast<int>(holders.size()));
    ASSERT_EQ(counts.shared, std::ranges::count_if(holders, [](const auto& entry) { return entry.second > 1; }));
    ASSERT_EQ(counts.used + counts.idle + counts.free, counts.pages);
  }

  PageStatistics statistics() const { return pages_.statistics(); }
  int refused() const { return refused_; }

 private:
  static constexpr int num_pages = 12;
  static constexpr int page_size = 3;
  static constexpr Token unknown = -1;

  int below(int bound) { return std::uniform_int_distribution(0, bound - 1)(random_); }

  // Few tokens, so that prefixes meet.
  Tokens random_tokens(int count) {
    Tokens tokens;
    for (int i = 0; i < count; ++i) tokens.push_back(below(2));
    return tokens;
  }

  SequenceId any_sequence() {
    auto chosen = sequences_.begin();
    std::advance(chosen, below(static_cast<int>(sequences_.size())));
    return chosen->first;
  }

  // What a prefix lookup must find at least: the full pages that a live sequence has in common with `prompt`.
  int live_prefix(const Tokens& prompt) const {
    std::size_t best = 0;
    for (const auto& [sequence, slots] : sequences_) {
      std::size_t common = 0;
      while (common < slots.size() && common + 1 < prompt.size() && slots[common].back() == prompt[common]) ++common;
      best = std::max(best, common / page_size * page_size);
    }
    return static_cast<int>(best);
  }

  void add() {
    const Tokens prompt = random_tokens(below(16));
    const int least = live_prefix(prompt);
    const SequenceId sequence = pages_.add(prompt);
    std::vector<Slot>& slots = sequences_[sequence];
    ASSERT_GE(pages_.length(sequence), least);
    ASSERT_LT(pages_.length(sequence), static_cast<int>(std::max<std::size_t>(prompt.size(), 1)));
    for (int i = 1; i <= pages_.length(sequence); ++i) slots.emplace_back(prompt.begin(), prompt.begin() + i);
  }

  void append() {
    if (sequences_.empty()) return;
    std::set<SequenceId> distinct;
    for (int i = below(3); i >= 0; --i) distinct.insert(any_sequence());
    const std::vector<SequenceId> chosen(distinct.begin(), distinct.end());
    std::vector<Tokens> tokens;
    std::vector<int> counts;
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      tokens.push_back(random_tokens(below(5)));
      counts.push_back(static_cast<int>(tokens.back().size()));
    }
    const bool with_ids = below(4) != 0;
    const PageStatistics before = pages_.statistics();
    try {
      carry_out(with_ids ? pages_.append(chosen, tokens) : pages_.append(chosen, counts));
    } catch (const OutOfPages& error) {
      ++refused_;
      ASSERT_GT(error.needed, before.idle + before.free);
      ASSERT_EQ(pages_.statistics().free, before.free);
      ASSERT_EQ(pages_.statistics().idle, before.idle);
      return;
    }
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      for (const Token token : tokens[i]) write(chosen[i], with_ids ? token : unknown - ++unknown_tokens_);
    }
  }

  void write(SequenceId sequence, Token token) {
    std::vector<Slot>& slots = sequences_[sequence];
    Slot slot = slots.empty() ? Slot() : slots.back();
    slot.push_back(token);
    memory_[pages_.pages(sequence)[slots.size() / page_size]][slots.size() % page_size] = slot;
    slots.push_back(std::move(slot));
  }

  void carry_out(const std::vector<PageCopy>& copies) {
    for (const auto& [from, to] : copies) memory_[to] = memory_[from];
  }

  void fork() {
    if (sequences_.empty()) return;
    const SequenceId parent = any_sequence();
    const SequenceId child = pages_.fork(parent);
    sequences_[child] = sequences_[parent];
  }

  void trim() {
    if (sequences_.empty()) return;
    const SequenceId sequence = any_sequence();
    const int length = below(pages_.length(sequence) + 1);
    pages_.trim(sequence, length);
    sequences_[sequence].resize(static_cast<std::size_t>(length));
  }

  void free() {
    if (sequences_.empty()) return;
    const SequenceId sequence = any_sequence();
    pages_.free(sequence);
    sequences_.erase(sequence);
  }

  void reserve() {
    if (sequences_.empty()) return;
    try {
      carry_out(pages_.reserve({any_sequence()}, {below(7)}));
    } catch (const OutOfPages&) {
      ++refused_;
    }
  }

  void grow() {
    if (pages_.num_pages() >= 2 * num_pages) return;
    pages_.grow(pages_.num_pages() + 1);
    memory_.emplace_back();
  }

  std::mt19937 random_;
  PageAllocator pages_;
  std::vector<std::array<Slot, page_size>> memory_;
  std::map<SequenceId, std::vector<Slot>> sequences_;
  Token unknown_tokens_ = 0;
  int refused_ = 0;
};

class RandomOperations : public testing::TestWithParam<PrefixHash> {};

TEST_P(RandomOperations, LeaveEverySequenceWithItsOwnTokens) {
  PageStatistics total;
  int refused = 0;
  for (unsigned seed = 0; seed < 50; ++seed) {
    Model model(seed, GetParam());
    for (int step = 0; step < 600; ++step) {
      model.step();
      model.check();
      if (HasFatalFailure()) FAIL() << "seed " << seed << " step " << step;
    }
    total.hits += model.statistics().hits;
    total.copies += model.statistics().copies;
    total.evictions += model.statistics().evictions;
    refused += model.refused();
  }
  // The run went where it is meant to go.
  EXPECT_GT(total.hits, 400);
  EXPECT_GT(total.copies, 400);
  EXPECT_GT(total.evictions, 400);
  EXPECT_GT(refused, 400);
}

INSTANTIATE_TEST_SUITE_P(Hash, RandomOperations, testing::Values(hash_prefix, worst_hash));

}  // namespace
}  // namespace flash_attn
