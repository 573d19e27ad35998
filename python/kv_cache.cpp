// PagedKVCache as Python sees it. Conversions only; paged_cache.py documents it.
#include "flash_attn/kv_cache.h"

#include <nanobind/nanobind.h>

#include <exception>
#include <utility>
#include <vector>

#include "arguments.h"
#include "bindings.h"
#include "mlx/mlx.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace {

using flash_attn::AppendStep;
using flash_attn::PagedKVCache;
using flash_attn::SequenceId;
using flash_attn::Token;
using Arrays = std::vector<mx::array>;
using namespace flash_attn::python;

nb::handle out_of_pages_type;  // lives as long as the process

void bind_out_of_pages(nb::module_& module) {
  out_of_pages_type = PyErr_NewExceptionWithDoc(
      "flash_attn.flash_attn_mlx.OutOfPages",
      "A PagedKVCache has too few free and idle pages for a call. Nothing has changed: every sequence is as it was.\n\n"
      "Attributes:\n"
      "    needed: pages that the call needed.\n"
      "    available: pages, free or idle, that there were.",
      PyExc_RuntimeError, nullptr);
  if (!out_of_pages_type.is_valid()) nb::raise_python_error();
  module.attr("OutOfPages") = out_of_pages_type;
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const flash_attn::OutOfPages& error) {
      nb::object raised = out_of_pages_type(error.what());
      raised.attr("needed") = error.needed;
      raised.attr("available") = error.available;
      PyErr_SetObject(out_of_pages_type.ptr(), raised.ptr());
    }
  });
}

/// The arrays themselves: a call that re-points one of the list re-points the cache's.
template <Arrays& (PagedKVCache::*arrays)()>
nb::list same_arrays(nb::handle self) {
  nb::list result;
  for (mx::array& array : (nb::cast<PagedKVCache&>(self).*arrays)()) {
    result.append(nb::cast(array, nb::rv_policy::reference_internal, self));
  }
  return result;
}

std::vector<SequenceId> sequences_of(nb::handle given) {
  const std::vector<int> ids = integers("seqs", given);
  return {ids.begin(), ids.end()};
}

/// One for each of so many sequences, or an int for all.
std::vector<int> counts_of(nb::handle given, std::size_t sequences) {
  if (PySequence_Check(given.ptr()) && PySequence_Size(given.ptr()) >= 0) return integers("counts", given);
  PyErr_Clear();  // an array of no axes has no size
  return std::vector<int>(sequences, integer("counts", given));
}

/// Integers of any iterable, or of an array.
std::vector<Token> tokens_of(nb::handle given) {
  const nb::object values = nb::isinstance<mx::array>(given) ? given.attr("tolist")() : nb::borrow(given);
  try {
    std::vector<Token> tokens;
    for (const nb::handle value : nb::iter(values)) {
      const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
      if (!index) nb::raise_python_error();
      tokens.push_back(PyLong_AsLongLong(index.ptr()));
      if (PyErr_Occurred()) nb::raise_python_error();
    }
    return tokens;
  } catch (const nb::python_error& error) {
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_OverflowError)) throw;
    fail_type("tokens", given, "a list of ints or an integer array for each sequence");
  }
}

/// Copies of pages wait for earlier work on the cache.
template <class Function>
auto without_gil(const Function& function) {
  const nb::gil_scoped_release released;
  return function();
}

nb::tuple tuple_of(AppendStep step) {
  return nb::make_tuple(std::move(step.cache_seqlens), std::move(step.block_table), std::move(step.cu_seqlens),
                        step.max_seqlen);
}

nb::dict statistics(const PagedKVCache& cache) {
  const flash_attn::PageStatistics counts = cache.pages().statistics();
  nb::dict result;
  result["pages"] = counts.pages;
  result["used"] = counts.used;
  result["shared"] = counts.shared;
  result["idle"] = counts.idle;
  result["free"] = counts.free;
  result["hits"] = counts.hits;
  result["evictions"] = counts.evictions;
  result["copies"] = counts.copies;
  return result;
}

}  // namespace

