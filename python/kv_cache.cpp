// PagedKVCache as Python sees it. Conversions only; paged_cache.py documents it.
#include "flash_attn/kv_cache.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <exception>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "mlx/mlx.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace {

using flash_attn::AppendStep;
using flash_attn::PagedKVCache;
using flash_attn::SequenceId;
using flash_attn::Token;
using Arrays = std::vector<mx::array>;

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
          [](PagedKVCache* self, int num_pages, int page_size, int kv_heads, int head_dim, std::optional<int> head_dim_v,
             mx::Dtype dtype, int layers, mx::StreamOrDevice stream) {
            new (self) PagedKVCache({.num_pages = num_pages,
                                     .page_size = page_size,
                                     .kv_heads = kv_heads,
                                     .head_dim = head_dim,
                                     .head_dim_v = head_dim_v,
                                     .dtype = dtype,
                                     .layers = layers,
                                     .stream = stream});
          },
          nb::kw_only(), "num_pages"_a, "page_size"_a, "kv_heads"_a, "head_dim"_a, "head_dim_v"_a.none(), "dtype"_a, "layers"_a,
          "stream"_a.none())
      .def("k_caches", same_arrays<&PagedKVCache::k_caches>)
      .def("v_caches", same_arrays<&PagedKVCache::v_caches>)
      .def("k_scales", same_arrays<&PagedKVCache::k_scales>)
      .def("v_scales", same_arrays<&PagedKVCache::v_scales>)
      .def("add", [](PagedKVCache& cache, const std::vector<Token>& prompt) { return cache.add(prompt); })
      .def("append_counts",
           [](PagedKVCache& cache, const std::vector<SequenceId>& seqs, const std::vector<int>& counts) {
             return tuple_of(without_gil([&] { return cache.append(seqs, counts); }));
           })
      .def("append_tokens",
           [](PagedKVCache& cache, const std::vector<SequenceId>& seqs, const std::vector<std::vector<Token>>& tokens) {
             return tuple_of(without_gil([&] { return cache.append(seqs, tokens); }));
           })
      .def("reserve", &PagedKVCache::reserve, nb::call_guard<nb::gil_scoped_release>())
      .def("fork", &PagedKVCache::fork)
      .def("trim", &PagedKVCache::trim)
      .def("free", &PagedKVCache::free)
      .def("grow", &PagedKVCache::grow, nb::call_guard<nb::gil_scoped_release>())
      .def("block_table", &PagedKVCache::block_table)
      .def("cache_seqlens", &PagedKVCache::cache_seqlens)
      .def("length", [](const PagedKVCache& cache, SequenceId seq) { return cache.pages().length(seq); })
      .def("page_size", [](const PagedKVCache& cache) { return cache.pages().page_size(); })
      .def("num_pages", [](const PagedKVCache& cache) { return cache.pages().num_pages(); })
      .def("statistics", statistics);
}
