// flash_attn.flash_attn_mlx._core: the C++ functions as Python sees them. Conversions only; interface.py documents them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <array>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "bindings.h"
#include "flash_attn/attention.h"
#include "flash_attn/device.h"
#include "flash_attn/kvcache_attention.h"
#include "mlx/mlx.h"
#include "ops/metal/launch.h"
#include "ops/metal/probe.h"
#include "ops/warn.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace {

using flash_attn::AttentionOptions;
using flash_attn::AttentionResult;
using flash_attn::KVCacheArguments;
using namespace flash_attn::python;

void translate_errors() {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const flash_attn::TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const flash_attn::NotImplementedError& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    }
  });
}

const char* name_of(flash_attn::Route::Target target) {
  switch (target) {
    case flash_attn::Route::Target::kernel:
      return "kernel";
    case flash_attn::Route::Target::sdpa:
      return "sdpa";
    case flash_attn::Route::Target::reference:
      return "reference";
  }
  return "";
}

nb::tuple tuple_of(AttentionResult result) {
  return nb::make_tuple(std::move(result.out), std::move(result.lse), std::move(result.S_dmask), name_of(result.route.target));
}

/// The options of a call. pack_gqa, sm_margin and scheduler_metadata tune CUDA kernels only: whatever they are is ignored.
void bind_options(nb::module_& module) {
  nb::class_<AttentionOptions>(module, "AttentionOptions")
      .def(
          "__init__",
          [](AttentionOptions* self, nb::handle dropout_p, nb::handle softmax_scale, nb::handle causal, nb::handle window_size,
             nb::handle softcap, nb::handle alibi_slopes, nb::handle deterministic, nb::handle return_attn_probs,
             nb::handle learnable_sink, nb::handle attn_mask, nb::handle qv, nb::handle attention_chunk, nb::handle seqused_q,
             nb::handle seqused_k, nb::handle dropout_key, nb::handle num_splits, nb::handle block_table,
             nb::handle return_softmax_lse, nb::handle stream, nb::handle, nb::handle, nb::handle) {
            new (self) AttentionOptions{.dropout_p = number("dropout_p", dropout_p),
                                        .softmax_scale = optional_number("softmax_scale", softmax_scale),
                                        .causal = flag("causal", causal),
                                        .window_size = window("window_size", window_size),
                                        .softcap = number("softcap", softcap),
                                        .alibi_slopes = optional_array("alibi_slopes", alibi_slopes),
                                        .deterministic = flag("deterministic", deterministic),
                                        .return_attn_probs = flag("return_attn_probs", return_attn_probs),
                                        .learnable_sink = optional_array("learnable_sink", learnable_sink),
                                        .attn_mask = optional_array("attn_mask", attn_mask),
                                        .qv = optional_array("qv", qv),
                                        .attention_chunk = integer("attention_chunk", attention_chunk),
                                        .seqused_q = optional_array("seqused_q", seqused_q),
                                        .seqused_k = optional_array("seqused_k", seqused_k),
                                        .dropout_key = optional_array("dropout_key", dropout_key),
                                        .num_splits = integer("num_splits", num_splits),
                                        .block_table = optional_array("block_table", block_table),
                                        .return_softmax_lse = flag("return_softmax_lse", return_softmax_lse),
                                        .stream = stream_of(stream)};
          },
          nb::kw_only(), "dropout_p"_given = 0.0, "softmax_scale"_given, "causal"_given, "window_size"_given, "softcap"_given,
          "alibi_slopes"_given, "deterministic"_given = false, "return_attn_probs"_given = false, "learnable_sink"_given,
          "attn_mask"_given = nb::none(), "qv"_given, "attention_chunk"_given, "seqused_q"_given = nb::none(),
          "seqused_k"_given = nb::none(), "dropout_key"_given = nb::none(), "num_splits"_given,
          "block_table"_given = nb::none(), "return_softmax_lse"_given, "stream"_given, "pack_gqa"_given, "sm_margin"_given,
          "scheduler_metadata"_given)
      .def_prop_ro(
          "lacks_dropout_key",
          [](const AttentionOptions& self) { return 0.0 < self.dropout_p && self.dropout_p < 1.0 && !self.dropout_key; })
      .def_rw("dropout_key", &AttentionOptions::dropout_key);
}

