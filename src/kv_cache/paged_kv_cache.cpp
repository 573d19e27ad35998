#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "flash_attn/kv_cache.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "ops/call/require.h"
#include "ops/graph/aligned_memory.h"

namespace flash_attn {
namespace {

void check(const PagedKVCacheOptions& options) {
  require_at_least("kv_heads", options.kv_heads, 1);
  require_at_least("head_dim", options.head_dim, 1);
  require_at_least("head_dim_v", options.head_dim_v.value_or(1), 1);
  require_at_least("layers", options.layers, 1);
  const mx::Dtype dtype = options.dtype;
  if (dtype != mx::float32 && dtype != mx::bfloat16 && dtype != mx::float16 && dtype != mx::int8) {
    fail<TypeError>("dtype", dtype, "float32, bfloat16, float16 or int8");
  }
}

mx::array int32_array(const std::vector<std::int32_t>& values, mx::Shape shape) {
  return mx::array(values.begin(), std::move(shape), mx::int32);
}

int size_of(int count) { return count; }
int size_of(const std::vector<Token>& tokens) { return static_cast<int>(tokens.size()); }

/// An index of the first axis only: `page`, all of it.
mx::Shape page_start(const mx::array& cache, int page) {
  mx::Shape start(cache.ndim(), 0);
  start[0] = page;
  return start;
}

mx::Shape page_stop(const mx::array& cache, int page) {
  mx::Shape stop = cache.shape();
  stop[0] = page + 1;
  return stop;
}

/// Begins at a page of memory and asks for large ones: pages of tokens are read in random order, and the processor finds the
/// address of each anew (docs/performance.md).
mx::array zero_pages(mx::Shape shape, mx::Dtype dtype, mx::StreamOrDevice stream) {
  if (mx::to_stream(stream).device == mx::Device::gpu) return mx::zeros(shape, dtype, stream);
  constexpr std::size_t page_of_memory = 4096;
  std::size_t bytes = mx::size_of(dtype);
  for (const int size : shape) {
    if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(size), &bytes) || bytes > PTRDIFF_MAX) throw std::bad_alloc();
  }
  mx::array pool(std::move(shape), dtype, /*primitive=*/nullptr, /*inputs=*/{});
  allocate_at(pool, page_of_memory);
  std::memset(pool.data<char>(), 0, pool.nbytes());
  pool.set_status(mx::array::Status::available);
  return pool;
}

}  // namespace

PagedKVCache::PagedKVCache(const PagedKVCacheOptions& options)
    : pages_(options.num_pages, options.page_size), stream_(options.stream) {
  check(options);
  const auto pool_of = [&](mx::Shape token_shape, mx::Dtype dtype) {
    token_shape.insert(token_shape.begin(), {options.num_pages, options.page_size});
    return zero_pages(std::move(token_shape), dtype, stream_);
  };
  for (int layer = 0; layer < options.layers; ++layer) {
    k_caches_.push_back(pool_of({options.kv_heads, options.head_dim}, options.dtype));
    v_caches_.push_back(pool_of({options.kv_heads, options.head_dim_v.value_or(options.head_dim)}, options.dtype));
    if (options.dtype == mx::int8) {
      k_scales_.push_back(pool_of({options.kv_heads}, mx::float32));
      v_scales_.push_back(pool_of({options.kv_heads}, mx::float32));
    }
  }
  for (mx::array* array : arrays()) array->eval();
}

std::vector<mx::array*> PagedKVCache::arrays() {
  std::vector<mx::array*> all;
  for (auto* arrays : {&k_caches_, &v_caches_, &k_scales_, &v_scales_}) {
    for (mx::array& array : *arrays) all.push_back(&array);
  }
  return all;
}

AppendStep PagedKVCache::append(const std::vector<SequenceId>& sequences, const std::vector<int>& counts) {
  return append_step(sequences, counts);
}

AppendStep PagedKVCache::append(const std::vector<SequenceId>& sequences, const std::vector<std::vector<Token>>& tokens) {
  return append_step(sequences, tokens);
}

template <class Additions>
AppendStep PagedKVCache::append_step(const std::vector<SequenceId>& sequences, const Additions& additions) {
  mx::array lengths_before = cache_seqlens(sequences);
  copy_pages(pages_.append(sequences, additions));

  std::vector<std::int32_t> bounds = {0};
  int max_seqlen = 0;
  for (const auto& addition : additions) {
    bounds.push_back(bounds.back() + size_of(addition));
    max_seqlen = std::max(max_seqlen, size_of(addition));
  }
  return {std::move(lengths_before), block_table(sequences), int32_array(bounds, {static_cast<int>(bounds.size())}),
          max_seqlen};
}

void PagedKVCache::reserve(const std::vector<SequenceId>& sequences, const std::vector<int>& counts) {
  copy_pages(pages_.reserve(sequences, counts));
}

/// In place: MLX updates a slice of an array in its own buffer if nothing else refers to it. So the pages are read first, in an
/// evaluation of their own; a read that still waits for its turn would refer to the cache and cost a copy of all of it.
void PagedKVCache::copy_pages(const std::vector<PageCopy>& copies) {
  if (copies.empty()) return;
  std::vector<std::int32_t> sources;
  for (const PageCopy& copy : copies) sources.push_back(copy.from);
  const mx::array from = int32_array(sources, {static_cast<int>(sources.size())});

  std::vector<mx::array> contents;
  for (const mx::array* cache : arrays()) contents.push_back(mx::take(*cache, from, 0, stream_));
  mx::eval(contents);

  auto content = contents.begin();
  for (mx::array* cache : arrays()) {
    for (std::size_t i = 0; i < copies.size(); ++i) {
      const int page = static_cast<int>(i);
      const mx::array update = mx::slice(*content, page_start(*content, page), page_stop(*content, page), stream_);
      *cache = mx::slice_update(*cache, update, page_start(*cache, copies[i].to), page_stop(*cache, copies[i].to), stream_);
    }
    ++content;
  }
}

void PagedKVCache::grow(int num_pages) {
  // The allocator last: if memory is short, arrays that have grown already have pages that nobody uses, and no harm is done.
  for (mx::array* cache : arrays()) {
    if (cache->shape(0) >= num_pages) continue;
    mx::Shape shape = cache->shape();
    shape[0] = num_pages;
    *cache = mx::slice_update(zero_pages(std::move(shape), cache->dtype(), stream_), *cache, page_start(*cache, 0),
                              cache->shape(), stream_);
    cache->eval();  // one at a time, so that only one array is there twice
  }
  pages_.grow(num_pages);
}

mx::array PagedKVCache::block_table(const std::vector<SequenceId>& sequences) const {
  std::size_t blocks = 1;
  for (const SequenceId sequence : sequences) blocks = std::max(blocks, pages_.pages(sequence).size());
  std::vector<std::int32_t> table(sequences.size() * blocks, -1);
  auto row = table.begin();
  for (const SequenceId sequence : sequences) {
    const auto& pages = pages_.pages(sequence);
    std::copy(pages.begin(), pages.end(), row);
    row += static_cast<std::ptrdiff_t>(blocks);
  }
  return int32_array(table, {static_cast<int>(sequences.size()), static_cast<int>(blocks)});
}

mx::array PagedKVCache::cache_seqlens(const std::vector<SequenceId>& sequences) const {
  std::vector<std::int32_t> lengths;
  for (const SequenceId sequence : sequences) lengths.push_back(pages_.length(sequence));
  return int32_array(lengths, {static_cast<int>(lengths.size())});
}

}  // namespace flash_attn
