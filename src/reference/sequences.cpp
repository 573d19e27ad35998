#include "reference/sequences.h"

#include <algorithm>

#include "mlx/mlx.h"
#include "reference/select.h"

namespace flash_attn::reference {
namespace {

mx::array number(int value) { return mx::array(value, mx::int32); }
mx::array positions(int count) { return mx::arange(0, count, 1, mx::int32); }

}  // namespace

// sequence_extent of src/semantics/sequence.h for all sequences at once: clamping each boundary between the one before it and
// the end of the tensor is a running maximum.
Sequences::Sequences(int batch, int padded_seqlen, int max_seqlen, int total, const std::optional<mx::array>& cu_seqlens,
                     const std::optional<mx::array>& seqused)
    : batch_(batch), padded_seqlen_(padded_seqlen), total_(total), lengths_(number(max_seqlen)) {
  if (cu_seqlens) {
    const mx::array bounds = mx::minimum(mx::cummax(mx::maximum(*cu_seqlens, number(0)), 0), number(total));
    begins_ = mx::slice(bounds, {0}, {batch});
    ends_ = mx::slice(bounds, {1}, {batch + 1});
    lengths_ = mx::minimum(*ends_ - *begins_, number(max_seqlen));
  }
  if (seqused) lengths_ = mx::minimum(mx::maximum(*seqused, number(0)), lengths_);
  lengths_ = mx::reshape(lengths_, {-1, 1, 1});
}

mx::array Sequences::pad(const mx::array& packed) const {
  if (!begins_) return packed;
  const mx::array rows = mx::expand_dims(*begins_, 1) + positions(padded_seqlen_);
  return mx::take(packed, mx::minimum(rows, number(std::max(total_ - 1, 0))), 0);
}

mx::array Sequences::unpad(const mx::array& padded, float outside) const {
  if (!begins_) return padded;
  const mx::array row = positions(total_);
  const mx::array sequences_ended = mx::sum(mx::astype(mx::expand_dims(*ends_, 1) <= row, mx::int32), 0);
  const mx::array sequence = mx::minimum(sequences_ended, number(batch_ - 1));
  const mx::array offset = row - mx::take(*begins_, sequence);
  mx::array inside = offset >= number(0) && offset < mx::take(mx::flatten(lengths_), sequence);
  const mx::array slot = sequence * number(padded_seqlen_) + mx::clip(offset, number(0), number(padded_seqlen_ - 1));
  const mx::array rows = mx::take(mx::flatten(padded, 0, 1), slot, 0);
  mx::Shape shape(rows.ndim(), 1);
  shape[0] = total_;
  return select(mx::reshape(inside, shape), rows, mx::array(outside, rows.dtype()));
}

}  // namespace flash_attn::reference