void bind_kv_cache(nb::module_& module) {
  bind_out_of_pages(module);
  nb::class_<PagedKVCache>(module, "PagedKVCache")
      .def(
          "__init__",
          [](PagedKVCache* self, nb::handle num_pages, nb::handle page_size, nb::handle kv_heads, nb::handle head_dim,
             nb::handle head_dim_v, nb::handle dtype, nb::handle layers, nb::handle stream) {
            new (self) PagedKVCache({.num_pages = integer("num_pages", num_pages),
                                     .page_size = integer("page_size", page_size),
                                     .kv_heads = integer("kv_heads", kv_heads),
                                     .head_dim = integer("head_dim", head_dim),
                                     .head_dim_v = optional_integer("head_dim_v", head_dim_v),
                                     .dtype = required_dtype("dtype", dtype),
                                     .layers = integer("layers", layers),
                                     .stream = stream_of(stream)});
          },
          nb::kw_only(), "num_pages"_given, "page_size"_given, "kv_heads"_given, "head_dim"_given, "head_dim_v"_given,
          "dtype"_given, "layers"_given, "stream"_given)
      .def("k_caches", same_arrays<&PagedKVCache::k_caches>)
      .def("v_caches", same_arrays<&PagedKVCache::v_caches>)
      .def("k_scales", same_arrays<&PagedKVCache::k_scales>)
      .def("v_scales", same_arrays<&PagedKVCache::v_scales>)
      .def(
          "add", [](PagedKVCache& cache, nb::handle tokens) { return cache.add(tokens_of(tokens)); }, "tokens"_given)
      .def(
          "append_counts",
          [](PagedKVCache& cache, nb::handle given, nb::handle given_counts) {
            const std::vector<SequenceId> seqs = sequences_of(given);
            const std::vector<int> counts = counts_of(given_counts, seqs.size());
            return tuple_of(without_gil([&] { return cache.append(seqs, counts); }));
          },
          "seqs"_given, "counts"_given)
      .def(
          "append_tokens",
          [](PagedKVCache& cache, nb::handle given, nb::handle rows) {
            const std::vector<SequenceId> seqs = sequences_of(given);
            std::vector<std::vector<Token>> tokens;
            for (const nb::handle row : nb::iter(rows)) tokens.push_back(tokens_of(row));
            return tuple_of(without_gil([&] { return cache.append(seqs, tokens); }));
          },
          "seqs"_given, "tokens"_given)
      .def(
          "reserve",
          [](PagedKVCache& cache, nb::handle given, nb::handle given_counts) {
            const std::vector<SequenceId> seqs = sequences_of(given);
            const std::vector<int> counts = counts_of(given_counts, seqs.size());
            without_gil([&] { cache.reserve(seqs, counts); });
          },
          "seqs"_given, "counts"_given)
      .def(
          "fork", [](PagedKVCache& cache, nb::handle seq) { return cache.fork(integer("seq", seq)); }, "seq"_given)
      .def(
          "trim",
          [](PagedKVCache& cache, nb::handle seq, nb::handle length) {
            cache.trim(integer("seq", seq), integer("length", length));
          },
          "seq"_given, "length"_given)
      .def(
          "free", [](PagedKVCache& cache, nb::handle seq) { cache.free(integer("seq", seq)); }, "seq"_given)
      .def(
          "grow",
          [](PagedKVCache& cache, nb::handle num_pages) {
            const int pages = integer("num_pages", num_pages);
            without_gil([&] { cache.grow(pages); });
          },
          "num_pages"_given)
      .def(
          "block_table", [](const PagedKVCache& cache, nb::handle seqs) { return cache.block_table(sequences_of(seqs)); },
          "seqs"_given)
      .def(
          "cache_seqlens", [](const PagedKVCache& cache, nb::handle seqs) { return cache.cache_seqlens(sequences_of(seqs)); },
          "seqs"_given)
      .def(
          "length", [](const PagedKVCache& cache, nb::handle seq) { return cache.pages().length(integer("seq", seq)); },
          "seq"_given)
      .def("page_size", [](const PagedKVCache& cache) { return cache.pages().page_size(); })
      .def("num_pages", [](const PagedKVCache& cache) { return cache.pages().num_pages(); })
      .def("statistics", statistics);
}
