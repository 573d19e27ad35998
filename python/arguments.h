// What Python callers may pass, as the values that the C++ functions take. The error for anything else names the argument, what
// it got and what it needs. Shapes, dtypes and ranges: src/ops/call.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "flash_attn/kvcache_attention.h"
#include "mlx/mlx.h"

namespace flash_attn::python {

namespace nb = nanobind;

/// An argument that may be anything, None too: whoever takes it checks it by name.
inline auto operator""_given(const char* name, std::size_t) { return nb::arg(name).none(); }

[[noreturn]] void fail_type(const char* name, nb::handle given, const char* needs);

/// The caller's own array.
mx::array& required_array(const char* name, nb::handle given);

/// None: nothing, as in all of these that give an optional.
std::optional<mx::array> optional_array(const char* name, nb::handle given);

/// Any real number but a bool.
double number(const char* name, nb::handle given);
std::optional<double> optional_number(const char* name, nb::handle given);

/// Of 32 bits; anything with __index__ but a bool. An mx.array is refused, since reading one would force its evaluation.
int integer(const char* name, nb::handle given);
std::optional<int> optional_integer(const char* name, nb::handle given);

/// A list, a tuple or another sequence of integers.
std::vector<int> integers(const char* name, nb::handle given);

/// Whatever Python takes for true or false, but an mx.array.
bool flag(const char* name, nb::handle given);

/// (left, right), None for unbounded.
std::pair<int, int> window(const char* name, nb::handle given);

mx::Dtype required_dtype(const char* name, nb::handle given);
std::optional<mx::Dtype> optional_dtype(const char* name, nb::handle given);

/// A stream, a device or a kind of device; None is MLX's default.
mx::StreamOrDevice stream_of(nb::handle given);

/// `cache` is an array, quantised where there is a scale, or MLX's triple (codes, scales, biases).
CacheRef cache_of(const char* name, nb::handle cache, const char* scale_name, nb::handle scale);

/// int32 (batch,), or an int for all sequences. q, packed or not, says how many there are.
std::optional<mx::array> cache_seqlens_of(nb::handle given, const mx::array& q, const std::optional<mx::array>& cu_seqlens_q);

/// `given`, an argument of a C++ function, by that function's type of it.
template <class T>
decltype(auto) as(const char* name, nb::handle given) {
  if constexpr (std::is_same_v<T, const mx::array&>) {
    return required_array(name, given);
  } else if constexpr (std::is_same_v<T, int>) {
    return integer(name, given);
  } else {
    return nb::cast<T>(given);
  }
}

}  // namespace flash_attn::python
