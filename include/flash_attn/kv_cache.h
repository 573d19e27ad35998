// A paged KV cache on MLX arrays: the pages of one or several layers, and the allocator that says which sequence's tokens they
// hold. What it gives is what flash_attn_with_kvcache takes.
//
// Sequences, forks, shared prefixes and what they ask of the caller: page_allocator.h.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "flash_attn/attention.h"
#include "flash_attn/page_allocator.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace flash_attn {

struct PagedKVCacheOptions {
  int num_pages;
  int page_size;  // tokens
  int kv_heads;
  int head_dim;
  std::optional<int> head_dim_v;   // default head_dim
  mx::Dtype dtype = mx::float16;   // float32, bfloat16, float16, or int8 with a scale for each token and head
  int layers = 1;                  // of the model; they share one block table
  mx::StreamOrDevice stream = {};  // where pages are made and copied
};

/// What an append changed, as int32 arrays over its sequences in their order.
struct AppendStep {
  mx::array cache_seqlens;  // (batch,): lengths before the append; the new tokens go from there on
  mx::array block_table;    // (batch, blocks): pages, -1 past a sequence's last
  mx::array cu_seqlens;     // (batch + 1,): where each sequence's new tokens begin when they lie packed
  int max_seqlen;           // most new tokens of a sequence
};

class PagedKVCache {
 public:
  /// Throws std::invalid_argument or TypeError, and std::bad_alloc where memory has no room for the pages.
  explicit PagedKVCache(const PagedKVCacheOptions& options);

  /// One array a layer, (num_pages, page_size, kv_heads, head_dim) and (.., head_dim_v). The vectors keep their size and their
  /// place, and an array changes by being re-pointed: references to them stay good.
  std::vector<mx::array>& k_caches() { return k_caches_; }
  std::vector<mx::array>& v_caches() { return v_caches_; }
  /// float32 (num_pages, page_size, kv_heads), x = q * scale. Empty unless the cache is int8.
  std::vector<mx::array>& k_scales() { return k_scales_; }
  std::vector<mx::array>& v_scales() { return v_scales_; }

  /// PageAllocator's, whose errors these are. Where a fork writes into a shared page, append and reserve copy that page, and
  /// wait for what was written to the cache before.
  SequenceId add(std::span<const Token> prompt = {}) { return pages_.add(prompt); }
  AppendStep append(const std::vector<SequenceId>& sequences, const std::vector<int>& counts);
  AppendStep append(const std::vector<SequenceId>& sequences, const std::vector<std::vector<Token>>& tokens);
  void reserve(const std::vector<SequenceId>& sequences, const std::vector<int>& counts);
  SequenceId fork(SequenceId sequence) { return pages_.fork(sequence); }
  void trim(SequenceId sequence, int length) { pages_.trim(sequence, length); }
  void free(SequenceId sequence) { pages_.free(sequence); }

  /// Moves everything into larger arrays: the one call that copies the cache.
  void grow(int num_pages);

  /// int32 (batch, blocks) and (batch,).
  mx::array block_table(const std::vector<SequenceId>& sequences) const;
  mx::array cache_seqlens(const std::vector<SequenceId>& sequences) const;

  const PageAllocator& pages() const { return pages_; }

 private:
  template <class Additions>
  AppendStep append_step(const std::vector<SequenceId>& sequences, const Additions& additions);
  std::vector<mx::array*> arrays();
  void copy_pages(const std::vector<PageCopy>& copies);

  PageAllocator pages_;
  mx::StreamOrDevice stream_;
  std::vector<mx::array> k_caches_;
  std::vector<mx::array> v_caches_;
  std::vector<mx::array> k_scales_;
  std::vector<mx::array> v_scales_;
};

}  // namespace flash_attn
