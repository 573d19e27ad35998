// The dropout mask as MLX ops: src/semantics/dropout.h, evaluated on arrays of uint32 instead of numbers.
#include "semantics/dropout.h"

#include "mlx/mlx.h"
#include "reference/reference.h"

namespace flash_attn::reference {
namespace {

mx::array number(std::uint32_t value) { return mx::array(value, mx::uint32); }

// The U of the semantics functions.
struct Words {
  mx::array value;
};
Words operator*(const Words& a, const Words& b) { return {a.value * b.value}; }
Words operator*(const Words& a, std::uint32_t b) { return {a.value * number(b)}; }
Words operator+(const Words& a, const Words& b) { return {a.value + b.value}; }
Words operator+(const Words& a, std::uint32_t b) { return {a.value + number(b)}; }
Words operator^(const Words& a, const Words& b) { return {a.value ^ b.value}; }
Words operator&(const Words& a, std::uint32_t b) { return {a.value & number(b)}; }
Words operator>>(const Words& a, std::uint32_t b) { return {a.value >> number(b)}; }
Words& operator+=(Words& a, std::uint32_t b) { return a = a + b; }
Words& operator^=(Words& a, const Words& b) { return a = a ^ b; }

struct ArrayWords {
  static Words mul_hi(const Words& a, const Words& b) {
    const mx::array product = mx::astype(a.value, mx::uint64) * mx::astype(b.value, mx::uint64);
    return {mx::astype(product >> mx::array(32, mx::uint64), mx::uint32)};
  }
};

mx::array positions(int count) { return mx::arange(0, count, 1, mx::uint32); }

// `count` values along `axis` of the tile layout below.
Words along(int axis, const mx::array& values) {
  mx::Shape shape(8, 1);
  shape[axis] = static_cast<mx::ShapeElem>(values.size());
  return {mx::reshape(values, shape)};
}

}  // namespace

mx::array dropout_keep_mask(const AttentionProblem& problem, const mx::array& dropout_key, mx::Stream stream) {
  const mx::StreamContext context(stream);
  const int batch_heads = problem.batch * problem.heads_q;
  const int row_tiles = (problem.max_seqlen_q + 15) / 16;
  const int column_tiles = (problem.max_seqlen_k + 31) / 32;

  // Layout [batch * heads, row tile, 2 halves, 8 rows, column tile, 4 words, 4 pairs, 2 columns]: row = 16 tile + 8 half + row,
  // column = 32 tile + 8 word + 2 pair + column. A Philox call covers both halves, all words and both columns.
  const Words head = along(0, positions(batch_heads) * number(32));
  const Words row_tile = along(1, positions(row_tiles));
  const Words half = along(2, positions(2) * number(8));
  const Words row = along(3, positions(8));
  const Words column_tile = along(4, positions(column_tiles));
  const Words pair = along(6, positions(4) * number(2));
  const Words column = along(7, positions(2));

  const Words key_x = {mx::slice(dropout_key, {0}, {1})};
  const Words key_y = {mx::slice(dropout_key, {1}, {2})};
  const Words counter = dropout_counter(head, row, pair);
  const PhiloxWords<Words> words = philox4x32_7<Words, ArrayWords>({counter, {number(0)}, row_tile, column_tile}, key_x, key_y);
  const Words threshold =
      dropout_threshold(Words{number(problem.dropout_keep_24)}, counter, row_tile, column_tile, key_x, key_y);

  const mx::array by_word = mx::concatenate({words.x.value, words.y.value, words.z.value, words.w.value}, 5);
  const mx::array shift = dropout_byte_shift(half + row, pair + column).value;
  const mx::array byte = (by_word >> shift) & number(255);
  const mx::array keep =
      mx::reshape(byte < threshold.value, {problem.batch, problem.heads_q, row_tiles * 16, column_tiles * 32});
  return mx::slice(keep, {0, 0, 0, 0}, {problem.batch, problem.heads_q, problem.max_seqlen_q, problem.max_seqlen_k});
}

}  // namespace flash_attn::reference
