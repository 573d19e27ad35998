// The dropout mask: a pure function of (key, batch * heads + head, row, column), the same on every backend, in both passes and
// for every tiling.
//
// Philox4x32 with 7 rounds (Salmon et al. 2011), laid out as flash-attention lays it out: a 16 x 32 tile of the score matrix
// takes 32 calls ("lanes"), and the 16 bytes of one call serve rows r and r + 8 times columns c, c + 1, c + 8, ..., c + 25.
// Upstream compares a byte with floor(255 (1 - p)), off by up to 1 / 256; here the threshold itself is dithered per call, so
// that the probability over keys is 1 - p exactly at the cost of 8-bit compares.
//
// U is uint32, or a backend's vector of uint32, whose words then come with it.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

template <class U>
struct PhiloxWords {
  U x, y, z, w;
};

/// `counter` and `key` as in the paper; 7 rounds.
template <class U, class Words = ScalarWords>
FA_FN PhiloxWords<U> philox4x32_7(PhiloxWords<U> counter, U key_x, U key_y) {
  const U multiplier_a = key_x * 0u + 0xD2511F53u;
  const U multiplier_b = key_x * 0u + 0xCD9E8D57u;
  for (int round = 0; round < 7; ++round) {
    const U high_a = Words::mul_hi(multiplier_a, counter.x);
    const U high_b = Words::mul_hi(multiplier_b, counter.z);
    counter = {high_b ^ counter.y ^ key_x, multiplier_b * counter.z, high_a ^ counter.w ^ key_y, multiplier_a * counter.x};
    key_x += 0x9E3779B9u;
    key_y += 0xBB67AE85u;
  }
  return counter;
}

/// The first counter word: one of the 32 lanes of a tile, after (batch * heads + head) * 32.
template <class U>
FA_FN U dropout_counter(U head_offset, U row, U column) {
  return head_offset + (row & 7u) * 4u + ((column & 7u) >> 1);
}

/// Which of the four words holds the byte of `column`: the same for both rows of the call.
template <class U>
FA_FN U dropout_word_index(U column) {
  return (column & 31u) >> 3;
}

/// The byte's position in that word, in bits.
template <class U>
FA_FN U dropout_byte_shift(U row, U column) {
  return (((row & 15u) >> 3) * 2u + (column & 1u)) * 8u;
}

/// Keep iff the byte is below this, 0 to 256. `keep_24` is floor(2^24 (1 - p)). For fixed counters the hash is a bijection of
/// key_x, hence uniform over keys.
template <class U>
FA_FN U dropout_threshold(U keep_24, U counter, U row_tile, U column_tile, U key_x, U key_y) {
  U hash = key_x ^ (counter * 0x9E3779B9u);
  hash = (hash ^ (hash >> 16)) * 0x85EBCA6Bu;
  hash ^= row_tile * 0xC2B2AE35u + key_y;
  hash = (hash ^ (hash >> 13)) * 0x27D4EB2Fu;
  hash ^= column_tile * 0x165667B1u;
  hash = (hash ^ (hash >> 15)) * 0xC2B2AE35u;
  return (keep_24 + (hash >> 16)) >> 16;
}

/// One element, for references and tests. `head_offset` = (batch * heads_q + head) * 32.
FA_FN bool dropout_keeps(uint32 keep_24, uint32 key_x, uint32 key_y, uint32 head_offset, uint32 row, uint32 column) {
  const uint32 counter = dropout_counter(head_offset, row, column);
  const PhiloxWords<uint32> words = philox4x32_7<uint32>({counter, 0u, row / 16u, column / 32u}, key_x, key_y);
  const uint32 index = dropout_word_index(column);
  const uint32 word = index == 0u ? words.x : index == 1u ? words.y : index == 2u ? words.z : words.w;
  const uint32 byte = (word >> dropout_byte_shift(row, column)) & 255u;
  return byte < dropout_threshold(keep_24, counter, row / 16u, column / 32u, key_x, key_y);
}

}  // namespace flash_attn
