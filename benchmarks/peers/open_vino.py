"""OpenVINO on CPU: scaled_dot_product_attention, for decode in the stateful form that its plugin fuses with the KV cache."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np

from cache_pool import CachePool
from case import Case, DecodeCase
from peers.base import Inputs, Peer
from timing import Call

# Its names of what it computes in; tensors of bfloat16 are handed over in float32, which numpy has.
PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _request(model: Any, dtype: str, threads: int) -> Any:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": PRECISION[dtype], "KV_CACHE_PRECISION": PRECISION[dtype], "INFERENCE_NUM_THREADS": threads,
    }  # fmt: skip
    return openvino.Core().compile_model(model, "CPU", options).create_infer_request()


def _stateful_model(case: DecodeCase) -> Any:
    """Appends k and v to its state and attends over it, written the way its plugin looks for."""
    import openvino
    from openvino import opset6
    from openvino import opset13 as ops

    heads, heads_k, dim = case.heads, case.heads_k, case.head_dim
    float32 = openvino.Type.f32
    zero = ops.constant(np.int64(0))
    q = ops.parameter([-1, heads, -1, dim], float32, name="q")
    new = {name: ops.parameter([-1, heads_k, -1, dim], float32, name=name) for name in ("k", "v")}
    beam = ops.parameter([-1], openvino.Type.i32, name="beam_idx")
    mask = ops.parameter([-1, 1, -1, -1], float32, name="mask")
    batch = ops.gather(ops.shape_of(beam, output_type="i64"), ops.constant(np.array([0], np.int64)), zero)
    nothing = ops.concat([batch, ops.constant(np.array([heads_k, 0, dim], np.int64))], 0)
    assigned, repeated = [], []
    for name, rows in new.items():
        empty = ops.broadcast(ops.constant(np.float32(0.0)), nothing)
        past = ops.gather(opset6.read_value(empty, f"past_{name}", float32, [-1, heads_k, -1, dim]), beam, zero)
        present = ops.concat([past, rows], -2)
        assigned.append(opset6.assign(present, f"past_{name}"))
        ones = ops.constant(np.ones((1, 1, heads // heads_k, 1, 1), np.float32))
        group = ops.multiply(ops.unsqueeze(present, ops.constant(np.int64(2))), ones)
        repeated.append(ops.reshape(group, ops.constant(np.array([0, heads, -1, dim], np.int64)), True))
    out = ops.scaled_dot_product_attention(q, *repeated, mask, causal=False)
    return openvino.Model([ops.result(out)], assigned, [q, new["k"], new["v"], beam, mask], "decode")


class OpenVino(Peer):
    name = "openvino"
    title = "OpenVINO"
    packages = ("openvino",)

    def lacks(self, case: Case) -> str:
        if case.backward:
            return "no backward"
        return "" if case.feature == "plain" and case.heads == case.heads_k else f"not asked for {case.feature}"

    def prepare(self, case: Case, x: Inputs) -> Call:
        import openvino
        from openvino import opset13 as ops

        element = openvino.Type.f16 if case.dtype == "float16" else openvino.Type.f32
        names = ("q", "k", "v")
        parameters = [ops.parameter([-1, case.heads, -1, case.head_dim], element, name=name) for name in names]
        out = ops.scaled_dot_product_attention(*parameters, causal=case.causal)
        request = _request(openvino.Model([out], parameters, "attention"), case.dtype, self.threads)
        dtype = mx.float16 if case.dtype == "float16" else mx.float32
        tensors = [openvino.Tensor(np.array(mx.contiguous(t.astype(dtype).swapaxes(1, 2)))) for t in (x.q, x.k, x.v)]
        return lambda: request.infer(tensors, share_inputs=True, share_outputs=True)

    def lacks_decode(self, case: DecodeCase) -> str:
        return "" if case.dtype in PRECISION else super().lacks_decode(case) or f"not asked for an {case.dtype} cache"

    def decode(self, case: DecodeCase, pool: CachePool) -> list[Call]:
        """One cache, its own, which grows by a token a call."""
        import openvino

        request = _request(_stateful_model(case), case.dtype, self.threads)
        rng = np.random.default_rng(1)

        def rows(heads: int, tokens: int = 1) -> np.ndarray:
            return rng.standard_normal((case.batch, heads, tokens, case.head_dim), dtype=np.float32)

        for state in request.query_state():
            state.state = openvino.Tensor(rows(case.heads_k, case.length - 1))
        lengths = itertools.count(case.length)
        inputs = {
            "q": rows(case.heads), "k": rows(case.heads_k), "v": rows(case.heads_k),
            "beam_idx": np.arange(case.batch, dtype=np.int32),
        }  # fmt: skip

        def infer() -> None:
            mask = np.zeros((case.batch, 1, 1, next(lengths)), np.float32)
            request.infer(inputs | {"mask": mask}, share_inputs=True, share_outputs=True)

        return [infer]