/// A cache is passed as the caller's own arrays, which an append changes.
void bind_kvcache(nb::module_& module) {
  module.def(
      "flash_attn_with_kvcache",
      [](nb::handle q, nb::handle k_cache, nb::handle v_cache, const AttentionOptions& options, nb::handle k, nb::handle v,
         nb::handle rotary_cos, nb::handle rotary_sin, nb::handle rotary_interleaved, nb::handle cache_seqlens,
         nb::handle cache_batch_idx, nb::handle cache_leftpad, nb::handle cu_seqlens_q, nb::handle max_seqlen_q,
         nb::handle cu_seqlens_k_new, nb::handle rotary_seqlens, nb::handle k_scale, nb::handle v_scale) {
        const mx::array& queries = required_array("q", q);
        const flash_attn::CacheRef keys = cache_of("k_cache", k_cache, "k_scale", k_scale);
        const flash_attn::CacheRef values = cache_of("v_cache", v_cache, "v_scale", v_scale);
        KVCacheArguments arguments{.k = optional_array("k", k),
                                   .v = optional_array("v", v),
                                   .rotary_cos = optional_array("rotary_cos", rotary_cos),
                                   .rotary_sin = optional_array("rotary_sin", rotary_sin),
                                   .rotary_interleaved = flag("rotary_interleaved", rotary_interleaved),
                                   .cache_seqlens = {},
                                   .cache_batch_idx = optional_array("cache_batch_idx", cache_batch_idx),
                                   .cache_leftpad = optional_array("cache_leftpad", cache_leftpad),
                                   .cu_seqlens_q = optional_array("cu_seqlens_q", cu_seqlens_q),
                                   .max_seqlen_q = optional_integer("max_seqlen_q", max_seqlen_q),
                                   .cu_seqlens_k_new = optional_array("cu_seqlens_k_new", cu_seqlens_k_new),
                                   .rotary_seqlens = optional_array("rotary_seqlens", rotary_seqlens)};
        arguments.cache_seqlens = cache_seqlens_of(cache_seqlens, queries, arguments.cu_seqlens_q);
        return tuple_of(flash_attn::flash_attn_with_kvcache(queries, keys, values, arguments, options));
      },
      "q"_given, "k_cache"_given, "v_cache"_given, "options"_given, nb::kw_only(), "k"_given, "v"_given, "rotary_cos"_given,
      "rotary_sin"_given, "rotary_interleaved"_given, "cache_seqlens"_given, "cache_batch_idx"_given, "cache_leftpad"_given,
      "cu_seqlens_q"_given, "max_seqlen_q"_given, "cu_seqlens_k_new"_given, "rotary_seqlens"_given, "k_scale"_given,
      "v_scale"_given);
  module.def(
      "update_paged_kv_cache",
      [](nb::handle k_cache, nb::handle v_cache, nb::handle new_k, nb::handle new_v, nb::handle block_table,
         nb::handle cache_seqlens, nb::handle stream) {
        return flash_attn::update_paged_kv_cache({required_array("k_cache", k_cache)}, {required_array("v_cache", v_cache)},
                                                 required_array("new_k", new_k), required_array("new_v", new_v),
                                                 required_array("block_table", block_table),
                                                 required_array("cache_seqlens", cache_seqlens), stream_of(stream));
      },
      "k_cache"_given, "v_cache"_given, "new_k"_given, "new_v"_given, "block_table"_given, "cache_seqlens"_given,
      "stream"_given);
  module.def(
      "validate_paged_kv_params",
      [](nb::handle k_cache, nb::handle v_cache, nb::handle block_table, nb::handle cache_seqlens, nb::handle seqlen_new) {
        flash_attn::validate_paged_kv_params(required_array("k_cache", k_cache), required_array("v_cache", v_cache),
                                             required_array("block_table", block_table),
                                             required_array("cache_seqlens", cache_seqlens), integer("seqlen_new", seqlen_new));
      },
      "k_cache"_given, "v_cache"_given, "block_table"_given, "cache_seqlens"_given, "seqlen_new"_given);
}

