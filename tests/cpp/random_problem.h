// Random calls, drawn from a stream of bytes: seeded in the property test, libFuzzer's in the fuzzer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "test_call.h"

namespace flash_attn::test {

/// Values drawn from bytes; after the last byte, every draw gives its lowest value.
class ByteSource {
 public:
  ByteSource(const std::uint8_t* data, std::size_t size) : next_(data), end_(data + size) {}

  std::uint64_t bits(int bytes);
  std::int32_t integer(std::int32_t low, std::int32_t high);  // both inclusive
  bool one_in(std::int32_t n) { return integer(0, n - 1) == n - 1; }
  template <class T>
  T choose(std::initializer_list<T> values) {
    return values.begin()[integer(0, static_cast<std::int32_t>(values.size()) - 1)];
  }

 private:
  const std::uint8_t* next_;
  const std::uint8_t* end_;
};

/// `size` bytes that depend only on `seed`.
std::vector<std::uint8_t> random_bytes(std::uint64_t seed, std::size_t size);

/// Every feature, layout and dtype, in any combination; lengths that lie (cu_seqlens that run backwards or past the tensor,
/// seqused out of range) now and then. Small: `work` bounds batch * heads_q * seqlen_q * seqlen_k * head dims.
TestCall random_call(ByteSource& source, std::int64_t work);

/// The same over a cache: contiguous or in pages, of any storage, with or without new keys and rotation. Block tables that name
/// pages which do not exist, or one page many times; rows, lengths, leftpads and starts out of range.
TestCall random_cached_call(ByteSource& source, std::int64_t work);

}  // namespace flash_attn::test
