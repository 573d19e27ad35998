"""ONNX Runtime on CPU: GroupQueryAttention, its fused kernel of language models, where the call is causal, else Attention."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from cache_pool import CachePool
from case import Case, DecodeCase
from peers.base import Inputs, Peer
from timing import Call


def _session(node: Any, inputs: dict[str, Any], outputs: dict[str, Any], threads: int) -> Any:
    """Of a graph of one node; values by name: (shape, element type)."""
    import onnxruntime
    from onnx import helper

    def described(values: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(name, dtype, shape) for name, (shape, dtype) in values.items()]

    graph = helper.make_graph([node], "attention", described(inputs), described(outputs))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10  # the newest that every supported release reads
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would spin on the cores of its peers
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _element_type(dtype: str) -> int:
    from onnx import TensorProto

    return {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]


def _group_query_attention(heads: int, heads_k: int, head_dim: int, dtype: str, threads: int, **attributes: Any) -> Any:
    """q, k, v (batch, seqlen, heads * head_dim); past and present (batch, heads_k, tokens, head_dim)."""
    from onnx import TensorProto, helper

    element = _element_type(dtype)
    names = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total"]
    node = helper.make_node(
        "GroupQueryAttention", names, ["out", "present_k", "present_v"], domain="com.microsoft", num_heads=heads,
        kv_num_heads=heads_k, **attributes,
    )  # fmt: skip
    packed, cache = ["B", "S", heads * head_dim], ["B", heads_k, "T", head_dim]
    packed_k = ["B", "S", heads_k * head_dim]
    inputs = {
        "q": (packed, element), "k": (packed_k, element), "v": (packed_k, element),
        "past_k": (["B", heads_k, "P", head_dim], element), "past_v": (["B", heads_k, "P", head_dim], element),
        "seqlens_k": (["B"], TensorProto.INT32), "total": ([1], TensorProto.INT32),
    }  # fmt: skip
    outputs = {"out": (packed, element), "present_k": (cache, element), "present_v": (cache, element)}
    return _session(node, inputs, outputs, threads)


class OnnxRuntime(Peer):
    name = "onnxruntime"
    title = "ONNX Runtime"
    packages = ("onnx", "onnxruntime")

    def lacks(self, case: Case) -> str:
        if case.backward:
            return "no backward"
        if case.dtype == "bfloat16":
            return "no bfloat16 on CPU"
        if case.lengths or case.alibi or case.dropout_p or case.lse or case.sinks or case.attn_mask:
            return f"not asked for {case.feature}"
        return "" if case.causal or (case.heads == case.heads_k and case.feature == "plain") else "full only plain"

    def prepare(self, case: Case, x: Inputs) -> Call:
        return self._causal(case, x) if case.causal else self._full(case, x)

    def _causal(self, case: Case, x: Inputs) -> Call:
        attributes: dict[str, Any] = {}
        if case.softcap:
            attributes["softcap"] = case.softcap
        if case.window[0] >= 0:
            attributes["local_window_size"] = case.window[0] + 1  # it counts the query's own key
        session = _group_query_attention(case.heads, case.heads_k, case.head_dim, case.dtype, self.threads, **attributes)
        nothing = np.zeros((case.batch, case.heads_k, 0, case.head_dim), np.dtype(case.dtype))
        feeds = {name: np.array(t).reshape(case.batch, case.seqlen, -1) for name, t in (("q", x.q), ("k", x.k), ("v", x.v))}
        feeds |= {"past_k": nothing, "past_v": nothing}
        feeds |= {"seqlens_k": np.full(case.batch, case.seqlen - 1, np.int32), "total": np.array([case.seqlen], np.int32)}
        return lambda: session.run(["out"], feeds)

    def _full(self, case: Case, x: Inputs) -> Call:
        from onnx import helper

        element = _element_type(case.dtype)
        node = helper.make_node("Attention", ["q", "k", "v"], ["out"])
        inputs = {name: ([None] * 4, element) for name in "qkv"}
        session = _session(node, inputs, {"out": ([None] * 4, element)}, self.threads)
        feeds = {name: np.array(mx.contiguous(t.swapaxes(1, 2))) for name, t in (("q", x.q), ("k", x.k), ("v", x.v))}
        return lambda: session.run(["out"], feeds)

    def lacks_decode(self, case: DecodeCase) -> str:
        return "" if case.dtype in ("float32", "float16") else super().lacks_decode(case) or f"no {case.dtype} cache on CPU"

    def decode(self, case: DecodeCase, pool: CachePool) -> list[Call]:
        """GroupQueryAttention in place: its past and present are one buffer, in which it writes the last token anew."""
        import onnxruntime

        session = _group_query_attention(case.heads, case.heads_k, case.head_dim, case.dtype, self.threads)
        rng = np.random.default_rng(1)

        def token(heads: int) -> np.ndarray:
            values = rng.standard_normal((case.batch, 1, heads * case.head_dim), dtype=np.float32)
            return values.astype(np.dtype(case.dtype))

        def call(k: mx.array, v: mx.array) -> Call:
            binding = session.io_binding()
            values = {"q": token(case.heads), "k": token(case.heads_k), "v": token(case.heads_k)}
            values |= {"seqlens_k": np.full(case.batch, case.length - 1, np.int32), "total": np.array([case.length], np.int32)}
            for name, value in values.items():
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
            for name, cache in (("k", k), ("v", v)):
                shared = onnxruntime.OrtValue.ortvalue_from_numpy(np.from_dlpack(cache))  # the pool's own memory
                binding.bind_ortvalue_input(f"past_{name}", shared)
                binding.bind_ortvalue_output(f"present_{name}", shared)
            binding.bind_output("out")
            return lambda: session.run_with_iobinding(binding)

        return [call(*pool.cache(case, index, heads_first=True)) for index in range(pool.caches(case))]
