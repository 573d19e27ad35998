#include "arguments.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "ops/call/require.h"

namespace flash_attn::python {
namespace {

std::string name_of_type(nb::handle given) { return nb::cast<std::string>(nb::handle(given.type()).attr("__name__")); }

bool is_array(nb::handle given) { return nb::isinstance<mx::array>(given); }

/// numbers.Real, of which NumPy's scalars are.
bool is_real(nb::handle given) {
  const nb::object real = nb::module_::import_("numbers").attr("Real");
  const int is_instance = PyObject_IsInstance(given.ptr(), real.ptr());
  if (is_instance < 0) nb::raise_python_error();
  return is_instance == 1;
}

template <class T>
auto optional(T (*convert)(const char*, nb::handle), const char* name, nb::handle given) {
  return given.is_none() ? std::nullopt : std::optional(convert(name, given));
}

}  // namespace

void fail_type(const char* name, nb::handle given, const char* needs) { fail<TypeError>(name, name_of_type(given), needs); }

mx::array& required_array(const char* name, nb::handle given) {
  if (!is_array(given) || !nb::inst_ready(given)) fail_type(name, given, "an mx.array");
  return *nb::inst_ptr<mx::array>(given);
}

std::optional<mx::array> optional_array(const char* name, nb::handle given) {
  if (given.is_none()) return std::nullopt;
  return required_array(name, given);
}

double number(const char* name, nb::handle given) {
  if (PyFloat_CheckExact(given.ptr())) return PyFloat_AS_DOUBLE(given.ptr());
  if (PyBool_Check(given.ptr()) || (!PyLong_Check(given.ptr()) && !is_real(given))) fail_type(name, given, "a number");
  const double result = PyFloat_AsDouble(given.ptr());
  if (result == -1.0 && PyErr_Occurred()) nb::raise_python_error();
  return result;
}

std::optional<double> optional_number(const char* name, nb::handle given) { return optional(number, name, given); }

int integer(const char* name, nb::handle given) {
  if (PyBool_Check(given.ptr()) || is_array(given) || !PyIndex_Check(given.ptr())) fail_type(name, given, "an int");
  const nb::object index = nb::steal(PyNumber_Index(given.ptr()));
  if (!index && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();  // a NumPy array has __index__, but is a number only if it has one element
    fail_type(name, given, "an int");
  }
  if (!index) nb::raise_python_error();
  int overflow = 0;
  const long long result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  constexpr int most = std::numeric_limits<int>::max();
  if (overflow != 0 || result < -most || result > most) {
    fail<std::invalid_argument>(name, nb::cast<std::string>(nb::str(index)), "an integer of 32 bits");
  }
  return static_cast<int>(result);
}

std::optional<int> optional_integer(const char* name, nb::handle given) { return optional(integer, name, given); }

std::vector<int> integers(const char* name, nb::handle given) {
  if (!PySequence_Check(given.ptr()) || is_array(given) || PyUnicode_Check(given.ptr()))
    fail_type(name, given, "a list of ints");
  std::vector<int> result;
  for (const nb::handle value : nb::iter(given)) result.push_back(integer(name, value));
  return result;
}

bool flag(const char* name, nb::handle given) {
  if (is_array(given)) fail_type(name, given, "a bool");
  const int result = PyObject_IsTrue(given.ptr());
  if (result < 0) nb::raise_python_error();
  return result != 0;
}

std::pair<int, int> window(const char* name, nb::handle given) {
  if (!PyTuple_Check(given.ptr()) && !PyList_Check(given.ptr())) fail_type(name, given, "a pair (left, right) of ints or None");
  const std::size_t size = nb::len(given);
  if (size != 2) fail<std::invalid_argument>(name, text(size, " values"), "a pair (left, right)");
  constexpr int unbounded = -1;
  const auto side = [&](int i) { return optional_integer(name, given[i]).value_or(unbounded); };
  return {side(0), side(1)};
}

mx::Dtype required_dtype(const char* name, nb::handle given) {
  if (!nb::isinstance<mx::Dtype>(given)) fail_type(name, given, "an mx.Dtype");
  return nb::cast<mx::Dtype>(given);
}

std::optional<mx::Dtype> optional_dtype(const char* name, nb::handle given) { return optional(required_dtype, name, given); }

mx::StreamOrDevice stream_of(nb::handle given) {
  if (given.is_none()) return {};
  if (nb::isinstance<mx::Stream>(given)) return nb::cast<mx::Stream>(given);
  if (nb::isinstance<mx::Device>(given)) return nb::cast<mx::Device>(given);
  if (nb::isinstance<mx::Device::DeviceType>(given)) return nb::cast<mx::Device::DeviceType>(given);
  fail_type("stream", given, "an mx.Stream or mx.Device");
}

CacheRef cache_of(const char* name, nb::handle cache, const char* scale_name, nb::handle scale) {
  if (!PyTuple_Check(cache.ptr()) && !PyList_Check(cache.ptr())) {
    return {required_array(name, cache), scale.is_none() ? nullptr : &required_array(scale_name, scale)};
  }
  if (!scale.is_none()) {
    fail<std::invalid_argument>(scale_name, "an array", text("None: ", name, " comes with scales of its own"));
  }
  const Py_ssize_t parts = PySequence_Fast_GET_SIZE(cache.ptr());
  if (parts != 3) fail<std::invalid_argument>(name, text(parts, " arrays"), "3: codes, scales and biases");
  // The items themselves: what a subclass makes up for each request would not outlive it.
  const auto part = [&](int i) -> mx::array& { return required_array(name, PySequence_Fast_GET_ITEM(cache.ptr(), i)); };
  return {part(0), &part(1), &part(2)};
}

std::optional<mx::array> cache_seqlens_of(nb::handle given, const mx::array& q, const std::optional<mx::array>& cu_seqlens_q) {
  if (given.is_none() || is_array(given)) return optional_array("cache_seqlens", given);
  const mx::array& rows = cu_seqlens_q ? *cu_seqlens_q : q;
  // What has no axes is refused by its rank, later.
  const int batch = rows.ndim() == 0 ? 0 : rows.shape(0) - (cu_seqlens_q ? 1 : 0);
  const std::vector<int> lengths(static_cast<std::size_t>(std::max(batch, 0)), integer("cache_seqlens", given));
  return mx::array(lengths.data(), {static_cast<int>(lengths.size())}, mx::int32);
}

}  // namespace flash_attn::python
