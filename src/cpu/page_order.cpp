#include "cpu/page_order.h"

#include <algorithm>
#include <array>

#include "cpu/parallel.h"
#include "cpu/read_ahead.h"
#include "semantics/mask.h"
#include "semantics/paging.h"

namespace flash_attn::cpu {
namespace {

bool positions_matter(const AttentionProblem& problem, const AttentionInputs& inputs) {
  return inputs.alibi_slopes || inputs.attn_mask.data || problem.has_dropout;
}

// Of a sequence's row of the block table.
struct Entries {
  std::int32_t begin;
  std::int32_t end;
};

std::int32_t pages_up_to(const AttentionProblem& problem, std::int64_t slot) {
  return static_cast<std::int32_t>((slot + problem.page_size - 1) / problem.page_size);
}

// Pages whose keys every row of the sequence sees.
Entries interchangeable(const AttentionProblem& problem, const Sequence& sequence) {
  const MaskRule rule = problem.mask_rule(sequence.q.length, sequence.k.length);
  const std::int64_t begin = sequence.k.begin + std::int64_t{visible_keys(rule, rule.seqlen_q - 1).begin};
  const std::int64_t end = sequence.k.begin + std::int64_t{visible_keys(rule, 0).end};
  return {pages_up_to(problem, begin), static_cast<std::int32_t>(end / problem.page_size)};
}

// As if elements were float32, so that all dtypes have one limit.
bool is_worth_it(const AttentionProblem& problem, Entries entries) {
  const std::int64_t elements_of_key = std::int64_t{problem.heads_k} * (problem.head_dim + problem.head_dim_v);
  const std::int64_t keys = std::int64_t{entries.end - entries.begin} * problem.page_size;
  return exceeds_caches(keys * elements_of_key * static_cast<std::int64_t>(sizeof(float)));
}

constexpr Nanoseconds time_to_sort_page = 5;

}  // namespace

// From the lowest byte to the highest, each time in the order of that byte alone. Several times as fast as comparing pages.
void sort_pages(std::int32_t* pages, std::int32_t* scratch, std::int32_t count) {
  std::uint32_t highest = 0;
  for (std::int32_t i = 0; i < count; ++i) highest = std::max(highest, static_cast<std::uint32_t>(pages[i]));
  std::int32_t* from = pages;
  std::int32_t* to = scratch;
  for (int shift = 0; shift < 32 && highest >> shift > 0; shift += 8) {
    const auto byte_of = [shift](std::int32_t page) { return static_cast<std::uint32_t>(page) >> shift & 0xff; };
    std::array<std::int32_t, 257> place = {};
    for (std::int32_t i = 0; i < count; ++i) ++place[byte_of(from[i]) + 1];
    for (std::size_t byte = 1; byte < place.size(); ++byte) place[byte] += place[byte - 1];
    for (std::int32_t i = 0; i < count; ++i) to[place[byte_of(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != pages) std::copy_n(from, count, pages);
}

PageOrder::PageOrder(const AttentionProblem& problem, const AttentionInputs& inputs, int threads,
                     std::vector<Sequence>& sequences)
    : inputs_(inputs) {
  if (problem.page_size == 0 || positions_matter(problem, inputs)) return;
  std::int64_t pages_to_sort = 0;
  for (const Sequence& sequence : sequences) {
    const Entries entries = interchangeable(problem, sequence);
    if (is_worth_it(problem, entries)) pages_to_sort += entries.end - entries.begin;
  }
  if (pages_to_sort == 0) return;

  const std::int64_t blocks = problem.table_blocks;
  block_table_.reset(new std::int32_t[sequences.size() * static_cast<std::size_t>(blocks)]);
  inputs_.cache.block_table = block_table_.get();
  parallel_for(static_cast<std::int64_t>(sequences.size()), threads, pages_to_sort * time_to_sort_page,
               [&](std::int64_t i, int) {
                 Sequence& sequence = sequences[static_cast<std::size_t>(i)];
                 const std::int32_t in_use = pages_up_to(problem, std::int64_t{sequence.k.begin} + sequence.k.length);
                 std::int32_t* table = block_table_.get() + i * blocks;
                 std::copy_n(inputs.cache.block_table + sequence.cache_row * blocks, in_use, table);
                 sequence.cache_row = static_cast<std::int32_t>(i);

                 const Entries entries = interchangeable(problem, sequence);
                 if (!is_worth_it(problem, entries) || std::is_sorted(table + entries.begin, table + entries.end)) return;
                 std::vector<std::int32_t> scratch(static_cast<std::size_t>(entries.end - entries.begin));
                 sort_pages(table + entries.begin, scratch.data(), entries.end - entries.begin);
               });
}

}  // namespace flash_attn::cpu
