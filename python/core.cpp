// flash_attn.flash_attn_mlx._core: the C++ functions as Python sees them. Conversions only; interface.py documents them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

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
using namespace nb::literals;

namespace {

using flash_attn::AttentionOptions;
using flash_attn::AttentionResult;
using flash_attn::KVCacheArguments;

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

void bind_options(nb::module_& module) {
  nb::class_<AttentionOptions>(module, "AttentionOptions")
      .def(
          "__init__",
          [](AttentionOptions* self, double dropout_p, std::optional<double> softmax_scale, bool causal,
             std::pair<int, int> window_size, double softcap, std::optional<mx::array> alibi_slopes, bool deterministic,
             bool return_attn_probs, std::optional<mx::array> learnable_sink, std::optional<mx::array> attn_mask,
             std::optional<mx::array> qv, int attention_chunk, std::optional<mx::array> seqused_q,
             std::optional<mx::array> seqused_k, std::optional<mx::array> dropout_key, int num_splits,
             std::optional<mx::array> block_table, bool return_softmax_lse, mx::StreamOrDevice stream) {
            new (self) AttentionOptions{.dropout_p = dropout_p,
                                        .softmax_scale = softmax_scale,
                                        .causal = causal,
                                        .window_size = window_size,
                                        .softcap = softcap,
                                        .alibi_slopes = std::move(alibi_slopes),
                                        .deterministic = deterministic,
                                        .return_attn_probs = return_attn_probs,
                                        .learnable_sink = std::move(learnable_sink),
                                        .attn_mask = std::move(attn_mask),
                                        .qv = std::move(qv),
                                        .attention_chunk = attention_chunk,
                                        .seqused_q = std::move(seqused_q),
                                        .seqused_k = std::move(seqused_k),
                                        .dropout_key = std::move(dropout_key),
                                        .num_splits = num_splits,
                                        .block_table = std::move(block_table),
                                        .return_softmax_lse = return_softmax_lse,
                                        .stream = stream};
          },
          nb::kw_only(), "dropout_p"_a, "softmax_scale"_a.none(), "causal"_a, "window_size"_a, "softcap"_a,
          "alibi_slopes"_a.none(), "deterministic"_a, "return_attn_probs"_a, "learnable_sink"_a.none(), "attn_mask"_a.none(),
          "qv"_a.none(), "attention_chunk"_a, "seqused_q"_a.none(), "seqused_k"_a.none(), "dropout_key"_a.none(),
          "num_splits"_a, "block_table"_a.none(), "return_softmax_lse"_a, "stream"_a.none());
}

void bind_kvcache_arguments(nb::module_& module) {
  nb::class_<KVCacheArguments>(module, "KVCacheArguments")
      .def(
          "__init__",
          [](KVCacheArguments* self, std::optional<mx::array> k, std::optional<mx::array> v,
             std::optional<mx::array> rotary_cos, std::optional<mx::array> rotary_sin, bool rotary_interleaved,
             std::optional<mx::array> cache_seqlens, std::optional<mx::array> cache_batch_idx,
             std::optional<mx::array> cache_leftpad, std::optional<mx::array> cu_seqlens_q, std::optional<int> max_seqlen_q,
             std::optional<mx::array> cu_seqlens_k_new, std::optional<mx::array> rotary_seqlens) {
            new (self) KVCacheArguments{.k = std::move(k),
                                        .v = std::move(v),
                                        .rotary_cos = std::move(rotary_cos),
                                        .rotary_sin = std::move(rotary_sin),
                                        .rotary_interleaved = rotary_interleaved,
                                        .cache_seqlens = std::move(cache_seqlens),
                                        .cache_batch_idx = std::move(cache_batch_idx),
                                        .cache_leftpad = std::move(cache_leftpad),
                                        .cu_seqlens_q = std::move(cu_seqlens_q),
                                        .max_seqlen_q = max_seqlen_q,
                                        .cu_seqlens_k_new = std::move(cu_seqlens_k_new),
                                        .rotary_seqlens = std::move(rotary_seqlens)};
          },
          nb::kw_only(), "k"_a.none(), "v"_a.none(), "rotary_cos"_a.none(), "rotary_sin"_a.none(), "rotary_interleaved"_a,
          "cache_seqlens"_a.none(), "cache_batch_idx"_a.none(), "cache_leftpad"_a.none(), "cu_seqlens_q"_a.none(),
          "max_seqlen_q"_a.none(), "cu_seqlens_k_new"_a.none(), "rotary_seqlens"_a.none());
}

/// A cache is passed as its parts (data, scales, biases): references to the caller's arrays, which an append changes.
void bind_kvcache(nb::module_& module) {
  bind_kvcache_arguments(module);
  module.def(
      "flash_attn_with_kvcache",
      [](const mx::array& q, mx::array& k, mx::array* k_scales, mx::array* k_biases, mx::array& v, mx::array* v_scales,
         mx::array* v_biases, const KVCacheArguments& arguments, const AttentionOptions& options) {
        return tuple_of(
            flash_attn::flash_attn_with_kvcache(q, {k, k_scales, k_biases}, {v, v_scales, v_biases}, arguments, options));
      },
      nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(),
      nb::arg());
  module.def(
      "update_paged_kv_cache",
      [](mx::array& k_cache, mx::array& v_cache, const mx::array& new_k, const mx::array& new_v, const mx::array& block_table,
         const mx::array& cache_seqlens, mx::StreamOrDevice stream) {
        return flash_attn::update_paged_kv_cache({k_cache}, {v_cache}, new_k, new_v, block_table, cache_seqlens, stream);
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
  module.def("validate_paged_kv_params", flash_attn::validate_paged_kv_params);
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
      "launcher"_a.none(), "probe"_a = false);
}

/// Every attention function takes some arrays and sizes, then the options, and returns (out, lse, S_dmask, route).
template <class... Arguments>
void bind_attention(nb::module_& module, const char* name, AttentionResult (*function)(Arguments...)) {
  module.def(name, [function](Arguments... arguments) { return tuple_of(function(arguments...)); });
}

}  // namespace

NB_MODULE(_core, module) {
  translate_errors();
  flash_attn::set_warning_sink(warn_in_python);
  bind_options(module);
  bind_kvcache(module);
  bind_metal_launcher(module);
  bind_attention(module, "flash_attn_func", flash_attn::flash_attn_func);
  bind_attention(module, "flash_attn_qkvpacked_func", flash_attn::flash_attn_qkvpacked_func);
  bind_attention(module, "flash_attn_kvpacked_func", flash_attn::flash_attn_kvpacked_func);
  bind_attention(module, "flash_attn_varlen_func", flash_attn::flash_attn_varlen_func);
  bind_attention(module, "flash_attn_varlen_qkvpacked_func", flash_attn::flash_attn_varlen_qkvpacked_func);
  bind_attention(module, "flash_attn_varlen_kvpacked_func", flash_attn::flash_attn_varlen_kvpacked_func);
  module.def("flash_attn_combine", flash_attn::flash_attn_combine, "out_partial"_a, "lse_partial"_a, "out_dtype"_a.none(),
             "stream"_a.none());
  module.def("route", [](const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options) {
    const flash_attn::Route route = flash_attn::route(q, k, v, options);
    return std::pair(std::string(name_of(route.target)), route.why);
  });
  module.def("can_use_mlx_sdpa", flash_attn::can_use_mlx_sdpa);
  module.def("isa_level", flash_attn::isa_level);
  module.def("num_threads", flash_attn::num_threads);
  bind_kv_cache(module);
}
