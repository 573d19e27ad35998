// Sequences of a batch as arrays: packed rows to a padded batch and back, without evaluating cu_seqlens.
#pragma once

#include "mlx/array.h"
#include "ops/call/call.h"

namespace flash_attn::reference {

/// One side (queries or keys) of a call.
class Sequences {
 public:
  /// `total` rows in the packed tensor; without cu_seqlens every batch item has `max_seqlen`. `padded_seqlen` >= max_seqlen is
  /// how many rows the padded tensor has.
  Sequences(int batch, int padded_seqlen, int max_seqlen, int total, const std::optional<mx::array>& cu_seqlens,
            const std::optional<mx::array>& seqused);

  /// int32 [batch or 1, 1, 1]: rows in use.
  const mx::array& lengths() const { return lengths_; }
  int padded_seqlen() const { return padded_seqlen_; }

  /// Packed [total, ...] to [batch, padded_seqlen, ...]; rows past a sequence hold some other row. A dense tensor passes
  /// through.
  mx::array pad(const mx::array& packed) const;

  /// [batch, padded_seqlen, ...] to packed [total, ...]; a row that belongs to no sequence gets `outside`.
  mx::array unpad(const mx::array& padded, float outside) const;

 private:
  int batch_;
  int padded_seqlen_;
  int total_;
  std::optional<mx::array> begins_;  // [batch], varlen only
  std::optional<mx::array> ends_;    // [batch]: where the slot ends, which seqused does not move
  mx::array lengths_;
};

}  // namespace flash_attn::reference
