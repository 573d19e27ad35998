// Which rows of a cache hold the keys of each sequence, old and new, as MLX ops; and what is stored there.
#pragma once

#include <optional>
#include <vector>

#include "mlx/mlx.h"
#include "ops/call/call.h"

namespace flash_attn::reference {

inline mx::array number(int value) { return mx::array(value, mx::int32); }
inline mx::array column(const mx::array& x) { return mx::expand_dims(x, 1); }

/// Where sequences lie in their cache, all int32 (batch,).
struct CacheLengths {
  mx::array cached;  // slots in use before the append
  mx::array added;   // new keys
  mx::array leftpad;

  explicit CacheLengths(const AttentionCall& call);
};

/// The row of the table of angles of each sequence's first new token, int32 (batch,).
mx::array rotary_base(const AttentionCall& call, const CacheLengths& lengths);

/// Slots (batch, n) as rows of a cache whose first two axes are flattened.
struct FlatSlots {
  mx::array index;
  mx::array exists;
};

FlatSlots flat_slots(const AttentionCall& call, const mx::array& slots);

/// A cache, its first two axes flattened.
mx::array by_rows(const mx::array& cache);

/// New keys or values as (batch, n, heads, dim), and which of them are real.
struct NewRows {
  mx::array rows;
  mx::array token;  // int32 (1, n)
  mx::array is_real;
};

NewRows new_rows(const AttentionCall& call, const CacheLengths& lengths, const mx::array& given);

/// Rows as a cache of these parts stores them, codes first.
std::vector<mx::array> stored_form(const mx::array& rows, const mx::array& data, const std::optional<mx::array>& scales,
                                   const std::optional<mx::array>& biases);

}  // namespace flash_attn::reference