void warn_in_python(const std::string& message) {
  constexpr int user = 4;  // frames up: _call, _attention, the public function, who called it
  const nb::gil_scoped_acquire acquired;
  if (PyErr_WarnEx(PyExc_RuntimeWarning, message.c_str(), user) < 0) throw nb::python_error();
}

/// For tests: Metal kernels go to the MetalLauncher in the capsule; None undoes it. What was learnt of kernels is forgotten.
void bind_metal_launcher(nb::module_& module) {
  module.def(
      "_set_metal_launcher",
      [](std::optional<nb::capsule> launcher, bool probe) {
        flash_attn::set_metal_launcher(
            launcher ? *static_cast<flash_attn::MetalLauncher*>(launcher->data()) : flash_attn::MetalLauncher(), probe);
        flash_attn::forget_probes();
        flash_attn::forget_warnings();
      },
      "launcher"_given, "probe"_given = false);
}

template <class Result, class... Arguments, class Convert, std::size_t... i>
void bind_named(nb::module_& module, const char* function_name, Result (*function)(Arguments...),
                const std::array<const char*, sizeof...(Arguments)>& names, Convert convert, std::index_sequence<i...>) {
  module.def(
      function_name,
      [=](std::conditional_t<true, nb::handle, Arguments>... given) {
        // In their order, so that the first wrong one is named.
        const std::tuple<decltype(as<Arguments>(names[i], given))...> arguments{as<Arguments>(names[i], given)...};
        return convert(std::apply(function, arguments));
      },
      nb::arg(names[i]).none()...);
}

/// A function of arrays, of bounds of lengths and of the options. Its errors tell the names.
template <class Result, class... Arguments, class Convert>
void bind_named(nb::module_& module, const char* function_name, Result (*function)(Arguments...),
                const std::array<const char*, sizeof...(Arguments)>& names, Convert convert) {
  bind_named(module, function_name, function, names, convert, std::index_sequence_for<Arguments...>());
}

constexpr const char* options = "options";

}  // namespace

NB_MODULE(_core, module) {
  translate_errors();
  flash_attn::set_warning_sink(warn_in_python);
  bind_options(module);
  bind_kvcache(module);
  bind_metal_launcher(module);
  bind_named(module, "flash_attn_func", flash_attn::flash_attn_func, {"q", "k", "v", options}, tuple_of);
  bind_named(module, "flash_attn_qkvpacked_func", flash_attn::flash_attn_qkvpacked_func, {"qkv", options}, tuple_of);
  bind_named(module, "flash_attn_kvpacked_func", flash_attn::flash_attn_kvpacked_func, {"q", "kv", options}, tuple_of);
  bind_named(module, "flash_attn_varlen_func", flash_attn::flash_attn_varlen_func,
             {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", options}, tuple_of);
  bind_named(module, "flash_attn_varlen_qkvpacked_func", flash_attn::flash_attn_varlen_qkvpacked_func,
             {"qkv", "cu_seqlens", "max_seqlen", options}, tuple_of);
  bind_named(module, "flash_attn_varlen_kvpacked_func", flash_attn::flash_attn_varlen_kvpacked_func,
             {"q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", options}, tuple_of);
  bind_named(module, "route", flash_attn::route, {"q", "k", "v", options},
             [](const flash_attn::Route& route) { return std::pair(std::string(name_of(route.target)), route.why); });
  bind_named(module, "can_use_mlx_sdpa", flash_attn::can_use_mlx_sdpa, {"q", "k", "v", options}, [](bool can) { return can; });
  module.def(
      "flash_attn_combine",
      [](nb::handle out_partial, nb::handle lse_partial, nb::handle out_dtype, nb::handle stream) {
        return flash_attn::flash_attn_combine(required_array("out_partial", out_partial),
                                              required_array("lse_partial", lse_partial),
                                              optional_dtype("out_dtype", out_dtype), stream_of(stream));
      },
      "out_partial"_given, "lse_partial"_given, "out_dtype"_given, "stream"_given);
  module.def("isa_level", flash_attn::isa_level);
  module.def("num_threads", flash_attn::num_threads);
  bind_kv_cache(module);
}
